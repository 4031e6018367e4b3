"""Another process of the same model: loads a sequence that it did not store, checks it, and prints how it went."""

import json
import sys

from engine import LAYERS, SLAB_BYTES, Engine
from swiftcache import Cache, Connection

socket, *numbers = sys.argv[1:]
sequence = [int(number) for number in numbers]
connection = Connection(socket, name="a replica")
cache = Cache(connection, namespace="model", layer_bytes=LAYERS, max_leased_bytes=SLAB_BYTES, device="SIM-0")
engine = Engine(cache)
assert cache.wait_open(60), cache.problem()
failed = engine.fetch(sequence)
print(json.dumps({"failed": failed, "hit_shared_blocks": cache.stats()["hit_shared_blocks"]}))
# Left open: a process that ends must neither hang nor crash.
