"""Another process of the same model. It loads a sequence that it did not store, checks it, and prints the result."""

import json
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "harness"))

from engine import LAYERS, SLAB_BYTES, Engine
from node import eventually
from swiftcache import Cache, Connection

socket, *numbers = sys.argv[1:]
sequence = [int(number) for number in numbers]
connection = Connection(socket, name="a replica")
cache = Cache(connection, namespace="model", layer_bytes=LAYERS, max_leased_bytes=SLAB_BYTES, device="SIM-0")
engine = Engine(cache)
assert cache.wait_open(60), cache.problem()


def found() -> dict[str, object] | None:
    hits = cache.stats()["hit_shared_blocks"]
    failed = engine.fetch(sequence)
    # If the broker answers late, every block is a miss.
    if len(failed) == len(sequence):
        return None
    return {"failed": failed, "hit_shared_blocks": cache.stats()["hit_shared_blocks"] - hits}


print(json.dumps(eventually("what was stored", found)))
# Neither cache nor connection is closed: the process must neither hang nor crash when it exits.
