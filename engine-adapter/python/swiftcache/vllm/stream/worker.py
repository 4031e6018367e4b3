"""vLLM's worker of this platform, with a KV cache larger than its own memory. Use: `--worker-cls
swiftcache.vllm.StreamWorker`."""

from __future__ import annotations

from typing import Any

from swiftcache.engine.quiet import log_as_part_of
from swiftcache.engine.stitch import Shape
from swiftcache.vllm.facts import ranks_here
from swiftcache.vllm.stream import inside, pool, refusals
from swiftcache.vllm.stream.pool import StitchedPool


def over(platform: type) -> type:
    """The stream worker over a worker of vLLM."""

    class StreamWorker(platform):  # type: ignore[misc,valid-type]
        """Reports local and leased bytes. Lets nothing move while it computes."""

        def __init__(self, vllm_config: Any, *arguments: Any, **named: Any) -> None:
            log_as_part_of("vllm")
            settings = refusals.settings_of(vllm_config)
            refusals.check(vllm_config, settings)
            super().__init__(vllm_config, *arguments, **named)
            self._stream_settings = settings
            self._stream_pool: StitchedPool | None = None

        def determine_available_memory(self) -> int:
            local = super().determine_available_memory()
            specs = self.get_kv_cache_spec()
            page = refusals.page_of(specs)
            layout = self.vllm_config.cache_config.get_resolved_kv_cache_layout()
            layers = len(specs)
            shape = Shape(1, layers * page) if layout.is_block_outermost else Shape(layers, page)
            ranks = ranks_here()
            model = str(self.vllm_config.model_config.model)
            place = f"tp{ranks.tp}of{ranks.tp_size}/pp{ranks.pp}of{ranks.pp_size}"
            self._stream_pool = StitchedPool(
                self._stream_settings,
                name=f"vllm-stream-tp{ranks.tp}-pp{ranks.pp}",
                namespace=f"{model[-200:]}/{place}/stream",
            )
            pool.use(self._stream_pool)
            return self._stream_pool.open(local, shape, page=page, device=self.device)

        def compile_or_warm_up_model(self) -> Any:
            with self._guarded():
                return super().compile_or_warm_up_model()

        def execute_model(self, *arguments: Any, **named: Any) -> Any:
            with self._guarded():
                return super().execute_model(*arguments, **named)

        def sample_tokens(self, *arguments: Any, **named: Any) -> Any:
            with self._guarded():
                return super().sample_tokens(*arguments, **named)

        def execute_dummy_batch(self) -> Any:
            with self._guarded():
                return super().execute_dummy_batch()

        def _guarded(self) -> Any:
            assert self._stream_pool is not None, "vLLM runs a model before it has asked for memory"
            return self._stream_pool.guarded()

        def shutdown(self) -> None:
            super().shutdown()
            # The connector, which copies to and from the pool, is closed by now.
            if self._stream_pool is not None:
                self._stream_pool.close()
                self._stream_pool = None
                pool.use(None)

    StreamWorker.__module__, StreamWorker.__qualname__ = "swiftcache.vllm", "StreamWorker"
    return StreamWorker


_made: type | None = None


def stream_worker() -> type:
    """The stream worker for this platform: made once, since it can be told by its identity then."""
    global _made
    if _made is None:
        _made = over(inside.platform_worker())
    return _made
