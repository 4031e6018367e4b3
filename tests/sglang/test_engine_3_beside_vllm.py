"""SGLang and vLLM on one node: each keeps its prefixes in the same donor's memory, and SGLang in what vLLM lends of
its own pool. Neither ever finds the other's blocks. Tests run in the order of this file.
"""

from __future__ import annotations

import beside
import lab as of
import pytest
from node import eventually

RUNS = 8
"""Of its pool, that vLLM lends: half of 640 blocks, 20 MiB. vLLM borrows, too, and so the broker keeps half of them
for it."""
SETTINGS = {
    "max_leased_bytes": 4 * of.SLAB,
    "lease_step_bytes": of.SLAB,
    "lookup_ms": 60_000,
    "load": "sync",
    "device": "SIM-0",
    "lend": 0.5,
    "lend_after_ms": 0,
}


@pytest.fixture(scope="module")
def want(lab):
    return lab.want()


@pytest.fixture(scope="module")
def donors(node):
    node.start_broker()
    return [of.donate(node)]


@pytest.fixture(scope="module")
def sglang(lab, node, donors, want):
    engine = lab.engine("a")
    of.connect(engine, node, linker={"device": "SIM-2", "max_leased_bytes": 4 * of.SLAB})
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def vllm(node, donors, tmp_path_factory):
    engine = beside.engine(tmp_path_factory.mktemp("vllm") / "vllm.log")
    engine.start(**beside.options(), connector={"socket": node.socket} | SETTINGS, events=False)
    eventually("a lease", lambda: engine.ask("leased"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vllm_says(vllm) -> dict[str, list[int]]:
    """Cold: it has found nothing."""
    results = vllm.generate(of.evicting(), of.ANSWER)
    assert of.cached(results) == 0, "also not what SGLang has stored of the same model's same prompts"
    return of.said(results)


def sglang_finds(engine, want) -> None:
    def whole() -> bool:
        results = engine.generate(of.evicting(), of.ANSWER, at_once=False)
        of.right(results, want)
        return of.cached(results) == 5 * 448

    eventually("all that was pushed out to be found", whole)


def test_each_finds_its_own_in_the_same_donor(sglang, vllm, want, vllm_says) -> None:
    sglang_finds(sglang, want)
    assert vllm.ask("reset")
    results = vllm.generate(of.evicting(), of.ANSWER)
    assert of.said(results) == vllm_says and of.cached(results) == 5 * 448
    assert sglang.count("hit_shared_blocks") == vllm.ask("stats")["hit_shared_blocks"] == 0


def test_sglang_keeps_its_blocks_in_what_vllm_lends(sglang, vllm, node, donors, want) -> None:
    def lent() -> bool:
        vllm.generate({"nudge": of.tokens("nudge", 40)}, 2)
        vllm.ask("settle")
        return vllm.ask("loans")["lent"] == RUNS

    eventually("vLLM to lend", lent)
    node.withdraw(donors[-1])
    donors[-1].wait(120)
    of.right(sglang.generate(of.evicting(), of.ANSWER, at_once=False), want)
    eventually("a lease from vLLM", sglang.leased)
    sglang_finds(sglang, want)
    assert [donor["pid"] for donor in node.status()["donors"]] == [vllm.pid], "there is nowhere else"


def test_vllm_takes_its_memory_back_while_sglang_uses_it(sglang, vllm, want, vllm_says) -> None:
    burst = {f"burst-{number}": of.tokens(f"burst-{number}", 900) for number in range(14)}

    def busy() -> None:
        vllm.generate(burst, of.ANSWER)
        results = vllm.generate(of.evicting(), of.ANSWER)
        assert of.said(results) == vllm_says

    with of.Meanwhile(busy) as work:
        while not work.over:
            of.right(sglang.generate(of.evicting(), of.ANSWER, at_once=False), want)
    assert sglang.native("revocations") > 0, "nothing was taken back"
    of.right(sglang.generate(of.evicting(), of.ANSWER, at_once=False), want)
    assert sglang.count("aborted_loads") == 0
