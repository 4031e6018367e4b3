"""What the connector serves, and what it refuses because bytes or tokens could come out wrong.

Served: models whose KV lives in groups of full-attention, MLA, sliding-window and chunked-local layers and of state
(Mamba, GDN), one of full attention or MLA at least (with the hybrid KV cache manager disabled, windows and chunks are
kept as full attention). Everything else is refused when the engine starts. With several groups more is refused, which
nobody has shown to be right: `check_several`.

How a load may fail decides when it may run. vLLM 0.32 recovers from a failed *synchronous* load correctly only
with one batch in flight and the V1 model runner: with more, the next step has been scheduled on top of the failed one
and its tokens are delivered (vllm-project/vllm#45138), and the V2 runner recomputes from a stale position (#49250).
There loads are asynchronous: a request is scheduled only when its blocks are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupRole,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

from swiftcache.engine.quiet import logger

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from swiftcache.engine.settings import Settings
    from swiftcache.vllm.groups import Groups

HASHES = ("sha256", "sha256_cbor")
FULL = (FullAttentionSpec, MLAAttentionSpec)
SERVED = (*FULL, SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)
"""These classes themselves: their subclasses keep something else in a block."""


DTYPES = (
    "auto",
    "float16",
    "bfloat16",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_ds_mla",
    "nvfp4_ds_mla",
    "int4_per_token_head",
    "int8_per_token_head",
    "fp8_per_token_head",
    "nvfp4",
)
"""What `--kv-cache-dtype` may be. A block of each is whole: scales are in its pages, or in the model's weights."""


def check(config: VllmConfig, kv: KVCacheConfig) -> None:
    """Raises ValueError when this engine's KV cannot be cached safely."""
    transfer, cache, parallel = config.kv_transfer_config, config.cache_config, config.parallel_config
    if transfer.kv_role != "kv_both":
        raise ValueError(f"SwiftCache needs kv_role 'kv_both', not {transfer.kv_role!r}: it reads and writes")
    if not cache.enable_prefix_caching:
        if reason := _switched_off(config):
            raise ValueError(
                "SwiftCache does not serve this model: it needs vLLM's prefix caching for its block hashes, and vLLM "
                f"switches prefix caching off for {reason}"
            )
        raise ValueError(
            "SwiftCache needs vLLM's prefix caching for its block hashes: drop --no-enable-prefix-caching. If it was "
            "not given, vLLM has switched prefix caching off for this model, and its log says why"
        )
    if cache.prefix_caching_hash_algo not in HASHES:
        raise ValueError(
            f"SwiftCache refuses prefix_caching_hash_algo {cache.prefix_caching_hash_algo!r}, whose hashes collide or "
            f"differ between processes: use one of {', '.join(HASHES)}"
        )
    if getattr(cache, "calculate_kv_scales", False):
        raise ValueError(
            "SwiftCache refuses calculate_kv_scales: KV quantised with one engine's scales means something else "
            "in another"
        )
    if str(cache.cache_dtype) not in DTYPES:
        raise ValueError(
            f"SwiftCache does not serve --kv-cache-dtype {cache.cache_dtype}: nobody has shown that blocks of it mean "
            f"the same in another engine. Use one of {', '.join(DTYPES)}"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(f"SwiftCache does not serve {name} > 1: a block is spread over ranks differently there")
    if getattr(parallel, "distributed_executor_backend", None) == "external_launcher" and parallel.world_size > 1:
        raise ValueError(
            "SwiftCache does not serve the executor external_launcher with tensor or pipeline parallelism: each rank "
            "schedules by itself there, and all have to schedule alike, but each one's cache finds what it has. Use "
            "mp or ray"
        )
    _refuse_hisparse(config, kv)
    kinds = set()
    for group in kv.kv_cache_groups:
        specs = iter_layer_specs(group.kv_cache_spec)
        if not all(spec.prefix_cacheable for spec in specs):
            # Scratch of a request, of which vLLM itself keeps no prefix.
            continue
        for spec in specs:
            if type(spec) not in SERVED:
                raise ValueError(
                    "SwiftCache serves layers of full attention, MLA, sliding windows, chunked local attention and "
                    f"state, not {type(spec).__name__}"
                )
            kinds.add(type(spec))
        if len({_reach(spec) for spec in specs}) > 1:
            raise ValueError(
                "SwiftCache does not serve layers of several windows or chunks in one KV cache group: "
                "--disable-hybrid-kv-cache-manager keeps them as full attention"
            )
        if not group.enable_kv_transfer:
            raise ValueError("vLLM does not let this model's KV cache be transferred")
    if not kinds.intersection(FULL):
        if MambaSpec in kinds:
            raise ValueError("SwiftCache serves Mamba, GDN and other state beside full attention, not alone")
        raise ValueError(
            "SwiftCache serves sliding windows and chunks beside full attention, not alone: "
            "--disable-hybrid-kv-cache-manager keeps them as full attention"
        )


def _switched_off(config: VllmConfig) -> str:
    """What of this model has vLLM switch prefix caching off by itself; empty if nothing is known."""
    model = config.model_config
    if not getattr(model, "is_prefix_caching_supported", True):
        attention = str(getattr(model, "attn_type", ""))
        return f"{attention.replace('_', '-')} models" if attention.startswith("encoder") else "this model"
    if getattr(model, "use_mla", False) and current_platform.is_cpu():
        return "models with MLA, such as DeepSeek, on CPUs"
    return ""


def _reach(spec: KVCacheSpec) -> tuple[int | None, int | None]:
    """How far a layer reaches back: over its window, or within its chunk."""
    return getattr(spec, "sliding_window", None), getattr(spec, "attention_chunk_size", None)


def _refuse_hisparse(config: VllmConfig, kv: KVCacheConfig) -> None:
    attention = getattr(config, "attention_config", None)
    if getattr(attention, "hisparse_config", None) is not None or any(
        group.host_resident or group.role != KVCacheGroupRole.DEFAULT for group in kv.kv_cache_groups
    ):
        raise ValueError(
            "SwiftCache does not serve HiSparse, which keeps the KV cache in host memory and parts of it on the GPU: "
            "drop hisparse_config from --attention-config"
        )


def check_several(config: VllmConfig, kv: KVCacheConfig, settings: Settings) -> None:
    """Raises ValueError for what is not served where a model has several KV cache groups."""
    model = f"this model's KV cache is {len(kv.kv_cache_groups)} groups"
    helps = "--disable-hybrid-kv-cache-manager makes one of them where they differ only in windows or chunks"
    for spec in _states(kv):
        if spec.mamba_cache_mode != "align":
            raise ValueError(
                f"SwiftCache serves state in --mamba-cache-mode align, not {spec.mamba_cache_mode}: in other modes "
                "vLLM does not say which block has the state at the end of a prefix"
            )
    odd = {type(spec) for group in kv.prefix_cacheable_groups for spec in iter_layer_specs(group.kv_cache_spec)}
    if odd := odd.difference((FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)):
        names = ", ".join(sorted(kind.__name__ for kind in odd))
        raise ValueError(f"SwiftCache does not serve {names} where {model}")
    if settings.stream_bytes:
        raise ValueError(f"SwiftCache does not serve the setting stream_bytes where {model}: drop it. {helps}")
    if settings.load == "sync":
        raise ValueError(
            f"load 'sync' is refused: {model}, and then this vLLM cannot recover from a load that fails in the forward "
            "that needs it. Use load 'async', or 'auto'"
        )
    if surrounding(config) is not None:
        raise ValueError(
            f"SwiftCache does not serve MultiConnector where {model}: another connector's failed load would end this "
            f"vLLM. {helps}"
        )


def _states(kv: KVCacheConfig) -> Iterator[MambaSpec]:
    for group in kv.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            if isinstance(spec, MambaSpec):
                yield spec


def require_recompute(config: VllmConfig) -> None:
    """A lost block is a miss, so a request that meets one must be recomputed; vLLM's default is to fail it."""
    transfer = config.kv_transfer_config
    if transfer.kv_load_failure_policy != "recompute":
        try:
            transfer.kv_load_failure_policy = "recompute"
        except Exception as reason:
            raise ValueError(
                'SwiftCache needs "kv_load_failure_policy": "recompute" in --kv-transfer-config, '
                f"and could not set it itself: {reason}"
            ) from reason
        logger.info("SwiftCache: kv_load_failure_policy is set to 'recompute': a block that is lost is recomputed")
    outer = surrounding(config)
    if outer is None:
        return
    # vLLM follows the policy of the outer connector.
    if outer.kv_load_failure_policy != "recompute":
        raise ValueError(
            f'SwiftCache needs "kv_load_failure_policy": "recompute" beside "kv_connector": "{outer.kv_connector}" in '
            f"--kv-transfer-config: with {outer.kv_load_failure_policy!r} a request fails when a block is lost"
        )


def surrounding(config: VllmConfig) -> KVTransferConfig | None:
    """The configuration of the connector that holds this one and others, such as MultiConnector; None when this one is
    alone. Only workers can see it. Raises ValueError when this connector is there twice."""
    whole = get_current_vllm_config_or_none()
    outer = whole.kv_transfer_config if whole is not None else None
    mine = config.kv_transfer_config.kv_connector
    if outer is None or outer.kv_connector == mine:
        return None
    children = (outer.kv_connector_extra_config or {}).get("connectors", ())
    if sum(child.get("kv_connector") == mine for child in children) > 1:
        raise ValueError(
            f"{mine} is twice in the connectors of {outer.kv_connector}: the second one would keep every block again. "
            "Drop one of them"
        )
    return outer


def never_lent(config: VllmConfig, kv: KVCacheConfig, groups: Groups, unit_tokens: int) -> int:
    """Blocks that the engine keeps whatever it lends: its longest request runs even if nothing ever comes back."""
    longest = sum(group.held(-(-config.model_config.max_model_len // unit_tokens)) for group in groups.all)
    watermark = float(getattr(config.scheduler_config, "watermark", 0.0) or 0.0)
    # Of each of vLLM's groups a block for what is computed ahead, one that a request may hold beyond its tokens and one
    # for rounding; and vLLM's placeholder.
    return longest + int(watermark * kv.num_blocks) + 3 * len(kv.kv_cache_groups) + 1


def unrecoverable(config: VllmConfig) -> str:
    """Why this vLLM does not compute the right KV after a synchronous load has failed; empty when it does."""
    batches = config.max_concurrent_batches
    if batches > 1:
        return (
            f"{batches} batches are in flight at once (pass --no-async-scheduling; pipeline parallelism has several "
            "always)"
        )
    if getattr(config, "use_v2_model_runner", False):
        return "the V2 model runner is in use (set VLLM_USE_V2_MODEL_RUNNER=0)"
    return ""


def loads_synchronously(config: VllmConfig, settings: Settings) -> bool:
    """Whether loads run layer by layer inside the forward that needs them. Never with several groups."""
    if settings.load in ("async", "wait"):
        return False
    obstacle = unrecoverable(config)
    if settings.load == "sync":
        if obstacle:
            raise ValueError(
                f"load 'sync' is refused: {obstacle}, and then this vLLM answers with wrong tokens when a "
                "synchronous load fails. Use load 'async', or 'auto'"
            )
        return True
    # A replayed full graph skips the hooks of its layers. 'sync' has vLLM do without; 'auto' does not ask for that.
    return not obstacle and not config.compilation_config.cudagraph_mode.has_full_cudagraphs()


def may_promise(config: VllmConfig, kv: KVCacheConfig, settings: Settings) -> bool:
    """Whether a load may count as over before its last bytes are there (`landing`): where every forward that computes
    several tokens of a request calls the hooks of all layers, and nothing but these layers reads the pool."""
    if settings.load == "wait" or settings.stream_bytes or len(kv.kv_cache_groups) > 1:
        return False
    if config.speculative_config is not None or surrounding(config) is not None:
        return False
    return config.compilation_config.cudagraph_mode.mixed_mode() != CUDAGraphMode.FULL
