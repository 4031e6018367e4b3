"""A child of `fork` has its parent's objects and none of its threads. Its calls answer misses at once."""

import gc
import json
import mmap
import os
import pathlib
import signal
import tempfile
from collections.abc import Callable

from engine import SLAB_BYTES, Engine, hashes
from node import Node, eventually
from swiftcache import Cache, Connection

Make = Callable[..., Engine]


def in_child(work: Callable[[], object]) -> object:
    """What `work` returns in a child. A child that hangs or panics fails the test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        except BaseException as error:  # noqa: BLE001
            os.write(write, json.dumps(repr(error)).encode())
        finally:
            # Not exit(): the fixtures are the parent's to close.
            os._exit(0)
    os.close(write)
    try:
        ended = []

        def over() -> bool:
            ended[:] = os.waitpid(child, os.WNOHANG)
            return ended[0] == child

        eventually("the child to end", over)
        assert ended[1] == 0, ended
    finally:
        if not ended or ended[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    with os.fdopen(read, "rb") as answer:
        return json.loads(answer.read())


def answers(one: Engine, connection: Connection) -> dict[str, object]:
    """What every call says of blocks 0 to 3, which are stored."""
    load = one.cache.load(hashes(range(4)), [10, 11, 12, 13])
    first = load.wait_layer(0)
    store = one.cache.store(hashes([50]), [14])
    is_open = one.cache.wait_open(0.01)
    return {
        "load": [first, load.finish()],
        "store": store.finish()["stored"],
        "open": [is_open, one.cache.is_open(), connection.is_connected(), connection.wait_connected(0.01)],
        "stats": [one.cache.stats()["connected"], one.cache.stats()["open"]],
        "hits": connection.count_hits(["model"], hashes(range(4)), deadline_ms=60_000),
        "problem": one.cache.problem(),
        "loans": [one.cache.returned_loans(), one.cache.lend_problem()],
    }


def test_a_forked_childs_calls_are_misses_at_once(node: Node, connection: Connection, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store(range(4))
    under_way = one.cache.load(hashes(range(4)), [20, 21, 22, 23])
    kept = one.cache.store(hashes([60]), [24])
    claims = [one.cache.claim(hashes(range(4)), 1 << 30) for _ in range(2)]
    claimed = claims[0].load([26, 27, 28, 29])

    def work() -> dict[str, object]:
        said = answers(one, connection)
        # What began in the parent ends there.
        said["inherited"] = [under_way.is_done(), under_way.finish(), kept.is_done(), kept.finish()["stored"]]
        begun = claims[1].load([30, 31])
        said["claimed"] = [claimed.is_done(), claimed.missing(), claimed.finish(), begun.promise(0), begun.finish()]
        one.cache.take_back([1])
        one.cache.close()
        connection.close()
        gc.collect()
        return said

    child = in_child(work)
    everything = [0, 1, 2, 3]
    assert child["load"] == [everything, everything], child
    assert child["store"] == 0 and child["hits"] == 0
    assert child["open"] == [False] * 4 and child["stats"] == [0, 0]
    assert "of which this one is a fork" in child["problem"]
    assert child["inherited"] == [True, everything, True, 0]
    assert child["claimed"] == [True, everything, everything, False, [0, 1]]
    # The twin: the parent's own calls find everything, also after its child has closed what it inherited.
    parent = answers(one, connection)
    assert parent["load"] == [[], []] and parent["hits"] == 4
    assert parent["store"] == 1 and parent["open"] == [True] * 4 and parent["stats"] == [1, 1]
    assert parent["problem"] == ""
    assert claims[1].load([30, 31]).finish() == [] and claimed.finish() == []
    assert under_way.finish() == [] and kept.finish()["stored"] == 1


def test_a_forked_child_opens_a_cache_of_its_own(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store(range(4))

    def work() -> int:
        connection = Connection(node.socket, name="a child")
        assert connection.wait_connected(60), connection.problem()
        return connection.count_hits(["model"], hashes(range(4)), deadline_ms=60_000)

    assert in_child(work) == 4


def mapped(name: str) -> int:
    """How many mappings of this process have the name."""
    return pathlib.Path("/proc/self/maps").read_text().count(name)


def test_no_mapping_of_anothers_memory_is_inherited(
    node: Node, connection: Connection, cache: Callable[..., Cache]
) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = Engine(cache())
    assert one.cache.wait_open(60)
    eventually("a lease", lambda: one.cache.stats()["leases"])
    assert one.store([1])["stored"] == 1
    assert mapped("swiftcache-hbm") > 0, "the parent has it"
    # The twin: a mapping that nobody keeps from children is there in one.
    with tempfile.NamedTemporaryFile(prefix="an-ordinary-file") as file:
        file.write(bytes(4096))
        file.flush()
        with mmap.mmap(file.fileno(), 4096):
            inherited = in_child(lambda: [mapped("swiftcache-hbm"), mapped("an-ordinary-file")])
    assert inherited == [0, 1]
    assert one.fetch([1]) == []
