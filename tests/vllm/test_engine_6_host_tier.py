"""Blocks in an engine's own host memory: found by vLLM's scheduler, loaded, and stored on donors when donors come.
Tests run in the order of this file.
"""

from __future__ import annotations

import lab as of
import pytest
from neighbours import donate
from node import eventually

TIER = {"load": "sync", "host_tier_bytes": 64 << 20}
PROMPT = of.long_prompt()
BLOCKS = (len(PROMPT["long"]) - 1) // of.BLOCK


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a")


@pytest.fixture(scope="module")
def engine(lab, node, want):
    node.start_broker()
    engine = lab.engine("a")
    start(engine, node, TIER)
    yield engine
    engine.ask("stop")


def start(engine, node, connector, workers: int = 1, **more) -> None:
    of.connect(engine, node, wait=False, connector=connector, **more)
    eventually("the workers' caches", lambda: engine.ask("stats")["open"] == workers)


def again(engine, want) -> dict[str, dict]:
    """The long prompt once more, with vLLM's own cache forgotten."""
    assert engine.ask("reset")
    results = engine.generate(PROMPT, of.ANSWER)
    assert of.said(results).items() <= want.items()
    return results


def found(engine, want) -> bool:
    """Whether all of it is found. The broker hears a moment later of what a worker keeps."""
    return of.cached(again(engine, want)) == BLOCKS * of.BLOCK


def test_without_donors_the_next_turn_hits_the_host_tier(engine, want) -> None:
    assert of.cached(again(engine, want)) == 0
    eventually("a hit", lambda: found(engine, want))
    assert engine.ask("reset")
    assert of.said(of.play(engine, between=lambda _: engine.ask("reset"))) == want
    stats = engine.ask("stats")
    assert stats["hit_host_blocks"] >= BLOCKS and stats["host_blocks"] >= BLOCKS
    assert stats["leases"] == stats["hit_donor_blocks"] == stats["failed_blocks"] == 0


def test_without_a_host_tier_nothing_is_kept_or_promised(lab, node, engine, want) -> None:
    """The twin. What the other engine keeps in its host memory is not for this one."""
    other = lab.engine("b")
    start(other, node, TIER | {"host_tier_bytes": 0})
    assert [of.cached(again(other, want)) for _ in range(3)] == [0, 0, 0]
    stats = other.ask("stats")
    assert stats["host_blocks"] == stats["hit_host_blocks"] == stats["failed_blocks"] == 0
    other.ask("stop")


def test_when_donors_come_it_is_stored_again_and_found_there(lab, node, engine, want) -> None:
    before = engine.ask("stats")
    donate(node)
    eventually("the blocks on donors", lambda: engine.ask("stats")["donor_blocks"] >= before["host_blocks"])
    stats = engine.ask("stats")
    assert stats["promoted_blocks"] >= BLOCKS
    eventually("a hit", lambda: found(engine, want))
    after = engine.ask("stats")
    assert after["hit_donor_blocks"] >= stats["hit_donor_blocks"] + BLOCKS
    # Its twin: another engine reads them there.
    other = lab.engine("b")
    of.connect(other, node, connector={"load": "sync"})
    eventually("a hit of another engine", lambda: found(other, want))
    assert other.ask("stats")["hit_shared_blocks"] >= BLOCKS
    other.ask("stop")


def test_a_block_counts_when_every_rank_has_it(lab, node) -> None:
    want = lab.want("b", **of.RANKS)
    engine = lab.engine("b")
    # Leasing nothing: what it keeps is in host memory, for each rank its own.
    start(engine, node, TIER | {"max_leased_bytes": 0, "share": False}, workers=2, **of.RANKS)
    assert of.cached(again(engine, want)) == 0
    eventually("a hit", lambda: found(engine, want))
    assert engine.ask("stats")["hit_host_blocks"] >= 2 * BLOCKS
    engine.ask("leave", rank=1)
    assert of.cached(again(engine, want)) == 0
    engine.ask("stop")
