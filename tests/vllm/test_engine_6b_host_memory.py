"""Host memory that a donor lends: the only memory there is for blocks, found by vLLM's scheduler, loaded, shared by two
engines of one model. Tests run in the order of this file.
"""

from __future__ import annotations

import lab as of
import pytest
from neighbours import donate, withdrawn
from node import eventually

SETTINGS = {"load": "sync", "max_host_leased_bytes": 128 << 20}
PROMPT = of.long_prompt()
BLOCKS = (len(PROMPT["long"]) - 1) // of.BLOCK


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a")


@pytest.fixture(scope="module")
def engine(lab, node, want):
    node.start_broker()
    donate(node, device="HOST-0")
    engine = lab.engine("a")
    of.connect(engine, node, wait=False, connector=SETTINGS)
    eventually("leased host memory", lambda: engine.ask("stats").get("host_leased_bytes", 0))
    yield engine
    engine.ask("stop")


def again(engine, want) -> dict[str, dict]:
    """The long prompt once more, with vLLM's own cache forgotten."""
    assert engine.ask("reset")
    results = engine.generate(PROMPT, of.ANSWER)
    assert of.said(results).items() <= want.items()
    return results


def found(engine, want) -> bool:
    return of.cached(again(engine, want)) == BLOCKS * of.BLOCK


def test_a_prefix_that_lies_in_host_memory_only_is_found_and_the_tokens_are_the_same(engine, node, want) -> None:
    assert of.cached(again(engine, want)) == 0
    eventually("a hit", lambda: found(engine, want))
    assert engine.ask("reset")
    assert of.said(of.play(engine, between=lambda _: engine.ask("reset"))) == want
    stats = engine.ask("stats")
    assert stats["hit_host_blocks"] >= BLOCKS and stats["loaded_host_bytes"] > 0
    assert stats["leased_bytes"] == stats["hit_donor_blocks"] == stats["failed_blocks"] == 0
    [lent] = [device for device in node.status()["devices"] if device["uuid"] == "HOST-0"]
    assert lent["account"]["leased"] > 0


def test_another_engine_of_the_model_uses_the_same_copy(lab, engine, node, want) -> None:
    before = node.status()["indexed_blocks"]
    other = lab.engine("b")
    of.connect(other, node, wait=False, connector=SETTINGS)
    eventually("a hit of another engine", lambda: found(other, want))
    stats = other.ask("stats")
    assert stats["hit_shared_blocks"] >= BLOCKS and stats["failed_blocks"] == 0
    # The answer's last block may be new. What both have is there once.
    assert node.status()["indexed_blocks"] <= before + 1
    other.ask("stop")


def test_without_leave_to_lease_it_nothing_is_stored(lab, engine, node) -> None:
    """The twin: an engine of another model, which finds nothing of what is there, and may lease no host memory."""
    other = lab.engine("b")
    settings = SETTINGS | {"max_host_leased_bytes": 0, "salt": "another"}
    of.connect(other, node, wait=False, connector=settings)
    eventually("the worker's cache", lambda: other.ask("stats").get("open"))
    for _ in range(3):
        assert other.ask("reset")
        assert of.cached(other.generate(PROMPT, of.ANSWER)) == 0
    stats = other.ask("stats")
    assert stats["host_leased_bytes"] == stats["host_blocks"] == 0
    other.ask("stop")


def test_a_donor_that_leaves_costs_hits_only(engine, node, want) -> None:
    withdrawn(node)
    assert of.cached(again(engine, want)) == 0
    assert engine.ask("stats")["host_leased_bytes"] == 0
