"""An engine is killed and started again: what it had stored is found. Its tokens are those of an engine without
SwiftCache.
"""

from __future__ import annotations

import os
import signal

import lab as of
import pytest
from neighbours import SLAB, Tenant, donate
from node import KEPT, Node, eventually
from test_engine_3_lending import nudge


@pytest.fixture
def bare_node(tmp_path):
    one = Node(tmp_path)
    yield one
    one.close()


def prompts() -> dict[str, list[int]]:
    return of.shared_prefix() | of.long_prompt()


def whole_blocks() -> int:
    """Blocks of all prompts but for the part that is always computed."""
    return sum((len(prompt) - 1) // of.BLOCK for prompt in prompts().values())


@pytest.mark.parametrize("ttl_ms", [KEPT, 0], ids=["kept", "not-kept"])
def test_an_engine_killed_and_started_again_comes_back_warm(lab, bare_node, ttl_ms) -> None:
    want = lab.want("killed")
    bare_node.start_broker(estate_ttl_ms=ttl_ms)
    donate(bare_node)
    offered = 16 * SLAB
    eventually("all that the donor lends", lambda: bare_node.status()["total"]["offered"] == offered)
    first = lab.engine("killed")
    # One that nothing is left of lends, too, to somebody who has it when the engine is killed.
    lending = {} if ttl_ms else {"lend": 0.5, "lend_after_ms": 0, "device": "SIM-0"}
    of.connect(first, bare_node, connector={"load": "sync"} | lending)
    assert of.said(first.generate(prompts(), of.ANSWER)).items() <= want.items()
    first.ask("settle")
    tenant = None
    if lending:

        def lends() -> bool:
            nudge(first)
            first.ask("settle")
            return bare_node.status()["total"]["offered"] > offered

        eventually("loans", lends)
        tenant = Tenant(bare_node)
        assert tenant.leased > 0
    # In the middle of a request, which stores as it goes.
    first.ask("add", name="last", tokens=of.tokens("last", 400), max_tokens=of.ANSWER)
    first.ask("step", count=2)
    lab.kill("killed")
    if ttl_ms:
        eventually("an estate", lambda: bare_node.status()["total"]["estate"])
    else:
        eventually("what it lent to be gone", lambda: bare_node.status()["total"]["offered"] == offered)
        tenant.end()
        eventually("all to be free", lambda: not bare_node.status()["total"]["leased"])
        assert bare_node.status()["total"]["zombie"] == 0
    second = lab.engine("b")
    of.connect(second, bare_node, connector={"load": "sync"})
    results = second.generate(prompts(), of.ANSWER)
    assert of.said(results).items() <= want.items()
    if ttl_ms:
        assert of.cached(results) // of.BLOCK == whole_blocks()
        eventually("it to inherit", lambda: bare_node.status()["counters"]["inherited_leases"])
    else:
        # The twin: only what the four have in common, and find in vLLM's own cache.
        assert of.cached(results) <= 4 * 200
    second.ask("stop")


def test_two_ranks_come_back_warm_where_each_has_an_heir(lab, bare_node) -> None:
    """They are killed, both at once, and started again; then stopped, and started again without what one has left."""
    want = lab.want("b", **of.RANKS)
    bare_node.start_broker(estate_ttl_ms=KEPT)
    donate(bare_node)

    def namespaces(borrower: str) -> set[str]:
        return {row["namespace"] for row in bare_node.status()["leases"] if row["borrower"].startswith(borrower)}

    def answers(engine) -> int:
        """Checks its tokens. Returns how many blocks of all prompts were found."""
        results = engine.generate(prompts(), of.ANSWER)
        assert of.said(results).items() <= want.items()
        return of.cached(results) // of.BLOCK

    first = lab.engine("killed")
    of.connect(first, bare_node, connector={"load": "sync"}, **of.RANKS)
    cold = answers(first)
    assert cold < whole_blocks()
    first.ask("settle")
    ranks = {worker["namespace"] for worker in first.ask("held")["workers"]}
    first.ask("add", name="last", tokens=of.tokens("last", 400), max_tokens=of.ANSWER)
    first.ask("step", count=2)
    pids = {row["pid"] for row in bare_node.status()["leases"]}
    assert len(pids) == len(ranks) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    lab.kill("killed")
    eventually("an estate of each", lambda: namespaces("(gone)") == ranks)

    second = lab.engine("b")
    of.connect(second, bare_node, connector={"load": "sync"}, **of.RANKS)
    assert answers(second) == whole_blocks()
    eventually("both to inherit", lambda: not namespaces("(gone)") and namespaces("") == ranks)

    second.ask("stop")
    eventually("an estate of each, again", lambda: namespaces("(gone)") == ranks)
    bare_node.drop("forget", max(ranks))
    assert namespaces("(gone)") == {min(ranks)}
    of.connect(second, bare_node, connector={"load": "sync"}, **of.RANKS)
    assert answers(second) == cold, "what one rank has is no block"
    second.ask("settle")
    assert second.ask("reset")
    assert answers(second) == whole_blocks(), "beside what is inherited, the other rank has stored its own"
    second.ask("stop")
