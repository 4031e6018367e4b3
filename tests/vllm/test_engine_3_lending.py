"""An engine that lends part of its own pool to others, and takes it back. Tests run in the order of this file.

The lender's pool is 256 blocks, of which 120 are never lent: what its longest request may need.
"""

from __future__ import annotations

import lab as of
import pytest
from node import eventually

LONGEST = 3744
"""Tokens: 117 blocks."""
LENDING = {"lend": 0.5, "lend_after_ms": 0, "lend_drain_ms": 2000, "device": "SIM-1", "max_leased_bytes": 0}
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
    assert lender.ask("settle") is not None
    assert lender.ask("loans") == {"lent": RUNS, "returning": 0, "free": of.POOL - 1 - RUNS * RUN}


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
