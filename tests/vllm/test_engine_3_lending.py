"""An engine that lends part of its own pool to others, and takes it back. Tests run in the order of this file.

The lender's pool is 256 blocks, of which 120 are never lent: what its longest request may need.
"""

from __future__ import annotations

import lab as of
import pytest
from donors import corrupt
from neighbours import Tenant
from node import eventually

LONGEST = 3744
"""Tokens: 117 blocks."""
LENDING = {"lend": 0.5, "lend_after_ms": 0, "lend_drain_ms": 500, "device": "SIM-1", "max_leased_bytes": 0}
RUN = 16
RUNS = 8


def small_talk() -> dict[str, list[int]]:
    return {f"small-{number}": of.tokens(f"small-{number}", 150) for number in range(2)}


def burst() -> dict[str, list[int]]:
    """More than the pool holds: 12 requests of 30 blocks each."""
    return {f"burst-{number}": of.tokens(f"burst-{number}", 29 * of.BLOCK) for number in range(12)}


def quiet_then_busy(engine) -> dict[str, dict]:
    return engine.generate(small_talk(), of.ANSWER) | engine.generate(burst(), of.ANSWER)


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a")


@pytest.fixture(scope="module")
def want_lender(lab):
    return lab.want("b", quiet_then_busy, max_model_len=LONGEST, seed=1)


@pytest.fixture(scope="module")
def lender(lab, node, want_lender):
    node.start_broker()
    engine = lab.engine("b")
    of.connect(engine, node, wait=False, connector=LENDING, max_model_len=LONGEST, seed=1)
    yield engine
    engine.ask("stop")


@pytest.fixture(scope="module")
def borrower(lab, node, want, lender):
    engine = lab.engine("a")
    lend(lender)
    of.connect(engine, node, connector={"device": "SIM-0", "load": "sync"})
    yield engine
    engine.ask("stop")


def lend(lender) -> None:
    """Steps the idle engine until it has lent everything."""

    def lent() -> bool:
        lender.ask("settle")
        if lender.ask("loans") == {"lent": RUNS, "returning": 0, "free": of.POOL - 1 - RUNS * RUN}:
            return True
        # It has stopped stepping for what others were slow to let go of: a request has it look again.
        nudge(lender)
        return False

    eventually("everything to be lent", lent)


def nudge(engine) -> None:
    results = engine.generate({"nudge": of.tokens("nudge", 40)}, 2)
    assert results["nudge"]["reason"] == "length"


def test_an_idle_engine_lends_and_its_tokens_are_the_same(lender, want_lender) -> None:
    lend(lender)
    eventually("the broker to know", lambda: lender.ask("stats")["lent_bytes"] > 0)
    results = lender.generate(small_talk(), of.ANSWER)
    assert of.said(results).items() <= want_lender.items()
    lend(lender)


def test_a_borrower_keeps_its_prefixes_there(borrower, want) -> None:
    first = of.play(borrower, between=lambda _: borrower.ask("reset"))
    borrower.ask("reset")
    second = of.play(borrower, between=lambda _: borrower.ask("reset"))
    assert of.said(first) == want and of.said(second) == want
    assert borrower.ask("stats")["hit_donor_blocks"] > 0
    assert borrower.ask("stats")["loaded_nvlink_bytes"] > 0, "from the lender's device"


def busy(engine, between=lambda: None) -> dict[str, dict]:
    """The burst, a few steps at a time."""
    for name, tokens in burst().items():
        engine.ask("add", name=name, tokens=tokens, max_tokens=of.ANSWER)
    results, left = {}, True
    while left:
        answer = engine.ask("step", count=4)
        results, left = results | answer["finished"], answer["left"]
        between()
    return results


def borrow(borrower) -> None:
    """Has it lease, if it has not."""
    borrower.ask("reset")
    borrower.generate({"nudge": of.tokens("nudge", 100)}, 2)
    eventually("a lease", lambda: borrower.ask("leased"))


def busy_until_whole(engine, node) -> dict[str, dict]:
    """As `busy`, and on the way the engine has its whole pool, and the broker knows."""
    offered = []

    def away() -> float:
        stats = engine.ask("stats")
        return stats["lent_bytes"] + stats["returning_bytes"]

    def look() -> None:
        loans = engine.ask("loans")
        if loans["lent"] == 0 and loans["returning"] > 0:
            # They let go at their own pace, and the burst could be over before.
            eventually("borrowers to let go", lambda: away() == 0)
            loans = engine.ask("loans")
        if not offered and loans["lent"] == loans["returning"] == 0:
            assert loans["free"] <= of.POOL - 1
            offered.append(node.status()["total"]["offered"])

    results = busy(engine, look)
    assert offered == [0], "the engine had its whole pool, and the broker knew"
    return results


def test_a_burst_takes_everything_back_and_borrowers_fall_back(lender, borrower, node, want, want_lender) -> None:
    def lent_and_taken_back() -> dict[str, dict]:
        lend(lender)
        borrow(borrower)
        second = Tenant(node)
        assert second.leased > 0 and borrower.ask("leased"), "two borrow at once"
        results = busy_until_whole(lender, node)
        second.end()
        return results

    results = of.matching(want_lender, lent_and_taken_back)
    assert all(result["reason"] == "length" for result in results.values())
    assert lender.ask("stats")["give_back_count"] >= RUNS
    borrower.ask("reset")
    missed = of.play(borrower, between=lambda _: borrower.ask("reset"))
    assert of.said(missed) == want
    assert borrower.ask("stats")["revocations"] > 0


def test_idle_again_it_lends_again(lender, borrower, want) -> None:
    lend(lender)
    borrow(borrower)
    for _ in range(2):
        borrower.ask("reset")
        before = borrower.ask("stats")["hit_donor_blocks"]
        assert of.said(of.play(borrower, between=lambda _: borrower.ask("reset"))) == want
    assert borrower.ask("stats")["hit_donor_blocks"] > before


def all_back(lender) -> bool:
    """Whether everything that was asked back is; a request now and then has the engine look."""
    nudge(lender)
    return lender.ask("loans")["returning"] == 0


def test_without_a_broker_the_engine_runs_on_what_it_has(lender, node, want_lender) -> None:
    lend(lender)
    eventually("the broker to know", lambda: node.status()["total"]["offered"] > 0)
    node.kill_broker()
    of.matching(want_lender, lambda: busy(lender))
    loans = lender.ask("loans")
    assert loans["returning"] > 0, "only a broker that knows who has it gives it back"
    node.start_broker()
    eventually("the broker to give it back", lambda: all_back(lender))
    of.matching(want_lender, lambda: busy(lender))


def stopped_borrower(lender, node) -> Tenant:
    """One that has leased something and cannot acknowledge anything."""
    lend(lender)
    tenant = Tenant(node)
    assert tenant.leased > 0
    tenant.stop()
    return tenant


def test_what_is_not_given_back_is_not_used_and_nobody_waits_for_it(lender, node, want_lender) -> None:
    tenant = stopped_borrower(lender, node)
    written = []
    # As if the borrower wrote on, all the time.
    of.matching(want_lender, lambda: busy(lender, lambda: written.append(corrupt(lender.pid))))
    assert max(written) > 0
    loans = lender.ask("loans")
    assert loans["returning"] > 0 and loans["free"] < of.POOL - 1, "what it holds is still away"
    # It dies, and what it held is the engine's again.
    tenant.kill()
    eventually("blocks of the dead", lambda: all_back(lender))
    of.matching(want_lender, lambda: busy(lender))


def test_blocks_used_before_they_are_given_back_would_show(lender, node, want_lender) -> None:
    """The twin: an engine that takes its blocks without waiting computes on what a borrower writes."""
    tenant = stopped_borrower(lender, node)
    assert lender.ask("reset")
    lender.ask("grab")
    wrong = busy(lender, lambda: corrupt(lender.pid))
    assert not of.said(wrong).items() <= want_lender.items()
    tenant.kill()
