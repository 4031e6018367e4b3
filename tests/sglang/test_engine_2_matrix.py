"""The same tokens in every way an engine can be run: each configuration against itself without SwiftCache, with donors
that withdraw and loads that are refused, on one rank only where there are several.
"""

from __future__ import annotations

import json

import lab as of
import pytest
from node import eventually

RANKS = {"tp_size": 2, "disable_custom_all_reduce": True, "environment": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}}
CONFIGURATIONS = {
    "qwen3-32": {"kind": "qwen3", "page": 32},
    "llama-64": {"page": 64},
    "llama-16-wait": {"linker": {"load": "wait"}},
    "llama-16-bfloat16": {"dtype": "bfloat16"},
    "llama-16-two-ranks": RANKS,
}


@pytest.fixture(scope="module")
def donors(node):
    node.start_broker()
    return [of.donate(node, slabs=32)]


def ask(engine) -> dict[str, dict]:
    """One after the other: each pushes an earlier one out of the pool."""
    return engine.generate(of.evicting(), of.ANSWER, at_once=False)


def without(lab, configuration) -> dict[str, list[int]]:
    plain = {name: value for name, value in configuration.items() if name not in ("linker", "environment")}
    with lab.engine("plain").running(configuration.get("environment"), **of.options(**plain)) as engine:
        return of.said(ask(engine))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens(lab, node, donors, name) -> None:
    configuration = CONFIGURATIONS[name]
    page = configuration.get("page", 16)
    want = without(lab, configuration)
    engine = lab.engine("a")
    of.connect(engine, node, **configuration)

    def played() -> dict[str, dict]:
        results = ask(engine)
        of.right(results, want)
        return results

    def whole() -> bool:
        return of.cached(played()) == sum((len(prompt) - 1) // page * page for prompt in of.evicting().values())

    played()
    eventually("all that was pushed out to be found", whole)
    ranks = engine.ranks()
    assert len(ranks) == configuration.get("tp_size", 1)
    assert all(rank["counts"]["hit_donor_blocks"] > 0 and rank["native"]["failed_blocks"] == 0 for rank in ranks)
    # The first load shows that forwards wait for layers; the others are left to them, unless that is switched off.
    layer_wise = [rank["counts"]["layer_wise_loads"] > 0 for rank in ranks]
    assert layer_wise == [name != "llama-16-wait"] * len(ranks)

    # On the last rank only. The others were ready, and let go of what they had begun.
    engine.tell("refuse", rank=len(ranks) - 1, loads=2)
    assert of.cached(played()) == 3 * ((450 - 1) // page * page)
    assert [rank["refused_here"] for rank in engine.ranks()] == [0] * (len(ranks) - 1) + [2]
    assert [rank["counts"]["failed_loads"] for rank in engine.ranks()] == [2] * len(ranks)

    # A withdrawal while it works, and what is found after it.
    with of.Meanwhile(lambda: [played() for _ in range(2)]):
        donors.append(of.donate(node, slabs=32))
        node.withdraw(donors[-2])
        donors[-2].wait(120)
    eventually("a lease", engine.leased)
    played()
    eventually("all that was pushed out to be found", whole)
    assert engine.count("aborted_loads") == engine.count("unwaited_batches") == 0
    engine.stop()


def adapter(lab, name: str, seed: int) -> str:
    """A LoRA adapter of random weights for the tiny Llama."""
    import torch
    from safetensors.torch import save_file

    directory = of.HOME / "models" / f"adapter-{name}"
    directory.mkdir(parents=True, exist_ok=True)
    shape, rank = of.models.SHAPE, 4
    heads = {"q_proj": "num_attention_heads", "v_proj": "num_key_value_heads"}
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        for part, count in heads.items():
            out = shape[count] * shape["head_dim"]
            place = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            weights[f"{place}.lora_A.weight"] = torch.randn(rank, shape["hidden_size"], generator=source)
            weights[f"{place}.lora_B.weight"] = torch.randn(out, rank, generator=source)
    save_file(weights, directory / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": list(heads), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": of.model()}))
    return str(directory)


def test_adapters_never_find_each_other(lab, node, donors) -> None:
    engine = lab.engine("a")
    adapters = [f"{name}={adapter(lab, name, seed)}" for seed, name in enumerate(["one", "two"])]
    lora = {"enable_lora": True, "lora_paths": adapters, "lora_backend": "torch_native", "max_loras_per_batch": 2}
    of.connect(engine, node, **lora)
    known = engine.ranks()[0]["facts"]["model"]["adapters"]
    assert [path for path, _ in known] == [path.partition("=")[2] for path in adapters] and all(known[0][1])
    prompt = {"prompt": of.tokens("adapted", 400)}

    def said(name: str | None) -> tuple[list[int], int]:
        # Other prompts between: what is found now comes from donors.
        engine.generate(of.evicting(), 1, at_once=False)
        result = engine.generate(prompt, of.ANSWER, lora=name)
        assert of.failed(result) == []
        return result["prompt"]["tokens"], of.cached(result)

    first = {name: said(name) for name in (None, "one", "two")}
    assert [cached for _, cached in first.values()] == [0, 0, 0]
    assert len({tuple(tokens) for tokens, _ in first.values()}) == 3, "the adapters change what is said"
    for name, (tokens, _) in first.items():
        assert said(name) == (tokens, 384)
    engine.stop()
