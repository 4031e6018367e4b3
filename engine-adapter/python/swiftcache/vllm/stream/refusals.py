"""What a stitched pool does not serve, by name, when the engine starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from swiftcache.engine.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONNECTOR = "SwiftCacheConnector"
WORKER = "swiftcache.vllm.StreamWorker"
WHERE = "kv_connector_extra_config"


def settings_of(config: VllmConfig) -> Settings:
    """The settings for a stream worker. Raises ValueError when there is no connector that would take the pool."""
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        name = "none" if transfer is None else transfer.kv_connector
        raise ValueError(
            f"--worker-cls {WORKER} needs {CONNECTOR} as the only connector in --kv-transfer-config, not {name}: "
            "through it vLLM takes the stitched pool"
        )
    settings = Settings.read(WHERE, transfer.kv_connector_extra_config)
    if settings.stream_bytes == 0:
        raise ValueError(
            f"--worker-cls {WORKER} needs stream_bytes in {WHERE}: how much one worker leases for its KV cache. "
            "Without it drop --worker-cls"
        )
    return settings


def check(config: VllmConfig, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
    """Raises ValueError naming what cannot be served together with stream_bytes."""
    environment = os.environ if environment is None else environment
    parallel = config.parallel_config
    if settings.lend:
        raise ValueError("stream_bytes is refused together with lend: a worker that leases KV cache has none to lend")
    if getattr(config.model_config, "enable_sleep_mode", False):
        raise ValueError(
            "stream_bytes is refused together with --enable-sleep-mode: a stitched pool cannot be taken away and come "
            "back. Drop one of them"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(
                f"stream_bytes is refused with {name} > 1: a block is spread over ranks there, and its local part with "
                "it"
            )
    if getattr(parallel, "enable_elastic_ep", False):
        raise ValueError("stream_bytes is refused together with elastic expert parallelism: the pool's size is final")
    if "MIG" in environment.get("CUDA_VISIBLE_DEVICES", "") or "MIG" in _gpu_name():
        raise ValueError("stream_bytes is refused on MIG devices: CUDA maps no neighbour's memory there")


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def page_of(specs: Mapping[str, Any]) -> int:
    """Bytes of a block in each layer. Raises ValueError for models whose layers keep different things."""
    kinds = {type(spec) for spec in specs.values()}
    if odd := sorted(kind.__name__ for kind in kinds - {FullAttentionSpec, MLAAttentionSpec}):
        raise ValueError(f"stream_bytes serves full attention and MLA layers in one KV group, not {', '.join(odd)}")
    pages = {spec.page_size_bytes for spec in specs.values()}
    if len(pages) != 1:
        raise ValueError(
            "stream_bytes serves models whose layers have blocks of one size in one KV group; this one has "
            f"{', '.join(map(str, sorted(pages))) or 'no KV cache'}"
        )
    return pages.pop()
