"""What the linker serves, and what it refuses because bytes or tokens could come out wrong.

Served: models whose KV lives in one pool of full attention (K and V, token by token) or of MLA. Everything else is
refused when the engine starts, by the flag that brings it about.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

LEAST_PAGE = 16
"""Tokens. Smaller pages would be more records in the broker's index than they save in computing."""
POOLS = (MHATokenToKVPool, MLATokenToKVPool)
"""These classes themselves: their subclasses keep something else, or something more, in a page."""

# What SGLang was told, whether that is refused, and why.
_REFUSED = (
    ("speculative_algorithm", lambda value: value is not None, "a draft model's KV is not part of a block"),
    ("pp_size", lambda value: value > 1, "its stages do not agree on what is loaded"),
    ("dcp_size", lambda value: value > 1, "a page is spread over ranks there"),
    ("attn_cp_size", lambda value: value > 1, "a page is spread over ranks there"),
    ("disaggregation_mode", lambda value: value != "null", "its prefill and decode engines move KV by themselves"),
    ("enable_hisparse", bool, "it moves KV out of the pool by itself"),
    ("enable_memory_saver", bool, "it takes the memory of the pool away while copies may run"),
    ("enable_page_major_kv_layout", bool, "a page is not one run of bytes in each layer there"),
)


def check(server_args: Any, params: Any, components: Any) -> None:
    """Raises ValueError when this engine's KV cannot be cached safely."""
    for name, refused, reason in _REFUSED:
        value = getattr(server_args, name, None)
        if value is not None and refused(value):
            said = "" if value is True else f" {value}"
            raise ValueError(f"SwiftCache does not serve --{name.replace('_', '-')}{said}: {reason}. Drop it")
    if set(components) != {ComponentType.FULL}:
        others = ", ".join(sorted(component.name for component in set(components) - {ComponentType.FULL}))
        raise ValueError(
            f"SwiftCache serves models of full attention and MLA; this one also keeps {others}, whose state is not a "
            "function of one page's hash. Start without --enable-unified-cache-external-linker"
        )
    if params.page_size < LEAST_PAGE:
        raise ValueError(
            f"SwiftCache needs --page-size {LEAST_PAGE} or more, not {params.page_size}; 64 is a good choice"
        )
    _check_pool(params.token_to_kv_pool_allocator.get_kvcache(), params.page_size)


def _check_pool(pool: Any, page: int) -> None:
    kind = type(pool)
    if kind not in POOLS:
        raise ValueError(
            f"SwiftCache does not know how {kind.__name__} keeps KV; it serves "
            f"{' and '.join(known.__name__ for known in POOLS)}. The model, --kv-cache-dtype and --attention-backend "
            "choose the pool"
        )
    layout = getattr(pool, "kv_cache_layout", "nhd")
    if layout != "nhd":
        raise ValueError(
            f"SwiftCache serves pools in NHD layout, not {layout}: unset SGLANG_USE_HND_KVCACHE and "
            "SGLANG_AITER_KV_CACHE_LAYOUT"
        )
    scales = ("k_scale_buffer", "native_k_scale_buffer", "dq_k_buffer", "kv_scale_buffer")
    if any(getattr(pool, name, None) is not None for name in scales) or getattr(pool, "is_quantized_kv_cache", False):
        raise ValueError(
            "SwiftCache does not serve a --kv-cache-dtype with scales of its own for every token: they are kept apart "
            "from the pages. Use auto, bfloat16 or fp8"
        )
    if getattr(pool, "post_capture_active", False) or getattr(pool, "enable_custom_mem_pool", False):
        raise ValueError(
            "SwiftCache does not serve a KV pool that SGLang maps piece by piece (SGLANG_MOONCAKE_CUSTOM_MEM_POOL, or "
            "a pool that is backed after the capture of CUDA graphs)"
        )
    if getattr(pool, "layer_shard_enabled", False):
        raise ValueError("SwiftCache does not serve a KV pool whose layers are spread over ranks")
    if pool.page_size != page:
        raise ValueError(f"SwiftCache needs one page size; the pool's is {pool.page_size}, that of the tree {page}")
