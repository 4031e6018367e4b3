"""SwiftCache as the node's rung above LMCache, in vLLM's MultiConnector: LMCache's own server and connector, which copy
on the CPU here. Tokens are those of an engine without either. Tests run in the order of this file.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import lab as of
import pytest
from lmcache_server import serving
from neighbours import donate, withdrawn
from node import eventually

CHUNK = 256
"""Tokens that LMCache keeps together."""
LENGTH = 600
BLOCKS, CHUNKS = LENGTH // of.BLOCK, LENGTH // CHUNK
PROMPT = {"shared": of.tokens("above LMCache", LENGTH)}
HERE = {
    "PYTHONPATH": os.pathsep.join([str(of.HOME / "beside"), os.environ.get("PYTHONPATH", "")]),
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_LOG_LEVEL": "WARNING",
}
"""What LMCache and engines with it need."""


def above_lmcache(engine) -> dict[str, dict]:
    return engine.generate(PROMPT, of.ANSWER)


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a", above_lmcache)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[subprocess.Popen, int]]:
    log = tmp_path_factory.mktemp("lmcache") / "server.log"
    with serving(log, 0.25, "--supported-transfer-mode", "engine_driven", environment=HERE) as running:
        yield running


@pytest.fixture(scope="module")
def engine(lab, node, want, server):
    node.start_broker()
    donate(node)
    lmcache = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": server[1]},
    }
    engine = lab.engine("above LMCache", HERE)
    of.connect(engine, node, connector={"load": "sync"}, below=lmcache)
    yield engine
    lab.kill("above LMCache")


class Turn(NamedTuple):
    """Blocks that were found, and those of them that SwiftCache had."""

    cached: int
    hits: int


def turn(engine, want) -> Turn:
    """The prompt once more, with vLLM's own cache forgotten."""
    eventually("the engine to forget its prefixes", lambda: engine.ask("reset"))
    before = engine.ask("stats")
    result = above_lmcache(engine)["shared"]
    engine.ask("settle")
    after = engine.ask("stats")
    assert result["tokens"] == want["shared"] and after["failed_blocks"] == before["failed_blocks"]
    return Turn(result["cached"] // of.BLOCK, after["hit_donor_blocks"] - before["hit_donor_blocks"])


BELOW = Turn(CHUNKS * CHUNK // of.BLOCK, 0)


def test_swiftcache_is_first(engine, want) -> None:
    assert turn(engine, want) == Turn(0, 0)
    assert turn(engine, want) == Turn(BLOCKS, BLOCKS)


def test_what_the_node_has_lost_comes_from_lmcache_and_stays_on_the_node(engine, node, want) -> None:
    withdrawn(node)
    # LMCache stores when it comes to it.
    eventually("LMCache to have the prompt", lambda: turn(engine, want) == BELOW)
    donate(node)
    eventually("a lease", lambda: engine.ask("leased"))
    assert turn(engine, want) == BELOW
    assert turn(engine, want) == Turn(BLOCKS, BLOCKS), "what is loaded below is kept above"


def test_a_killed_lmcache_costs_its_hits_only(engine, node, want, server) -> None:
    server[0].kill()
    server[0].wait()
    assert turn(engine, want) == Turn(BLOCKS, BLOCKS)
    withdrawn(node)
    # The twin: nobody has it now.
    assert turn(engine, want) == Turn(0, 0)
