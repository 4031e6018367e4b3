"""A borrower that is no engine: leases what it can, fills it with what is no KV, says how much, and stays until its
input ends."""

import ctypes
import os
import sys

from swiftcache import Cache, Connection

PAGE = 16 << 10
BLOCKS = 64

socket = sys.argv[1]
cache = Cache(
    Connection(socket, name="a tenant"),
    namespace="tenant",
    layer_bytes=[PAGE],
    max_leased_bytes=1 << 30,
    lease_step_bytes=1 << 30,
    device="SIM-0",
    backend="host",
)
pool = (ctypes.c_ubyte * (BLOCKS * PAGE))(*os.urandom(PAGE), *[0x5A] * ((BLOCKS - 1) * PAGE))
cache.register_pool([(ctypes.addressof(pool), ctypes.sizeof(pool), 0, PAGE)], BLOCKS, pool)
assert cache.wait_open(60), cache.problem()
while not cache.stats()["evicted_blocks"]:
    # Others may have to make room first: asking is what makes them.
    cache.store(os.urandom(16 * BLOCKS), range(BLOCKS)).finish()
print(int(cache.stats()["leased_bytes"]), flush=True)
sys.stdin.read()
