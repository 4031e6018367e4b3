"""The connector that vLLM loads: hands each hook to the half that its process plays.

Serves models whose KV cache groups are full attention, MLA, sliding windows, chunks and state, and refuses others when
the engine starts (`safety` says why). It implements SupportsHMA, so that vLLM's hybrid KV cache manager stays on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from swiftcache.engine.events import Events
from swiftcache.engine.lending import Terms, terms
from swiftcache.engine.loans import Loans
from swiftcache.engine.quiet import log_as_part_of, logger
from swiftcache.engine.settings import Settings
from swiftcache.vllm import junction, safety
from swiftcache.vllm.groups import Groups
from swiftcache.vllm.metadata import Handshake, StepMetadata
from swiftcache.vllm.metrics import SwiftCachePromMetrics, SwiftCacheStats
from swiftcache.vllm.pool import LentBlocks, Unsupported
from swiftcache.vllm.scheduler import SchedulerSide
from swiftcache.vllm.stream.pool import StitchedPool, stitched_pool
from swiftcache.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


def read_settings(extra: dict[str, Any] | None) -> Settings:
    return Settings.read("kv_connector_extra_config", extra)


class SwiftCacheConnector(KVConnectorBase_V1, SupportsHMA):
    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_as_part_of("vllm")
        settings = read_settings(self._kv_transfer_config.kv_connector_extra_config)
        safety.check(vllm_config, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) > 1:
            safety.check_several(vllm_config, kv_cache_config, settings)
        safety.require_recompute(vllm_config)
        block_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
        groups = Groups.of(kv_cache_config, vllm_config, block_tokens)
        if groups.states:
            junction.check()
        sync = not groups.several and safety.loads_synchronously(vllm_config, settings)
        # Of hits that end within a block, vLLM copies a part before it calls any hook of the step.
        whole = block_tokens == hash_tokens
        promises = not sync and whole and safety.may_promise(vllm_config, kv_cache_config, settings)
        events = vllm_config.kv_events_config
        publishes = bool(events and events.enable_kv_cache_events)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._quiet = False
        """The worker has nothing to do in this step, so its hooks return at once. Most steps decode and are so, and
        code that has not run for some milliseconds is slow to run through even when it finds nothing to do."""
        self._lending: tuple[Settings, Terms, int] | None = None
        self._streams = False
        self._stitched: StitchedPool | None = None
        self._kv_bytes = max((tensor.size for tensor in kv_cache_config.kv_cache_tensors), default=0)
        if role == KVConnectorRole.SCHEDULER:
            from swiftcache import _native

            parallel = vllm_config.parallel_config
            workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
            if settings.lend:
                kept = safety.never_lent(vllm_config, kv_cache_config, groups, block_tokens)
                agreed = terms(
                    settings.lend,
                    settings.lend_reserve,
                    settings.lend_after_ms / 1e3,
                    blocks=kv_cache_config.num_blocks,
                    kept=kept,
                )
                self._lending = (settings, agreed, workers)
            self._streams = settings.stream_bytes > 0
            self._scheduler = SchedulerSide(
                settings,
                _native.Connection(settings.socket, name="vllm-scheduler", tenant=settings.tenant),
                block_tokens=block_tokens,
                hashes_per_block=block_tokens // hash_tokens,
                sync=sync,
                recovers=not safety.unrecoverable(vllm_config),
                workers=workers,
                promises=promises,
                events=Events(publishes),
                groups=groups,
            )
        else:
            self._stitched = stitched_pool(settings)
            self._worker = WorkerSide(
                vllm_config,
                settings,
                kv_cache_config,
                block_tokens=block_tokens,
                sync=sync,
                promises=promises,
                # Local blocks that are kept elsewhere too are the first to be used again, so the scheduler must know.
                publish_outcome=publishes or self._stitched is not None,
                stitched=self._stitched,
                # Other connectors exchange handshakes too, and vLLM passes on the first one's only.
                reports_itself=safety.surrounding(vllm_config) is not None,
            )

    # What vLLM asks before it makes one.

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A replayed full graph would skip the hooks that a layer-wise load depends on."""
        return read_settings(extra_config).load == "sync"

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """vLLM 0.33: it says before it takes the pool away, and after it is back."""
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a store that did not happen is a miss later."""
        return False

    # Worker.

    @property
    def worker(self) -> WorkerSide:
        assert self._worker is not None, "a hook of the worker, called in the scheduler"
        return self._worker

    def get_mem_pool_context(self) -> AbstractContextManager | None:
        """What vLLM allocates its KV cache in: a stitched pool, if this worker has one."""
        return self._stitched.allocation(self._kv_bytes) if self._stitched is not None else None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        self.worker.unregister()

    def restore_kv_caches(self) -> None:
        self.worker.restore()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self.worker.handshake()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMetadata)
        self.worker.before_overwriting(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(connector_metadata, StepMetadata)
        super().bind_connector_metadata(connector_metadata)
        self.worker.bind(connector_metadata)
        self._quiet = self.worker.is_quiet()

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        if self._quiet:
            # A step that orders nothing may stay.
            self._quiet = False
        else:
            self.worker.bind(None)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if not self._quiet:
            self.worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        if not self._quiet:
            self.worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        if not self._quiet:
            self.worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        if not self._quiet:
            self.worker.start_stores()

    def finish_forward(self) -> None:
        """Nothing: a draft model may still write KV. `wait_for_save` comes after it."""

    def reset_capture_state(self) -> None:
        self.worker.reset_capture()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._quiet:
            return KVConnectorTransferResults()
        received, failed = self.worker.finished()
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._quiet else self.worker.invalid_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return None if self._quiet else self.worker.report()

    # Scheduler.

    @property
    def scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "a hook of the scheduler, called in a worker"
        return self._scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind(kv_cache_manager)
        if self._streams:
            from swiftcache.vllm.stream.inside import FreeBlocks

            self.scheduler.stitch(FreeBlocks(kv_cache_manager.block_pool))
        if self._lending is None:
            return
        settings, agreed, workers = self._lending
        try:
            pool = LentBlocks(kv_cache_manager.block_pool)
        except Unsupported as reason:
            logger.error("SwiftCache: this engine lends nothing: %s", reason)
            return
        self.scheduler.lend(Loans(agreed, pool, workers=workers, drain_ms=settings.lend_drain_ms))

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self._meet(metadata.values())

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._meet(metadata.values())

    def _meet(self, handshakes: Iterable[KVConnectorHandshakeMetadata]) -> None:
        self.scheduler.meet(of for of in handshakes if isinstance(of, Handshake))

    def on_new_request(self, request: Request) -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler.metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler.worker_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler.request_finished(request, block_ids)
        return False, None

    def has_pending_block_frees(self) -> bool:
        return self.scheduler.frees_pending()

    def has_pending_push_work(self) -> bool:
        return self.scheduler.wants_steps()

    def reset_cache(self) -> bool | None:
        return self.scheduler.reset()

    def take_events(self) -> Iterable[Any]:
        return self.scheduler.take_events()

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler is not None:
            return self._scheduler.take_stats()
        return None if self._quiet else self.worker.stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return SwiftCacheStats(data=data) if data is not None else SwiftCacheStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics | None:
        return SwiftCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
