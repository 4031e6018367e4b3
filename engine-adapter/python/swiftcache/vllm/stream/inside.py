"""What a stitched pool needs of vLLM beyond its documented extension points. Nothing else in this package names it.

Documented are `--worker-cls`, `determine_available_memory`, and a connector's hooks, `get_mem_pool_context` among them.
Not documented are: which worker a platform has; that the KV cache is one `torch.zeros` of int8 (`stream.pool` refuses
an engine that allocates otherwise); the methods of the list of free blocks; and the fields of a layer and of its
attention metadata through which attention finds the KV cache. All are looked for when the engine starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import vllm

try:
    from vllm.forward_context import get_forward_context
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
except ImportError as reason:
    raise ImportError(
        f"SwiftCache's stitched pool knows vLLM 0.32 and 0.33; vLLM {vllm.__version__} is another one: {reason}. Drop "
        "stream_bytes and --worker-cls"
    ) from reason

WORKERS = {"cuda": "vllm.v1.worker.gpu_worker.Worker", "cpu": "vllm.v1.worker.cpu_worker.CPUWorker"}
STAGED_BACKENDS = ("FLASH_ATTN", "CPU_ATTN")
"""Whose attention reads the KV cache through a block table and lengths alone."""
MERGED_BACKENDS = ("FLASH_ATTN",)
"""Whose kernel says the log-sum-exp of its scores, so that a context can be read in parts."""
OF_A_LIST = (
    "popleft",
    "popleft_n",
    "remove",
    "append",
    "append_n",
    "prepend_n",
    "get_all_free_blocks",
    "iter_blocks_after",
)
OF_METADATA = ("block_table", "seq_lens", "query_start_loc", "max_query_len", "max_seq_len")


class Unsupported(Exception):
    """This vLLM is not as expected."""


def platform_worker() -> type:
    """vLLM's own worker for this platform. Raises Unsupported where a stitched pool is not served."""
    name = next((WORKERS[kind] for kind in WORKERS if getattr(current_platform, f"is_{kind}")()), None)
    if name is None:
        raise Unsupported(f"stream_bytes is served on CUDA and CPU, not on {current_platform.device_name}")
    try:
        worker = resolve_obj_by_qualname(name)
    except (ImportError, AttributeError) as reason:
        raise Unsupported(f"vLLM {vllm.__version__} has no worker {name}: {reason}") from reason
    missing = [name for name in ("execute_model", "sample_tokens", "execute_dummy_batch") if not hasattr(worker, name)]
    if missing:
        raise Unsupported(f"the worker of vLLM {vllm.__version__} lacks {', '.join(missing)}")
    return worker


# The list of free blocks.


@dataclass(frozen=True)
class FreeBlocks:
    """vLLM's list of free blocks, taken over."""

    pool: Any

    def __post_init__(self) -> None:
        queue = getattr(self.pool, "free_block_queue", None)
        missing = [name for name in OF_A_LIST if not callable(getattr(queue, name, None))]
        if not isinstance(getattr(queue, "num_free_blocks", None), int):
            missing.append("num_free_blocks")
        # A method that is called and not here would have vLLM fail in the middle of a request.
        unknown = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("_")} - set(OF_A_LIST)
        if missing or unknown:
            raise Unsupported(
                f"the list of free blocks of vLLM {vllm.__version__} lacks {', '.join(missing) or 'nothing'} and also "
                f"has {', '.join(sorted(unknown)) or 'nothing'}; SwiftCache knows that of vLLM 0.32 and 0.33"
            )

    def free(self) -> list[Any]:
        """In the order in which they would be given away."""
        return self.pool.free_block_queue.get_all_free_blocks()

    def replace(self, queue: Any) -> None:
        self.pool.free_block_queue = queue

    def after_reset(self, call: Callable[[], None]) -> None:
        """Has `call` called whenever the prefix cache has been forgotten."""
        reset = self.pool.reset_prefix_cache

        def reset_and_call() -> bool:
            done = reset()
            if done:
                call()
            return done

        self.pool.reset_prefix_cache = reset_and_call


def new_list(blocks: list[Any]) -> Any:
    """One of vLLM's lists."""
    return FreeKVCacheBlockQueue(blocks)


def iter_all(queue: Any) -> Iterator[Any]:
    return queue.iter_blocks_after(None)


# A layer in a forward.


@dataclass
class InForward:
    """A layer, and what its attention reads in this step."""

    layer: Any
    metadata: Any

    @property
    def pages(self) -> Any:
        """The layer's part of the pool, blocks first."""
        return self.layer.kv_cache

    def lead(self, pages: Any, table: Any) -> None:
        """Has the layer's attention read there."""
        self.layer.kv_cache = pages
        self.metadata.block_table = table

    def compute_by(self, implementation: Any) -> None:
        self.layer.impl = implementation


def layer_in_forward(name: str) -> InForward | None:
    """None where a step is cut into micro-batches: it reads its KV in place."""
    context = get_forward_context()
    metadata = context.attn_metadata
    if not isinstance(metadata, dict) or name not in metadata:
        return None
    return InForward(context.no_compile_layers[name], metadata[name])


def why_in_place(layer: Any, metadata: Any) -> str:
    """Why a layer's KV cannot be read through a window; empty when it can."""
    backend = getattr(layer, "attn_backend", None)
    name = backend.get_name() if backend is not None else type(layer).__name__
    if name not in STAGED_BACKENDS:
        return f"attention backend {name} finds its KV in ways of its own"
    if getattr(backend, "forward_includes_kv_cache_update", True):
        return f"attention backend {name} writes to the KV cache that it reads"
    missing = [field for field in OF_METADATA if not hasattr(metadata, field)]
    if missing:
        return f"the attention metadata of vLLM {vllm.__version__} lack {', '.join(missing)}"
    return ""


def why_unmerged(layer: Any, metadata: Any) -> str:
    """Why a context that is longer than a window cannot be read in parts; empty when it can."""
    name, impl = layer.attn_backend.get_name(), layer.impl
    if name not in MERGED_BACKENDS:
        return f"attention backend {name} does not say the log-sum-exp of its scores"
    if getattr(metadata, "causal", None) is not True:
        return "attention is not causal"
    odd = {
        "alibi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None,
        "a sliding window": tuple(getattr(impl, "sliding_window", None) or (-1, -1)) != (-1, -1),
        "a quantised KV cache": str(getattr(impl, "kv_cache_dtype", "")).startswith(("fp8", "nvfp4", "int")),
        "prefixes that are not causal": getattr(metadata, "mm_prefix_query_range_tensor", None) is not None,
        "a window behind a prefix": getattr(metadata, "rswa_prefix_lens", None) is not None,
    }
    return " and ".join(f"{what} is in use" for what, used in odd.items() if used)


class FlashParts:
    """FlashAttention over parts of a context, as vLLM itself calls it for contexts that are spread over ranks."""

    def __init__(self, impl: Any) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        self._attend, self._merge, self._impl = flash_attn_varlen_func, merge_attn_states, impl

    def _call(self, query: Any, keys: Any, values: Any, metadata: Any, **more: Any) -> tuple[Any, Any]:
        out, scores, *_ = self._attend(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            softmax_scale=self._impl.scale,
            window_size=[-1, -1],
            softcap=self._impl.logits_soft_cap,
            return_softmax_lse=True,
            fa_version=self._impl.vllm_flash_attn_version,
            **more,
        )
        return out, scores

    def among_new(self, query: Any, key: Any, value: Any, metadata: Any) -> tuple[Any, Any]:
        """New tokens among themselves: output, and the log-sum-exp of the scores, [heads, tokens]."""
        return self._call(
            query,
            key,
            value,
            metadata,
            cu_seqlens_k=metadata.query_start_loc,
            max_seqlen_k=metadata.max_query_len,
            causal=True,
        )

    def over_pages(self, query: Any, pages: Any, metadata: Any, table: Any, lengths: Any, longest: int) -> Any:
        """New tokens over a part of what was before."""
        keys, values = pages.transpose(1, 2).split(self._impl.head_size, dim=-1)
        return self._call(
            query, keys, values, metadata, block_table=table, seqused_k=lengths, max_seqlen_k=longest, causal=False
        )

    def merge(self, one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
        out, scores = one[0].new_empty(one[0].shape), one[1].new_empty(one[1].shape)
        self._merge(out, one[0], one[1], other[0], other[1], output_lse=scores)
        return out, scores
