"""An engine whose KV cache is larger than its own memory, and everything that can be taken away from it. Its tokens are
those of an engine that has all of it itself. Tests run in the order of this file; the engine is started once.

A layer's block is 16 KiB. Of 127 blocks 31 are the engine's own; six slabs of 256 KiB for each of the four layers hold
the rest."""

from __future__ import annotations

import os
import signal

import lab as of
import pytest
from neighbours import Memory
from node import eventually
from told import ToldError

PAGE = 16 << 10
UNIT = 256 << 10
ROWS = 6
BLOCKS = 31 + ROWS * UNIT // PAGE
WINDOW = 80 * PAGE
OWN = {"kv_cache_memory_bytes": 2 * WINDOW + 32 * 4 * PAGE, "num_gpu_blocks_override": BLOCKS}
LONGEST = 2400
STITCHED = OWN | {"worker_cls": "swiftcache.vllm.StreamWorker", "max_model_len": LONGEST}
SETTINGS = {
    "stream_bytes": ROWS * 4 * UNIT,
    "stream_window_bytes": WINDOW,
    "device": "SIM-0",
    "max_leased_bytes": 8 << 20,
    "lease_step_bytes": 1 << 20,
    "load": "sync",
}
SLABS = 2 * ROWS * 4 + 32
"""Of a donor: enough for the stitched pool, and for the prefix cache."""


def short() -> dict[str, list[int]]:
    return {"short": of.tokens("short", 150)}


def long() -> dict[str, list[int]]:
    """63 blocks, twice what is local."""
    return {"long": of.tokens("long-context", 2000)}


def crowd() -> dict[str, list[int]]:
    """More than the pool holds at once."""
    return {f"crowd-{number}": of.tokens(f"crowd-{number}", 900) for number in range(4)}


def many(engine) -> dict[str, dict]:
    """Answers of which the last blocks are not to be had while all run: vLLM preempts."""
    return engine.generate(crowd(), 150)


def work(engine) -> dict[str, dict]:
    results = engine.generate(short(), of.ANSWER) | engine.generate(long(), of.ANSWER)
    engine.ask("settle")
    return results | many(engine)


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a", work, max_model_len=LONGEST, num_gpu_blocks_override=BLOCKS)


@pytest.fixture(scope="module")
def broker(node):
    node.start_broker()
    return node


@pytest.fixture(scope="module")
def donors(broker):
    return [broker.start_donor("SIM-1", SLABS, UNIT)]


@pytest.fixture(scope="module")
def engine(lab, node, want, donors):
    engine = lab.engine("a")
    of.connect(engine, node, wait=False, connector=SETTINGS, **STITCHED)
    yield engine
    engine.ask("stop")


def look(engine) -> dict:
    (found,) = engine.ask("stitched")
    return found


def again(engine, want, then=lambda: None, after: int = 3) -> dict[str, dict]:
    """The long context computed anew, with something done after some steps: eight prefill it, sixteen decode."""
    assert engine.ask("reset", connector=True)
    engine.ask("add", name="long", tokens=long()["long"], max_tokens=of.ANSWER)
    results = engine.ask("step", count=after)["finished"]
    then()
    return results | engine.finish()


def right(results, want) -> bool:
    return of.said(results).items() <= want.items()


def gone(donor) -> None:
    """The donor has all of its memory back."""
    donor.wait(120)


def test_stock_vllm_refuses_such_a_context(lab) -> None:
    own = {**OWN, "num_gpu_blocks_override": None, "kv_cache_memory_bytes": 32 * 4 * PAGE}
    with pytest.raises(ToldError, match="To serve at least one request"):
        lab.engine("b").start(**of.options(**own, max_model_len=LONGEST))


def refused(lab, node, **settings) -> str:
    """Why an engine with these settings does not start."""
    engine = lab.engine("b")
    engine.ask("patience", seconds=1)
    with pytest.raises(ToldError) as reason:
        of.connect(engine, node, wait=False, connector=SETTINGS | settings, **STITCHED)
    return str(reason.value).partition("; the end of its log")[0]


def test_without_a_broker_it_does_not_start(lab, node) -> None:
    assert "is swiftcache-broker running?" in refused(lab, node)


def test_without_a_donor_it_does_not_start(lab, broker) -> None:
    assert "no slab could be leased within 1s" in refused(lab, broker)


def test_with_slabs_that_are_too_large_it_does_not_start(lab, broker, donors) -> None:
    assert f"slabs on offer have {UNIT} bytes" in refused(lab, broker, stream_bytes=UNIT - 4096)
    assert "stream_bytes" in refused(lab, broker, stream_bytes=2 * UNIT)


def test_whoever_fits_locally_reads_nothing_from_neighbours(engine, want) -> None:
    found = look(engine)
    assert (found["blocks"], found["local_blocks"], found["laid_out"]) == (BLOCKS, 31, ROWS * 4)
    assert found["in_slabs"] == ROWS * 4 and found["floor_bytes"] >= ROWS * 4 * UNIT
    for _ in range(3):
        assert right(engine.generate(short(), of.ANSWER), want)
        engine.ask("reset")
    assert look(engine)["staged"] == 0


def test_status_shows_the_working_set_and_where_the_pool_is(node, engine) -> None:
    """Withdrawals below change it: `tests/tests/stream.rs` looks at that."""

    def pools() -> list[tuple[int, int, int]]:
        return [(pool["leased"], pool["spare"], pool["host"]) for pool in node.status()["pools"]]

    eventually("the pool to be shown", lambda: pools() == [(ROWS * 4 * UNIT, 0, 0)])
    leases = node.status()["leases"]
    assert sum(row["leased"] for row in leases if row["class"] == "working set") >= ROWS * 4 * UNIT


def test_tokens_are_those_of_an_engine_that_has_all_of_it(engine, want) -> None:
    engine.ask("rig", poison=True)
    assert engine.ask("reset", connector=True)
    assert of.said(work(engine)) == want
    assert look(engine)["staged"] >= 4 * 4 and engine.ask("held")["preemptions"] > 0


def test_stale_windows_would_show(engine, want) -> None:
    """The twin."""
    engine.ask("rig", stale=True)
    assert not right(again(engine, want), want)
    engine.ask("rig", poison=True)
    assert right(again(engine, want), want)


def test_prefixes_with_leased_homes_are_found_in_place_and_from_donors(engine, want) -> None:
    engine.ask("settle")
    for forget in (False, True):
        if forget:
            assert engine.ask("reset")
        results = engine.generate(long(), of.ANSWER)
        assert right(results, want) and of.cached(results) == (2000 - 1) // of.BLOCK * of.BLOCK
    assert engine.ask("stats")["hit_donor_blocks"] >= 62


def test_several_answers_and_an_abort(engine, want) -> None:
    engine.ask("add", name="twice", tokens=long()["long"], max_tokens=of.ANSWER, n=2)
    result = engine.finish()["twice"]
    assert [result["tokens"], *result["others"]] == [want["long"]] * 2
    engine.ask("reset", connector=True)
    engine.ask("add", name="doomed", tokens=long()["long"][::-1], max_tokens=of.ANSWER)
    engine.ask("step", count=6)
    engine.ask("abort", name="doomed")
    engine.ask("settle")
    assert engine.ask("reset"), "every block is free"


def test_every_slab_is_withdrawn_while_a_prompt_is_computed(engine, node, donors, want) -> None:
    before, old, kept = look(engine), donors[-1], Memory(donors[-1].pid)
    donors.append(node.start_donor("SIM-2", SLABS, UNIT))
    assert right(again(engine, want, lambda: node.withdraw(old)), want)
    gone(old)
    found = look(engine)
    assert found["moved_units"] >= before["moved_units"] + ROWS * 4 and found["revocations"] >= ROWS * 4
    assert kept.poison() >= ROWS * 4 * UNIT
    assert right(again(engine, want), want)


def test_every_slab_is_withdrawn_while_a_token_follows_another_and_there_is_no_room(engine, node, donors, want) -> None:
    old, kept = donors[-1], Memory(donors[-1].pid)

    def withdraw() -> None:
        node.withdraw(old)
        eventually("the pool to hear of it", lambda: look(engine)["to_vacate"] + look(engine)["on_floor"] > 0)

    assert right(again(engine, want, withdraw, after=12), want)
    gone(old)
    assert look(engine)["on_floor"] == ROWS * 4 and kept.poison() > 0
    assert right(again(engine, want), want), "all of it lies in host memory"


def test_when_room_comes_back_units_do(engine, node, donors, want) -> None:
    donors.append(node.start_donor("SIM-1", SLABS, UNIT))
    eventually("units to come back", lambda: look(engine)["in_slabs"] == ROWS * 4)
    assert right(again(engine, want), want)


def test_units_that_are_not_copied_would_show(engine, node, donors, want) -> None:
    """The twin of all withdrawals."""
    engine.ask("rig", uncopied=True)
    old = donors[-1]

    def withdraw() -> None:
        node.withdraw(old)
        eventually("the pool to hear of it", lambda: look(engine)["to_vacate"] + look(engine)["on_floor"] > 0)

    assert not right(again(engine, want, withdraw, after=12), want)
    gone(old)
    engine.ask("rig", poison=True)
    donors.append(node.start_donor("SIM-1", SLABS, UNIT))
    eventually("units to come back", lambda: look(engine)["in_slabs"] == ROWS * 4)


@pytest.mark.parametrize("unguarded", [False, True], ids=["guarded", "unguarded"])
def test_nothing_moves_while_a_forward_computes(engine, node, donors, want, unguarded) -> None:
    """The second case is the twin."""
    old = donors[-1]
    engine.ask("rig", withdraw=old.pid, unguarded=unguarded)
    results = again(engine, want)
    moved = look(engine)["inside"]
    assert moved > 0 if unguarded else moved == 0 and right(results, want)
    engine.ask("rig", poison=True)
    gone(old)
    donors.append(node.start_donor("SIM-1", SLABS, UNIT))
    eventually("units to come back", lambda: look(engine)["in_slabs"] == ROWS * 4)
    assert right(again(engine, want), want)


def test_a_donor_is_killed(engine, node, donors, want) -> None:
    old = donors[-1]
    donors.append(node.start_donor("SIM-2", SLABS, UNIT))

    def kill() -> None:
        os.kill(old.pid, signal.SIGKILL)
        old.wait()

    assert right(again(engine, want, kill, after=10), want)
    eventually("units to be elsewhere", lambda: not look(engine)["to_vacate"] and not look(engine)["nvlink_units"])
    assert right(again(engine, want), want)


def test_the_broker_is_killed_and_comes_back(engine, node, donors, want) -> None:
    assert right(again(engine, want, node.kill_broker, after=10), want)
    assert right(again(engine, want), want)
    node.start_broker()
    eventually("the pool to be connected", lambda: look(engine)["connected"] == 1)
    assert right(again(engine, want), want)
    # What it asks back now, it gets.
    old = donors[-1]
    node.withdraw(old)
    gone(old)
    assert right(again(engine, want), want)
