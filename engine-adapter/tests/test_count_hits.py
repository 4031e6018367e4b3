"""The lookup of a scheduler, which counts the blocks that every rank has."""

from collections.abc import Callable

import pytest
from engine import SLAB_BYTES, Engine, hashes
from node import Node
from swiftcache import Connection


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


def test_arguments_are_named(bare_node: Node, connection: Connection) -> None:
    for arguments, name in [
        (([], b""), "namespaces"),
        (([""], b""), r"namespaces\[0\]"),
        ((["a", "n" * 257], b""), r"namespaces\[1\]"),
        ((["a"], b"17 bytes, not 16."), "hashes"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            connection.count_hits(*arguments)
    with pytest.raises(ValueError, match="^deadline_ms"):
        connection.count_hits(["a"], b"", deadline_ms=-1)
    with pytest.raises(ValueError, match="^seconds"):
        connection.wait_connected(-1)
    for settings, name in [({"name": ""}, "name"), ({"name": "a", "tenant": "t" * 65}, "tenant")]:
        with pytest.raises(ValueError, match=f"^{name}"):
            Connection(bare_node.socket, **settings)
