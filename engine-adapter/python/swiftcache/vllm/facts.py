"""What makes KV blocks of two vLLM workers interchangeable: everything that might change a byte of one.

What differs between requests of one engine is in vLLM's block hashes already: tokens, `cache_salt`, LoRA name and path
(`updates` adds the files), multimodal items, prompt embeddings. What seeds the hashes has a place of its own in the
namespace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vllm

from swiftcache.engine.fingerprint import Ranks, weight_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from swiftcache.engine.layout import Layout
    from swiftcache.engine.settings import Settings


def ranks_here() -> Ranks:
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    return Ranks(tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size)


def facts(
    config: VllmConfig,
    settings: Settings,
    layout: Layout,
    *,
    block_tokens: int,
    backends: list[str],
    ranks: Ranks,
    groups: list[str] | None = None,
) -> dict[str, Any]:
    """`groups`: what each of several KV groups is."""
    parallel = config.parallel_config
    return ({"groups": groups} if groups else {}) | {
        "vllm": vllm.__version__,
        "model": _model(config, settings),
        "salt": settings.salt,
        "hash": config.cache_config.prefix_caching_hash_algo,
        "block_tokens": block_tokens,
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "layout": str(getattr(config.cache_config, "kv_cache_layout", None)),
        "pages": layout.shape,
        "layers": {name: list(numbers) for name, numbers in layout.by_layer.items()},
        "backends": backends,
        "parallel": [ranks.tp_size, ranks.pp_size, bool(getattr(parallel, "enable_expert_parallel", False))],
    }


def group_facts(kv: KVCacheConfig) -> list[str]:
    """Which layers each group has, and what they keep. A block's key names its group by number."""
    return [f"{sorted(group.layer_names)} {group.kv_cache_spec}" for group in kv.kv_cache_groups]


def _model(config: VllmConfig, settings: Settings) -> dict[str, Any]:
    model = config.model_config
    found: dict[str, Any] = {
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "config": model.hf_config.to_dict(),
        "text_config": model.hf_text_config.to_dict(),
        "overrides": str(getattr(model, "hf_overrides", None)),
        "architectures": list(getattr(model, "architectures", None) or ()),
    }
    for part in ("config", "text_config"):
        found[part].pop("_name_or_path", None)
    if settings.model_id:
        found["id"] = settings.model_id
        return found
    load = config.load_config
    found |= {
        "id": model.model,
        "revision": model.revision,
        "files": weight_files(model.model, model.revision),
        "load_format": str(load.load_format),
        "seed": model.seed if str(load.load_format) == "dummy" else None,
    }
    return found


def backends(config: VllmConfig, caches: Mapping[str, Any]) -> list[str]:
    """The attention backends of the layers: they define what the bytes of a page mean."""
    layers = config.compilation_config.static_forward_context
    names = set()
    for name in caches:
        backend = getattr(layers.get(name), "get_attn_backend", None)
        names.add(backend().get_name() if backend else "")
    return sorted(names)
