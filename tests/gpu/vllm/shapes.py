"""Models of real shapes with made-up weights: a configuration is all that vLLM needs for `load_format="dummy"`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
"""What the shapes of this family share, from the models' published config.json."""

GPT_OSS_LAYERS = ["sliding_attention", "full_attention"] * 12
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 201088,
}
GEMMA3_LAYERS = (["sliding_attention"] * 5 + ["full_attention"]) * 5
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
QWEN3_NEXT_LAYERS = (["linear_attention"] * 3 + ["full_attention"]) * 12
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 10,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
GRANITE4_LAYERS = (["mamba"] * 5 + ["attention"]) * 2
GRANITE4 = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 512,
    "logits_scaling": 6,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 48,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "normalization_function": "rmsnorm",
    "num_attention_heads": 12,
    "num_experts_per_tok": 6,
    "num_key_value_heads": 4,
    "num_local_experts": 64,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "shared_intermediate_size": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}
DEEPSEEK_V32 = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "attention_bias": False,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
TINY = {
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    # The same without normalized queries and keys.
    "llama-0.6b": QWEN3
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    # As large as LWM-7B, in which every head has keys of its own: 512 KiB of KV a token. Its queries and keys are
    # normalized: without, attention with made-up weights is so sharp that a rounding may choose another key.
    "qwen3-7b-mha": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    # gpt-oss-20b with half of its layers and a quarter of its experts, in bf16.
    "gpt-oss": GPT_OSS | {"num_hidden_layers": 12, "layer_types": GPT_OSS_LAYERS[:12], "num_local_experts": 8},
    # Gemma 3 1B. Its logits are not its embeddings: with made-up weights it would say its last token for ever.
    "gemma3": GEMMA3 | {"num_hidden_layers": 26, "layer_types": GEMMA3_LAYERS[:26]},
    # Qwen3-Next-80B-A3B with a sixth of its layers and an eighth of its experts.
    "qwen3-next": QWEN3_NEXT | {"num_hidden_layers": 8, "layer_types": QWEN3_NEXT_LAYERS[:8], "num_experts": 64},
    # Granite 4.0 H Tiny with 12 of 40 layers: Mamba 2, which vLLM's CPU build does not compute.
    "granite4": GRANITE4 | {"num_hidden_layers": 12, "layer_types": GRANITE4_LAYERS},
    # DeepSeek V3.2 with 6 of 61 layers, in bf16: narrower, with a sixteenth of its experts and an eighth of its heads.
    "deepseek-v3.2": DEEPSEEK_V32
    | {
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "n_group": 4,
        "n_routed_experts": 16,
        "num_attention_heads": 16,
        "num_hidden_layers": 6,
        "num_key_value_heads": 16,
        "topk_group": 2,
    },
    # For a try on a machine without a GPU.
    "tiny": QWEN3 | TINY | {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "tiny-gemma3": GEMMA3
    | TINY
    | {"num_hidden_layers": 6, "layer_types": GEMMA3_LAYERS[:6], "sliding_window": 64, "query_pre_attn_scalar": 32},
}


LIMIT = 32_768
"""The longest context, tokens, where none has to be longer. vLLM compiles a model anew for another one, and for another
directory of the model."""


def token_bytes(name: str, element_bytes: int) -> int:
    """KV of a token in a shape of one group, whose elements have so many bytes."""
    of = SHAPES[name]
    return 2 * of["num_hidden_layers"] * of["num_key_value_heads"] * of["head_dim"] * element_bytes


def make(name: str, directory: Path, longest: int = LIMIT, **changed: Any) -> Path:
    """Writes the configuration of a shape, for contexts of `longest` tokens and with fields `changed`, below a folder:
    the report's where scripts are to share it. Returns its own one, which is the model's name for vLLM."""
    if longest > LIMIT:
        changed["max_position_embeddings"] = longest
    target = directory / "models" / "-".join([name, *(str(value) for value in changed.values())])
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(SHAPES[name] | changed))
    return target.resolve()
