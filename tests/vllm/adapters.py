"""Tiny LoRA adapters with random weights, for the tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

from models import SHAPE

RANK = 8


def make(directory: Path, seed: int) -> Path:
    """Makes an adapter unless it is there. Returns its directory."""
    if (directory / "adapter_config.json").exists():
        return directory
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(seed)
    hidden, kv = SHAPE["hidden_size"], SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    tensors = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("v_proj", kv)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn((RANK, hidden), generator=source) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn((out, RANK), generator=source) * 0.3
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
