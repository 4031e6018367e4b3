"""Tiny models with random weights, made here: nothing is downloaded, and the same seed gives the same weights."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 512
SCALE = 4.0
"""Weights at their usual 0.02 give near-uniform logits, and greedy decoding would sit on a knife edge."""

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
"""For measurements: enough to compute that a prefix is worth loading."""

WINDOW = 64
HYBRID = {
    "gemma3": {
        "num_hidden_layers": 6,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptoss": {
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "llama4": {
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "intermediate_size_mlp": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "qwen3next": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
}
"""Models of several KV cache groups."""

PICTURE, PICTURE_TOKENS = 56, 8
"""The side of an image in pixels, and the tokens that it is in a prompt."""

SIZES = {
    "wide": WIDE,
    "mtp": {"num_nextn_predict_layers": 1},
    # For two ranks: each has a head of every kind.
    "pair": {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
}


def make(kind: str, directory: Path, seed: int = 0) -> Path:
    """Makes a model unless it is there. Returns its directory."""
    target = directory / f"{kind}-{seed}"
    kind, _, size = kind.partition("-")
    done = target / "made.json"
    if done.exists():
        return target
    import torch

    torch.manual_seed(seed)
    if kind == "eagle":
        _head(target)
    elif kind == "blip2":
        _sees(target)
    else:
        _says(target, kind, size)
        if size == "mtp":
            _foretells(target)
    done.write_text(json.dumps({"kind": kind, "seed": seed}))
    return target


def _says(target: Path, kind: str, size: str) -> None:
    import transformers

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "gptoss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
        "llama4": (transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
        "qwen3next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    }[kind]
    shape = SHAPE | HYBRID.get(kind, {}) | SIZES.get(size, {})
    _save(model_class(config_class(**shape)), target)


def _save(model: Any, target: Path) -> None:
    import torch

    model = model.to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SCALE)
    model.save_pretrained(target)


def _sees(target: Path) -> None:
    """A model that sees images: BLIP-2, one of the few whose code in vLLM does without torchvision. An image is the
    first tokens of its prompt."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    image = VOCABULARY - 1
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=SHAPE["hidden_size"],
        word_embed_proj_dim=SHAPE["hidden_size"],
        ffn_dim=SHAPE["intermediate_size"],
        num_hidden_layers=SHAPE["num_hidden_layers"],
        num_attention_heads=SHAPE["num_attention_heads"],
        max_position_embeddings=SHAPE["max_position_embeddings"],
        pad_token_id=0,
    )
    config = transformers.Blip2Config(
        vision_config=small | {"image_size": PICTURE, "patch_size": PICTURE // 4},
        qformer_config=small | {"encoder_hidden_size": 64, "vocab_size": VOCABULARY},
        text_config=text.to_dict(),
        num_query_tokens=PICTURE_TOKENS,
        image_token_index=image,
    )
    _save(transformers.Blip2ForConditionalGeneration(config), target)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(image)} | {"<image>": image}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"])
    images = BlipImageProcessorPil(size={"height": PICTURE, "width": PICTURE})
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=PICTURE_TOKENS).save_pretrained(target)


def picture(seed: int) -> Any:
    """An image of noise."""
    from PIL import Image

    side = (PICTURE, PICTURE)
    return Image.frombytes("RGB", side, random.Random(seed).randbytes(3 * PICTURE * PICTURE))


def _foretells(target: Path) -> None:
    """Adds a layer that guesses the token after the next to a model: a copy of its last one, as far as vLLM has it."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, hidden = load_file(target / "model.safetensors"), SHAPE["hidden_size"]
    last = f"model.layers.{SHAPE['num_hidden_layers'] - 1}."
    tensors |= {
        name.replace(last, "mtp.layers.0."): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)
    }
    tensors["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden) * 0.02 * SCALE
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        tensors[f"mtp.{name}.weight"] = torch.zeros(hidden)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def _head(target: Path) -> None:
    """A draft model for the tiny Llama: an EAGLE head, which guesses badly."""
    import torch
    from safetensors.torch import save_file

    hidden, wide, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    heads, kv = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    shapes = {
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (heads * head, hidden),
        "layers.0.self_attn.k_proj": (kv * head, hidden),
        "layers.0.self_attn.v_proj": (kv * head, hidden),
        "layers.0.self_attn.o_proj": (hidden, heads * head),
        "layers.0.mlp.gate_proj": (wide, hidden),
        "layers.0.mlp.up_proj": (wide, hidden),
        "layers.0.mlp.down_proj": (hidden, wide),
    }
    tensors = {f"{name}.weight": torch.randn(shape) * 0.02 * SCALE for name, shape in shapes.items()}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = SHAPE | {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(make(name, Path(sys.argv[1])))
