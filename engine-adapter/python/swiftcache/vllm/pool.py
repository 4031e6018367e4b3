"""vLLM's block pool: the only file that knows how it keeps its free blocks.

vLLM has a hook that hands a connector the pool (`bind_kv_cache_manager`), and the pool has public methods that take
given blocks out of its free ones and put them back: `touch`, `evict_blocks`, `free_blocks`. A lent block is one
that nobody but this connector refers to, without a hash: no request is given it, no prefix is found in it. Beyond
that hook this needs two things that are not said to be for connectors: which free blocks somebody still reads
(`_reuse_watchers`), and that a reset of the prefix cache, which vLLM refuses as long as any block is in use, does
not count the lent ones. What is needed is looked for when the engine starts, and missing, nothing is lent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import vllm

METHODS = ("touch", "evict_blocks", "free_blocks", "get_num_free_blocks", "reset_prefix_cache")
OF_A_BLOCK = ("block_id", "ref_cnt", "block_hash", "is_null")


class Unsupported(Exception):
    """This vLLM's block pool is not as expected."""


class LentBlocks:
    """Takes free blocks out of vLLM's pool and puts them back."""

    def __init__(self, pool: Any) -> None:
        """Raises Unsupported, naming what is missing."""
        _check(pool)
        self._pool = pool
        self._lent: dict[int, Any] = {}
        self._reset: Callable[[], bool] = pool.reset_prefix_cache
        pool.reset_prefix_cache = self._reset_with_all

    @property
    def free(self) -> int:
        """Blocks that vLLM can give to requests now."""
        return self._pool.get_num_free_blocks()

    def are_free(self, blocks: Iterable[int]) -> bool:
        """Whether nobody uses or reads any of them."""
        pool = self._pool
        return all(pool.blocks[block].ref_cnt == 0 and block not in pool._reuse_watchers for block in blocks)

    def take(self, blocks: Sequence[int]) -> None:
        """Takes free blocks. What they kept of prefixes is forgotten."""
        pool = self._pool
        taken = [pool.blocks[block] for block in blocks]
        pool.evict_blocks(set(blocks))
        pool.touch(taken)
        self._lent.update((block.block_id, block) for block in taken)

    def put_back(self, blocks: Iterable[int]) -> None:
        self._pool.free_blocks([self._lent.pop(block) for block in blocks])

    def _reset_with_all(self) -> bool:
        """Lent blocks hold no prefix, so that they are no reason to refuse; nothing is allocated meanwhile."""
        lent = list(self._lent.values())
        self._pool.free_blocks(lent)
        try:
            return self._reset()
        finally:
            self._pool.touch(lent)


def _check(pool: Any) -> None:
    missing = [f"{name}()" for name in METHODS if not callable(getattr(pool, name, None))]
    blocks = getattr(pool, "blocks", None)
    if not isinstance(blocks, list) or len(blocks) != getattr(pool, "num_gpu_blocks", None):
        missing.append("blocks, a list of num_gpu_blocks")
    else:
        missing += [f"{name} of a block" for name in OF_A_BLOCK if not all(hasattr(block, name) for block in blocks)]
    if not isinstance(getattr(pool, "_reuse_watchers", None), dict):
        missing.append("_reuse_watchers, a dictionary")
    if missing:
        raise Unsupported(
            f"the block pool of vLLM {vllm.__version__} ({type(pool).__name__}) lacks {', '.join(missing)}; SwiftCache "
            "knows how to lend from that of vLLM 0.32"
        )
