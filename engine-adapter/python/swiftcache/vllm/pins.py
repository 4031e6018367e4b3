"""Blocks of vLLM's pool that a store reads and that nobody else is to overwrite meanwhile, whatever their request does.

A request gives up a block with a state as soon as it has the next one, often in the step after the one that made it,
and all of its blocks when it is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager


class Pins:
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._manager: KVCacheManager | None = None
        self._held: dict[int, tuple[list[int], int]] = {}
        """Of each store its blocks, and how many workers are through with it."""

    def bind(self, manager: KVCacheManager) -> None:
        self._manager = manager

    def __bool__(self) -> bool:
        return bool(self._held)

    def __contains__(self, store: int) -> bool:
        return store in self._held

    def hold(self, store: int, blocks: Sequence[int]) -> None:
        """Until every worker is through with a store, its blocks belong to nobody else."""
        assert self._manager is not None, "vLLM binds its KV cache manager before its first step"
        pool = self._manager.block_pool
        pool.touch([pool.blocks[block] for block in blocks])
        self._held[store] = (list(blocks), 0)

    def done(self, store: int, workers: int) -> None:
        """Some more workers are through with a store."""
        if store not in self._held:
            return
        blocks, so_far = self._held[store]
        if so_far + workers < self._workers:
            self._held[store] = (blocks, so_far + workers)
            return
        del self._held[store]
        assert self._manager is not None
        pool = self._manager.block_pool
        # vLLM gives away first what is freed first, and of a prefix nothing is found without its head.
        pool.free_blocks([pool.blocks[block] for block in reversed(blocks)])
