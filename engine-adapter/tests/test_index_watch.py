"""The index as a scheduler follows it: which of the blocks that it named every rank can find."""

from collections.abc import Callable

import pytest
from engine import SLAB_BYTES, Engine, hashes
from node import Node, eventually
from swiftcache import Connection

KEY = 16


class Followed:
    """What was told, as a set."""

    def __init__(self, connection: Connection, *namespaces: str) -> None:
        self.watch = connection.watch_index(namespaces)
        self.found: set[bytes] = set()
        self.watch.name(hashes(range(8)))

    def hears(self, blocks: range) -> bool:
        for name, host, found in self.watch.take():
            assert not host and (name in self.found) != found, "nothing is told twice"
            self.found ^= {name}
        packed = hashes(blocks)
        return self.found == {packed[at : at + KEY] for at in range(0, len(packed), KEY)}


def test_what_every_rank_has_is_told_and_what_one_has_lost_too(
    node: Node, engine: Callable[..., Engine]
) -> None:
    donor = node.start_donor("SIM-1", 8, SLAB_BYTES)
    ranks = [engine(namespace=f"rank {rank}") for rank in range(2)]
    scheduler = Connection(node.socket, name="scheduler")
    both, one = Followed(scheduler, "rank 0", "rank 1"), Followed(scheduler, "rank 0")
    # Another tenant of this user is told nothing, whatever it names.
    stranger = Followed(Connection(node.socket, name="stranger", tenant="other"), "rank 0")
    assert ranks[0].store(range(6))["stored"] == 6
    eventually("one rank's blocks", lambda: one.hears(range(6)))
    assert both.hears(range(0))
    assert ranks[1].store(range(4))["stored"] == 4
    eventually("both ranks' blocks", lambda: both.hears(range(4)))
    # What is forgotten is not told any more; what was told of it counts as gone.
    told = both.watch.forget(hashes([0, 7]))
    assert told == [(hashes([0]), False, False)]
    both.found -= {hashes([0])}
    # A broker that has forgotten all is told again by those who have it.
    node.kill_broker()
    node.start_broker()
    eventually("the blocks to be back", lambda: one.hears(range(6)) and both.hears(range(1, 4)))
    node.withdraw(donor)
    eventually("nothing to be found", lambda: one.hears(range(0)) and both.hears(range(0)))
    assert stranger.hears(range(0))


def test_wrong_arguments_are_named_and_a_closed_one_tells_nothing(node: Node) -> None:
    scheduler = Connection(node.socket, name="scheduler")
    with pytest.raises(ValueError, match="namespaces"):
        scheduler.watch_index([])
    with pytest.raises(ValueError, match=r"namespaces\[1\]"):
        scheduler.watch_index(["model", ""])
    watch = scheduler.watch_index(["model"])
    with pytest.raises(ValueError, match="hashes"):
        watch.name(b"short")
    watch.close()
    watch.name(hashes([1]))
    assert watch.take() == [] == watch.forget(hashes([1]))
    scheduler.close()
    assert scheduler.watch_index(["model"]).take() == []
