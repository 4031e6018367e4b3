"""The lookup of a scheduler, which counts the blocks that every rank has."""

from collections.abc import Callable

import pytest
from engine import BLOCK_BYTES, SLAB_BYTES, Engine, hashes
from node import Node, eventually
from swiftcache import Cache, Connection


def test_a_block_counts_when_every_rank_has_it(node: Node, engine: Callable[..., Engine]) -> None:
    node.start_donor("SIM-1", 8, SLAB_BYTES)
    ranks = [engine(namespace=f"rank {rank}") for rank in range(2)]
    scheduler = Connection(node.socket, name="scheduler")
    assert scheduler.wait_connected(60)

    def count(*namespaces: str) -> int:
        return scheduler.count_hits(namespaces, hashes(range(8)), deadline_ms=60_000)

    assert count("rank 0", "rank 1") == 0
    assert ranks[0].store(range(6))["stored"] == 6
    assert count("rank 0", "rank 1") == 0
    assert ranks[1].store(range(4))["stored"] == 4
    assert count("rank 0", "rank 1") == count("rank 1", "rank 0") == count("rank 1") == 4
    assert count("rank 0") == 6
    assert count("rank 0", "rank 1", "no such rank") == 0
    # The first hash is unknown, so there is no prefix.
    assert scheduler.count_hits(["rank 0"], hashes([9, 0, 1]), deadline_ms=60_000) == 0
    assert scheduler.count_hits(["rank 0"], b"", deadline_ms=60_000) == 0
    # The count is 0 after the deadline, and on a closed connection.
    assert scheduler.count_hits(["rank 0"], hashes(range(8)), deadline_ms=0) == 0
    scheduler.close()
    assert not scheduler.is_connected() and count("rank 0") == 0
    # Another tenant finds nothing.
    stranger = Connection(node.socket, name="stranger", tenant="other")
    assert stranger.wait_connected(60)
    assert stranger.count_hits(["rank 0"], hashes(range(8)), deadline_ms=60_000) == 0


def test_a_scheduler_finds_what_its_worker_keeps_in_host_memory(
    node: Node, cache: Callable[..., Cache]
) -> None:
    name = bytes(range(16))

    def worker(**settings: object) -> Engine:
        one = Engine(cache(namespace="rank 0", host_tier_bytes=8 * BLOCK_BYTES, **settings))
        assert one.cache.wait_open(60)
        return one

    first, other = worker(borrower_id=name), worker()
    scheduler = Connection(node.socket, name="scheduler")
    assert scheduler.wait_connected(60)
    assert first.store(range(6))["stored"] == 6

    def count(*borrowers: bytes) -> int:
        namespaces = ["rank 0"] * len(borrowers)
        return scheduler.count_hits(namespaces, hashes(range(8)), borrowers=borrowers, deadline_ms=60_000)

    eventually("the promise", lambda: count(name) == 6)
    # It is this worker's only: nobody else could load it.
    assert scheduler.count_hits(["rank 0"], hashes(range(8)), deadline_ms=60_000) == 0
    assert count(name, bytes(16)) == 0
    assert other.store(range(2))["stored"] == 2
    # A cache that takes a closed one's place has its name, and not its blocks.
    first.cache.close()
    assert count(name) == 0
    again = worker(borrower_id=name)
    assert again.store(range(3))["stored"] == 3
    eventually("the promise of the new one", lambda: count(name) == 3)
    scheduler.close()


def test_arguments_are_named(bare_node: Node, connection: Connection) -> None:
    for arguments, name in [
        (([], b""), "namespaces"),
        (([""], b""), r"namespaces\[0\]"),
        ((["a", "n" * 257], b""), r"namespaces\[1\]"),
        ((["a"], b"17 bytes, not 16."), "hashes"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            connection.count_hits(*arguments, deadline_ms=1)
    for borrowers, name in [([], "borrowers"), ([b"short"], r"borrowers\[0\]")]:
        with pytest.raises(ValueError, match=f"^{name}"):
            connection.count_hits(["a"], b"", borrowers=borrowers, deadline_ms=1)
    with pytest.raises(ValueError, match="^deadline_ms"):
        connection.count_hits(["a"], b"", deadline_ms=-1)
    with pytest.raises(ValueError, match="^seconds"):
        connection.wait_connected(-1)
    for settings, name in [({"name": ""}, "name"), ({"name": "a", "tenant": "t" * 65}, "tenant")]:
        with pytest.raises(ValueError, match=f"^{name}"):
            Connection(bare_node.socket, **settings)
