"""Stored blocks come back byte for byte, or not at all."""

import gc
import json
import pathlib
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

import pytest
from engine import BLOCKS, HALF, LAYERS, SLAB_BYTES, Engine, Pool, hashes
from node import Node, eventually
from swiftcache import Cache, Connection

Make = Callable[..., Engine]


@pytest.mark.parametrize("block_major", [False, True])
def test_what_is_stored_comes_back_byte_for_byte(node: Node, engine: Make, block_major: bool) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine(Pool(block_major))
    sequence = list(range(10))
    assert one.fetch(sequence) == sequence
    assert one.store(sequence) == {"stored": 10, "known": 0, "unplaced": 0, "lost": 0}
    assert one.fetch(sequence) == []
    # The prefix is found, and nothing after a gap.
    assert one.fetch([0, 1, 2, 99, 4]) == [3, 4]
    assert one.store(sequence)["known"] == 10
    stats = one.cache.stats()
    assert stats["stored_nvlink_bytes"] == 10 * sum(LAYERS)
    assert (stats["hit_donor_blocks"], stats["donor_blocks"], stats["failed_blocks"]) == (13, 10, 0)
    assert (stats["connected"], stats["open"]) == (1, 1)


def test_a_corrupted_byte_is_noticed(node: Node, engine: Make) -> None:
    """The twin: `fetch` fails if a wrong byte is stored or served."""
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.pool.compute(1, 0)
    one.pool.compute(2, 1)
    spoiled = bytearray(one.pool.read(2, 1))
    spoiled[5000] ^= 1
    one.pool.write(2, 1, bytes(spoiled))
    assert one.store_computed([1, 2])["stored"] == 2
    with pytest.raises(AssertionError, match="wrong bytes: block 2, layer 2"):
        one.fetch([1, 2])
    assert one.fetch([1]) == []


def test_gates_and_marks_on_the_host_are_waits(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store([1, 2, 3])
    load = one.cache.load(hashes([1, 2, 3, 4]), [40, 41, 42, 43], after=one.cache.mark(7))
    for layer in range(len(LAYERS)):
        assert load.gate_layer(layer, 7) is None
        assert all(one.pool.holds(n, layer, 39 + n) for n in (1, 2, 3))
    assert load.finish() == [3]
    assert load.wait_layer(0) == [3]
    load.gate_layer(0, 7)


def test_a_replica_in_another_process_loads_what_was_stored(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    assert one.store([1, 2, 3])["stored"] == 3
    replica = pathlib.Path(__file__).with_name("replica.py")
    command = [sys.executable, replica, node.socket, "1", "2", "3", "4"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=240)
    assert json.loads(answer.stdout) == {"failed": [3], "hit_shared_blocks": 3}


def test_without_a_broker_everything_is_a_miss_and_it_opens_when_one_comes(
    bare_node: Node, connection: Connection, cache: Callable[..., Cache]
) -> None:
    one = Engine(cache())
    assert not one.cache.is_open() and not connection.is_connected()
    assert not one.cache.wait_open(0) and not connection.wait_connected(0)
    assert "broker.sock" in one.cache.problem() and "broker.sock" in connection.problem()
    assert one.fetch([1, 2]) == [0, 1]
    assert one.store([1, 2])["unplaced"] == 2
    assert connection.count_hits(["model"], hashes([1, 2]), deadline_ms=60_000) == 0
    assert one.cache.stats()["open"] == one.cache.stats()["leases"] == 0
    early = one.cache.mark(0)

    opened = []
    waiting = threading.Thread(target=lambda: opened.append(one.cache.wait_open(60)))
    waiting.start()
    # If `wait_open` did not release the GIL, this line would be reached only after a minute.
    bare_node.start_broker()
    bare_node.start_donor("SIM-1", 2, SLAB_BYTES)
    waiting.join()
    assert opened == [True]
    assert connection.wait_connected(60) and one.cache.problem() == connection.problem() == ""
    eventually("a lease", lambda: one.cache.stats()["leases"])
    # A mark from before the cache was open marks nothing, so a store or load with it does nothing.
    assert one.cache.store(hashes([1]), [0], [early] * len(LAYERS)).finish()["unplaced"] == 1
    assert one.store([1, 2])["stored"] == 2
    assert one.cache.load(hashes([1, 2]), [40, 41], early).finish() == [0, 1]
    assert one.fetch([1, 2]) == []


def test_a_broker_that_dies_and_comes_back_costs_no_block(node: Node, connection: Connection, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    sequence = list(range(12))
    assert one.store(sequence)["stored"] == 12
    node.kill_broker()
    eventually("the loss to be noticed", lambda: not connection.is_connected())
    assert one.cache.is_open()
    # A cache can read and write its own blocks without a broker.
    assert one.fetch(sequence) == []
    assert one.store([50, 51])["lost"] == 0
    assert one.fetch([50, 51]) == []
    assert connection.count_hits(["model"], hashes(sequence), deadline_ms=60_000) == 0
    node.start_broker()
    assert connection.wait_connected(60)

    def published() -> bool:
        counts = [connection.count_hits(["model"], hashes(of), deadline_ms=60_000) for of in (sequence, [50, 51])]
        return counts == [12, 2]

    eventually("the blocks to be published again", published)
    assert one.fetch(sequence) == []


def test_a_donor_that_leaves_takes_blocks_but_serves_no_wrong_byte(node: Node, engine: Make) -> None:
    donor = node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    sequence = list(range(14))
    assert one.store(sequence)["stored"] == 14
    assert one.fetch(sequence) == []
    node.withdraw(donor)
    # `fetch` checks every byte of the blocks that did not fail: before, while and after the lease is revoked.
    eventually("the donor to have its bytes back", lambda: (one.fetch(sequence), donor.poll() is not None)[1])
    assert donor.returncode == 0
    assert one.fetch(sequence) == sequence
    assert one.store(sequence)["unplaced"] == 14
    stats = one.cache.stats()
    assert stats["revocations"] >= 1 and stats["leases"] == 0
    # With another donor, everything works again.
    node.start_donor("SIM-1", 2, SLAB_BYTES)
    eventually("a lease", lambda: one.cache.stats()["leases"])
    assert one.store(sequence)["stored"] == 14
    assert one.fetch(sequence) == []


def test_a_killed_donor_serves_no_wrong_byte(node: Node, engine: Make) -> None:
    donor = node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    sequence = list(range(14))
    assert one.store(sequence)["stored"] == 14
    donor.kill()
    # `fetch` checks every byte of the blocks that did not fail.
    eventually("the lease to go", lambda: (one.fetch(sequence), one.cache.stats()["leases"] == 0)[1])
    assert one.fetch(sequence) == sequence


def test_the_host_tier_keeps_what_donors_do_not(node: Node, cache: Callable[..., Cache]) -> None:
    one = Engine(cache(slabs=0, host_tier_bytes=SLAB_BYTES))
    assert one.cache.wait_open(60), one.cache.problem()
    assert one.store([1, 2])["stored"] == 2
    assert one.fetch([1, 2]) == []
    assert one.cache.stats()["hit_host_blocks"] == 2


def test_the_pools_owner_lives_until_the_cache_is_closed(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    one.store([1, 2])
    pool = weakref.ref(one.pool)
    load = one.cache.load(hashes([1, 2]), [HALF, HALF + 1])
    del one.pool
    gc.collect()
    assert pool() is not None
    one.cache.close()
    gc.collect()
    # `close` has waited for the copies.
    assert load.is_done() and pool() is None
    assert load.finish() == []
    one.cache.close()
    assert one.cache.problem() == "the cache is closed"
    assert one.cache.load(hashes([1]), [0]).finish() == [0]
    assert one.cache.store(hashes([1]), [0]).finish()["unplaced"] == 1
    # A closed cache does not keep a pool alive.
    late = Pool()
    kept = weakref.ref(late)
    one.cache.register_pool(late.layers(), BLOCKS, late)
    del late
    assert kept() is None


def test_a_pool_that_is_replaced_is_let_go_of(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    one.store([1, 2])
    first = weakref.ref(one.pool)
    one.pool = Pool(block_major=True)
    one.cache.register_pool(one.pool.layers(), BLOCKS, one.pool)
    gc.collect()
    assert first() is None
    assert one.fetch([1, 2]) == []


def test_dropped_loads_and_stores_end_by_themselves(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    one.pool.compute(1, 0)
    one.cache.store(hashes([1]), [0])
    eventually("the store to end", lambda: one.fetch([1]) == [])
    one.cache.load(hashes([1]), [HALF])
    one.cache.close()
    assert one.pool.holds(1, 0, HALF)


def test_many_threads_share_a_cache(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine(slabs=4)
    sequence = list(range(12))
    assert one.store(sequence)["stored"] == 12
    wrong: list[object] = []

    def work(first: int) -> None:
        for _ in range(20):
            blocks = range(first, first + 12)
            failed = one.cache.load(hashes(sequence), blocks).finish()
            held = all(one.pool.holds(n, 1, b) for n, b in zip(sequence, blocks, strict=True))
            if failed or not held:
                wrong.append((first, failed, held))

    threads = [threading.Thread(target=work, args=(first,)) for first in (12, 24, 36, 48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
