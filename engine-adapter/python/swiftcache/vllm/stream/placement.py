"""Which free block a request gets: local ones first.

vLLM has one list of free blocks, in the order in which it gives them away: blocks that hold nothing, then cached
prefixes, the longest unused first. For a stitched pool there are four lists, given away in this order:

1. local blocks that hold nothing;
2. local blocks whose prefix is kept elsewhere too, in donors' HBM: what is forgotten here is loaded again from there;
3. leased blocks that hold nothing;
4. all other cached prefixes, the longest unused first.

So requests that fit into local memory read nothing from neighbours, however long the engine has run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from swiftcache.vllm.stream.inside import FreeBlocks, iter_all, new_list

EMPTY, KEPT, LEASED, CACHED = range(4)
ORDER = (EMPTY, KEPT, LEASED, CACHED)


class LocalFirst:
    """Takes the place of vLLM's list of free blocks."""

    def __init__(self, blocks: list[Any], local: int) -> None:
        """`local`: so many blocks, the first ones, are local."""
        self._local = local
        self._kept: dict[int, Any] = {}
        self._where: dict[int, int] = {}
        self._lists: list[Any] = []
        self._fill(blocks)

    def _fill(self, blocks: list[Any]) -> None:
        parts: list[list[Any]] = [[] for _ in ORDER]
        for block in blocks:
            self._where[block.block_id] = kind = self._kind(block)
            parts[kind].append(block)
        self._lists = [new_list(part) for part in parts]

    def _kind(self, block: Any) -> int:
        local = block.block_id < self._local
        if block.block_hash is None:
            return EMPTY if local else LEASED
        return KEPT if local and self._kept.get(block.block_id) == block.block_hash else CACHED

    # What vLLM asks of its list.

    @property
    def num_free_blocks(self) -> int:
        return sum(one.num_free_blocks for one in self._lists)

    def popleft(self) -> Any:
        for one in self._lists:
            if one.num_free_blocks:
                block = one.popleft()
                del self._where[block.block_id]
                return block
        raise ValueError("No free blocks available")

    def popleft_n(self, n: int) -> list[Any]:
        taken: list[Any] = []
        for one in self._lists:
            taken += one.popleft_n(min(n - len(taken), one.num_free_blocks))
        assert len(taken) == n, "vLLM asks for more blocks than are free"
        for block in taken:
            del self._where[block.block_id]
        return taken

    def remove(self, block: Any) -> None:
        self._lists[self._where.pop(block.block_id)].remove(block)

    def append(self, block: Any) -> None:
        self.append_n([block])

    def append_n(self, blocks: Iterable[Any]) -> None:
        for kind, part in self._sorted(blocks):
            self._lists[kind].append_n(part)

    def prepend_n(self, blocks: Iterable[Any]) -> None:
        for kind, part in self._sorted(blocks):
            self._lists[kind].prepend_n(part)

    def get_all_free_blocks(self) -> list[Any]:
        return list(self.iter_blocks_after(None))

    def iter_blocks_after(self, cursor: Any) -> Iterator[Any]:
        """In the order in which they are given away."""
        if cursor is None:
            return chain.from_iterable(iter_all(one) for one in self._lists)
        kind = self._where[cursor.block_id]
        return chain(
            self._lists[kind].iter_blocks_after(cursor),
            chain.from_iterable(iter_all(one) for one in self._lists[kind + 1 :]),
        )

    def _sorted(self, blocks: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
        parts: dict[int, list[Any]] = {}
        for block in blocks:
            self._where[block.block_id] = kind = self._kind(block)
            parts.setdefault(kind, []).append(block)
        return iter(parts.items())

    # What the connector knows besides.

    def kept_elsewhere(self, block: Any, holding: Any) -> None:
        """What the block was `holding` is in donors' HBM too. By now it may hold something else."""
        if block.block_id >= self._local:
            return
        self._kept[block.block_id] = holding
        if self._where.get(block.block_id) == CACHED and block.block_hash == holding:
            self.remove(block)
            self.append(block)

    def forgotten(self) -> None:
        """vLLM has forgotten all prefixes."""
        self._kept.clear()
        self._fill(self.get_all_free_blocks())


class Placement:
    """The scheduler's side of a stitched pool."""

    def __init__(self, free: FreeBlocks, local: int) -> None:
        """Takes vLLM's list over."""
        self._pool = free.pool
        self.local = local
        self._list = LocalFirst(free.free(), local)
        free.replace(self._list)
        free.after_reset(self._list.forgotten)

    def holding(self, blocks: Iterable[int]) -> list[tuple[int, Any]]:
        """What each of the blocks holds now, of those that hold a prefix."""
        found = ((block, self._pool.blocks[block].block_hash) for block in blocks)
        return [(block, held) for block, held in found if held is not None]

    def kept_elsewhere(self, blocks: Iterable[tuple[int, Any]]) -> None:
        """What the blocks were holding is in donors' HBM too."""
        for block, held in blocks:
            self._list.kept_elsewhere(self._pool.blocks[block], held)

    def is_leased(self, blocks: Iterable[int]) -> bool:
        """Whether any of them has bytes in leased slabs."""
        return any(block >= self.local for block in blocks)
