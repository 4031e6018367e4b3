"""An engine that takes up its pool, lends of it, takes back and stores, over and over, until it is killed. It begins when
it is told to, and says when it has done everything once."""

import ctypes
import sys

from engine import LAYERS, SLAB_BYTES, Engine
from swiftcache import Cache, Connection

LAYER = 2
print("ready", flush=True)
sys.stdin.readline()
connection = Connection(sys.argv[1], name="a doomed engine")
cache = Cache(
    connection,
    namespace="doomed",
    layer_bytes=LAYERS,
    max_leased_bytes=SLAB_BYTES,
    lease_step_bytes=SLAB_BYTES,
    device="SIM-1",
)
engine = Engine(cache)
lent = engine.pool.storages[LAYER]
turn = 0
away = False
while True:
    turn += 1
    if not away:
        cache.lend(turn, [(ctypes.addressof(lent), ctypes.sizeof(lent))])
        away = True
    engine.store([10 * turn, 10 * turn + 1])
    stats = cache.stats()
    if stats["lent_bytes"] and stats["leased_bytes"] and stats["stored_blocks"]:
        print("all done once", flush=True)
        cache.take_back(range(turn + 1))
    away = away and not cache.returned_loans()
