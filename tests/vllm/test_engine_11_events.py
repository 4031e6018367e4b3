"""A router that believes an engine's KV events knows what the broker's index has: at every pause, whatever became of
the blocks, and whoever did it. Tests run in the order of this file.
"""

from __future__ import annotations

import os
import signal
import subprocess

import lab as of
import pytest
from neighbours import SLAB, donate
from node import KEPT, eventually

MEDIA = {"hbm": "SWIFTCACHE_HBM", "host": "SWIFTCACHE_HOST"}
SETTINGS = {"load": "sync", "max_leased_bytes": 3 * SLAB, "max_host_leased_bytes": 2 * SLAB}


@pytest.fixture(scope="module")
def donors(node) -> list[subprocess.Popen[bytes]]:
    node.start_broker(estate_ttl_ms=KEPT)
    return [donate(node, slabs=2), donate(node, slabs=2, device="HOST-0")]


@pytest.fixture(scope="module")
def engine(lab, node, donors):
    engine = lab.engine("a")
    of.connect(engine, node, events=True, connector=SETTINGS)
    yield engine
    engine.ask("stop")


def index(node) -> set[tuple[str, str]]:
    return {(MEDIA[medium], name) for medium, name in node.index()}


def names(node) -> frozenset[str]:
    return frozenset(name for _, name in index(node))


def believed(engine, how: str = "known") -> set[tuple[str, str]]:
    events = engine.ask("events")
    assert events["wrong"] == []
    return {tuple(block) for block in events[how]}


def pause(engine, node, old: frozenset = frozenset()) -> set[tuple[str, str]]:
    """Nothing is on its way: what a router believes is what there is. `old`: names of what the engine has disowned."""
    engine.ask("settle")
    blocks: set[tuple[str, str]] = set()

    def equal() -> bool:
        nonlocal blocks
        blocks = believed(engine)
        return blocks == {block for block in index(node) if block[1] not in old}

    eventually("events to say what the index says", equal)
    return blocks


def talk(engine, name: str, tokens: int = 700) -> None:
    engine.generate({name: of.tokens(name, tokens)}, of.ANSWER)


def test_what_is_stored_is_known(engine, node) -> None:
    assert pause(engine, node) == set()
    talk(engine, "first")
    assert len(pause(engine, node)) == 715 // of.BLOCK
    assert set(engine.ask("events")["kinds"]) == {"BlockStored"}


def test_what_is_evicted_or_moved_is_known(engine, node) -> None:
    """The pool of the donors holds some hundred blocks: what came first has to go."""
    number, blocks = 0, set()

    def removed() -> bool:
        nonlocal number, blocks
        number += 1
        talk(engine, f"crowd-{number}", 2000)
        blocks = pause(engine, node)
        # While a lease of either kind is yet to come, which takes its time on a busy machine, all lie in the other one.
        both = {medium for medium, _ in blocks} == set(MEDIA.values())
        return both and "BlockRemoved" in engine.ask("events")["kinds"]

    eventually("an eviction, and both kinds of memory to be full", removed, 600)
    # The twin: a router that is told of no removal believes in blocks that are gone.
    assert believed(engine, "deaf") > blocks


def test_what_is_withdrawn_is_known(engine, node, donors) -> None:
    before = pause(engine, node)
    node.withdraw(donors[0])
    donors[0].wait()
    after = pause(engine, node)
    assert {medium for medium, _ in after} == {MEDIA["host"]} and before - after
    donors[0] = donate(node, slabs=2)
    talk(engine, "after-the-withdrawal")
    pause(engine, node)


def test_what_an_operator_drops_is_known(engine, node) -> None:
    """The engine's own part in it is none: it would find the blocks still."""
    before = pause(engine, node)
    [name] = {worker["namespace"] for worker in engine.ask("held")["workers"]}
    node.drop("evict", name)
    assert before - pause(engine, node)
    talk(engine, "after-the-operator")
    assert pause(engine, node)


def test_what_dies_with_its_donor_is_known(engine, node, donors) -> None:
    os.kill(donors[0].pid, signal.SIGKILL)
    donors[0].wait()
    eventually("the broker to notice", lambda: len(node.status()["donors"]) == 1)
    blocks = pause(engine, node)
    assert MEDIA["hbm"] not in {medium for medium, _ in blocks}
    donors[0] = donate(node, slabs=2)
    talk(engine, "after-the-death")
    pause(engine, node)


def test_what_a_broker_does_not_know_any_more_is_known(engine, node) -> None:
    """It is told again what there is. Until then nothing is found there by others, and a router knows that."""
    pause(engine, node)

    def at_rest() -> bool:
        # Before there is a lease of HBM all lie in host memory, of which a sixteenth is made free where it is full.
        media = [medium for medium, _ in index(node)]
        return media.count(MEDIA["hbm"]) >= media.count(MEDIA["host"])

    eventually("most blocks to be back in HBM", at_rest)
    before = names(node)
    node.kill_broker()
    node.start_broker(estate_ttl_ms=KEPT)
    eventually("the engine to be back", lambda: engine.ask("leased"))
    # The kind of memory may have changed: blocks go back to HBM whenever donors have room, also in a pause.
    eventually("the blocks to be back", lambda: names(node) >= before)
    assert pause(engine, node)


def test_a_reset_clears_all(engine, node) -> None:
    pause(engine, node)
    assert engine.ask("reset", connector=True)
    # Wherever they move: they are the node's to keep.
    old = names(node)
    assert believed(engine) == set() and engine.ask("events")["kinds"][-1] == "AllBlocksCleared"
    talk(engine, "after-the-reset")
    # What was stored before stays until there is need of its room. This engine finds it no more, and others do.
    assert pause(engine, node, old) and old & names(node)
