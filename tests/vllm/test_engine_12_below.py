"""SwiftCache as the node's rung of a store that several nodes share: above vLLM's OffloadingConnector, over files, in
vLLM's MultiConnector. Tokens are those of an engine without either. Tests run in the order of this file.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import lab as of
import pytest
from neighbours import donate, withdrawn
from node import Node, eventually

PROMPT = {"shared": of.tokens("shared", 420)}
BLOCKS = 420 // of.BLOCK


def ask_once(engine) -> dict[str, dict]:
    return engine.generate(PROMPT, of.ANSWER)


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a", ask_once)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("below")


def below(directory: Path) -> dict:
    """The store below: vLLM's connector, over these files."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "Directory",
            "spec_module_path": "below",
            "directory": str(directory),
        },
    }


@pytest.fixture(scope="module")
def engine(lab, node, want, directory):
    node.start_broker()
    donate(node)
    engine = lab.engine("a")
    of.connect(engine, node, connector={"load": "sync"}, below=below(directory), disable_log_stats=False)
    yield engine
    engine.ask("stop")


class Turn:
    """The prompt once more, with vLLM's own cache forgotten, and who did what for it."""

    def __init__(self, engine, want) -> None:
        assert engine.ask("reset")
        before = self._look(engine)
        result = ask_once(engine)["shared"]
        engine.ask("settle")
        after = self._look(engine)
        assert result["tokens"] == want["shared"]
        self.cached = result["cached"] // of.BLOCK
        did = {name: after[name] - before.get(name, 0) for name in after}
        self.hits, self.stored, self.failed = did["hit_donor_blocks"], did["stored_blocks"], did["failed_blocks"]
        self.asked, self.read, self.written = did.get("asked", 0), did.get("read", 0), did.get("written", 0)

    @staticmethod
    def _look(engine) -> dict[str, float]:
        return engine.ask("stats") | engine.ask("below")


def files(directory: Path) -> int:
    return sum(1 for _ in directory.iterdir())


def test_what_is_computed_is_stored_once_in_each(engine, node, want, directory) -> None:
    first = Turn(engine, want)
    # The answer's blocks are SwiftCache's: vLLM's offloading takes prompts.
    assert first.cached == 0 and first.written == files(directory) == BLOCKS
    assert len(node.index()) == first.stored == (420 + of.ANSWER - 1) // of.BLOCK
    again = Turn(engine, want)
    assert (again.stored, again.written) == (0, 0), "nothing is stored twice"


def test_swiftcache_is_first_and_spares_the_store_below(engine, want) -> None:
    turn = Turn(engine, want)
    assert (turn.cached, turn.hits, turn.read) == (BLOCKS, BLOCKS, 0)
    assert turn.asked > 0, "vLLM asks every connector, whoever answers"


def test_what_the_node_has_lost_comes_from_below_and_stays_on_the_node(engine, node, want) -> None:
    withdrawn(node)
    turn = Turn(engine, want)
    assert (turn.cached, turn.hits, turn.read) == (BLOCKS, 0, BLOCKS)
    donate(node)
    eventually("a lease", lambda: engine.ask("leased"))
    turn = Turn(engine, want)
    assert (turn.cached, turn.read) == (BLOCKS, BLOCKS) and turn.stored >= BLOCKS, "what is loaded below is kept above"
    turn = Turn(engine, want)
    assert (turn.cached, turn.hits, turn.read) == (BLOCKS, BLOCKS, 0)


def test_a_store_below_that_has_lost_all_costs_its_hits_only(engine, want, directory) -> None:
    for file in directory.iterdir():
        file.unlink()
    turn = Turn(engine, want)
    assert (turn.cached, turn.hits, turn.read, turn.failed) == (BLOCKS, BLOCKS, 0, 0)


def test_a_broker_that_is_away_costs_no_hit_below(engine, node, want, directory) -> None:
    assert files(directory) == BLOCKS, "what SwiftCache has loaded is kept below again"
    donors = [donor["pid"] for donor in node.status()["donors"]]
    node.kill_broker()
    for donor in donors:
        os.kill(donor, signal.SIGKILL)
    turn = Turn(engine, want)
    assert turn.cached == BLOCKS and turn.hits + turn.read >= BLOCKS
    node.start_broker()
    donate(node)
    eventually("the engine to be back", lambda: engine.ask("leased"))
    assert Turn(engine, want).cached == BLOCKS


def test_metrics_are_apart(engine) -> None:
    names = engine.ask("metrics")
    ours = {name for name in names if name.startswith("vllm:swiftcache")}
    assert ours and any(name.startswith("vllm:kv_offload") for name in names)


def test_another_node_finds_what_this_one_has_stored(lab, engine, want, directory, tmp_path) -> None:
    """A rack: two nodes, each with a broker and donors, over one store."""
    other = Node(tmp_path)
    other.start_broker()
    donate(other)
    engine_there = lab.engine("b")
    of.connect(engine_there, other, connector={"load": "sync"}, below=below(directory), disable_log_stats=False)
    first = Turn(engine_there, want)
    assert (first.cached, first.hits, first.read) == (BLOCKS, 0, BLOCKS)
    second = Turn(engine_there, want)
    assert (second.cached, second.hits, second.read, second.written) == (BLOCKS, BLOCKS, 0, 0)
    # The twin: without the store below, the other node computes it.
    engine_there.ask("stop")
    shutil.rmtree(directory)
    directory.mkdir()
    of.connect(engine_there, other, connector={"load": "sync", "salt": "alone"}, below=below(directory))
    assert Turn(engine_there, want).cached == 0
    engine_there.ask("stop")
    other.close()
