"""The same tokens in every way an engine can be run. Each configuration runs once without SwiftCache and once with,
in one process: cold, and again with vLLM's own cache forgotten.
"""

from __future__ import annotations

import lab as of
import pytest
import torch
from neighbours import donate
from node import eventually

SYNC, ASYNC = {"load": "sync"}, {"load": "async"}

CONFIGURATIONS = {
    "llama-float32-async": {"connector": ASYNC},
    "llama-bfloat16-sync": {"dtype": "bfloat16", "connector": SYNC},
    "qwen3-float32-sync": {"model": "qwen3", "connector": SYNC},
    "qwen3-bfloat16-async": {"model": "qwen3", "dtype": "bfloat16", "connector": ASYNC},
    "llama-fp8-async": {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "connector": ASYNC},
    "llama-chunks-sync": {"max_num_batched_tokens": 96, "connector": SYNC},
    "llama-tiny-pool-sync": {"num_gpu_blocks_override": 48, "max_model_len": 1024, "connector": SYNC},
    "llama-tiny-pool-async": {"num_gpu_blocks_override": 48, "max_model_len": 1024, "connector": ASYNC},
    "llama-compiled-sync": {"enforce_eager": False, "connector": SYNC},
    "llama-two-ranks-sync": {**of.RANKS, "connector": SYNC},
}


@pytest.fixture(scope="module")
def donor(node):
    node.start_broker()
    return donate(node, slabs=32)


def believed(engine) -> set[str]:
    return {name for _, name in engine.ask("events")["known"]}


def indexed(engine, node) -> set[str]:
    """The blocks of which every rank's part is in donors' memory."""
    ranks = {worker["namespace"] for worker in engine.ask("held")["workers"]}
    return set.intersection(*({name for _, name in node.index(rank)} for rank in ranks))


def crowd() -> dict[str, list[int]]:
    """More than a tiny pool holds at once."""
    return {f"crowd-{number}": of.tokens("crowd", 64) + of.tokens(f"c{number}", 250) for number in range(5)}


def work(engine) -> dict[str, dict]:
    """Longer answers for the crowd: requests run out of blocks while they decode."""
    results = of.play(engine)
    # Blocks that are still being stored would make it another crowd in another pool.
    engine.ask("settle")
    return results | engine.generate(crowd(), 90)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens(lab, node, donor, name) -> None:
    # As vLLM finds out. On other CPUs it refuses to start.
    computes_fp8 = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
    if "fp8" in name and not computes_fp8:
        pytest.skip("vLLM keeps fp8 KV on CPUs with AVX-512 or AMX only")
    configuration = dict(CONFIGURATIONS[name])
    connector = configuration.pop("connector")
    tiny = "tiny" in name
    do = work if tiny else of.play
    # Where the end of a load or of a store decides which requests share a step.
    rounds = 2 if tiny or "async" in name else 1
    want = lab.want("b", do, **configuration)
    engine = lab.engine("b")
    # Where blocks are published late, and where every rank has to have them.
    events = "async" in name or "ranks" in name
    of.connect(engine, node, events=events, connector=connector, **configuration)

    found = []

    def played() -> dict[str, dict]:
        assert engine.ask("reset")
        results = do(engine)
        assert results.keys() == want.keys()
        found.append(of.cached(results))
        return results

    of.matching(want, played, rounds)  # cold
    of.matching(want, played, rounds)  # warm
    assert found[-1] >= found[0] + 1000, "what was stored was found"

    stats = engine.ask("stats")
    ranks = configuration.get("tensor_parallel_size", 1)
    assert stats["hit_donor_blocks"] >= ranks * 30
    engine.ask("settle")
    held = engine.ask("held")
    assert (held["tracked"], held["jobs"]) == (0, 0)
    assert all(worker["storing"] == worker["receiving"] == 0 for worker in held["workers"])
    assert len({worker["namespace"] for worker in held["workers"]}) == ranks
    assert (held["preemptions"] > 0) == tiny
    if events:
        eventually("events to say what every rank has", lambda: believed(engine) == indexed(engine, node) != set())
        assert set(engine.ask("events")["kinds"]) == {"BlockStored"}

    # A load of which blocks are gone, in this configuration too.
    def robbed() -> dict[str, dict]:
        assert engine.ask("reset")
        engine.ask("lose", positions=[0, 2])
        return engine.generate(of.shared_prefix(), of.ANSWER)

    of.matching(want, robbed, rounds)
    assert all(worker["spoiled"] in (2, 2 * rounds) for worker in engine.ask("held")["workers"])
    engine.ask("stop")
