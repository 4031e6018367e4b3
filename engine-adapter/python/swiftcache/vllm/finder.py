"""What a block of a request is called, and how much of a request every worker can load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from swiftcache.engine.keys import KEY_BYTES, Keys
from swiftcache.engine.quiet import Quiet
from swiftcache.vllm.ends import Ends

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from swiftcache._native import Connection
    from swiftcache.vllm.groups import Group, Groups
    from swiftcache.vllm.metadata import Handshake
    from swiftcache.vllm.updates import Adapters

Tables = Sequence[Sequence[int]]
"""A request's blocks in the pool: of each group. Block 0 of the pool is vLLM's placeholder."""


class Finder:
    def __init__(
        self,
        connection: Connection,
        groups: Groups,
        *,
        block_tokens: int,
        hashes_per_block: int,
        lookup_ms: int,
        quiet: Quiet,
        adapters: Adapters,
    ) -> None:
        self._connection, self._groups, self._adapters = connection, groups, adapters
        self._block_tokens, self._hashes_per_block = block_tokens, hashes_per_block
        self._lookup_ms, self._quiet = lookup_ms, quiet
        self._key = Keys()
        self._ends = Ends()
        self.coming = 0
        """Units behind those that were found last that are on their way from a disk."""
        self.coming_ms = 0
        """How long that may take; 0: nobody knows."""

    def reset(self) -> None:
        """What was stored until now is found no more."""
        self._key.reset()
        self._ends.clear()

    def has_tail(self, request: Request, end: int) -> None:
        """What a request needs of all groups to go on after `end` units is kept."""
        self._ends.add(self._name(request, end))

    def _name(self, request: Request, end: int) -> bytes:
        return bytes(request.block_hashes[end * self._hashes_per_block - 1])

    def hashed(self, request: Request) -> int:
        """Units of a request of which every block has a name."""
        return len(request.block_hashes) // self._hashes_per_block

    def keys(self, request: Request, group: Group, first: int, last: int) -> bytes:
        """Hashes are chained, so that of a block's last part names the block and all before it. What they say of an
        adapter is its name and path."""
        step = self._hashes_per_block // group.per_unit
        hashes = request.block_hashes[first * step + step - 1 : last * step : step]
        adapter = self._adapters.of(request)
        files = adapter.files if adapter is not None else b""
        return self._key.of(hashes, files + self._groups.salt(group))

    def present(
        self, request: Request, first: int, end: int, tables: Tables, *, named: bool
    ) -> tuple[bytes, list[int]]:
        """The blocks of the units from `first` up to `end` that a request has in the pool, of every group: their keys
        and places. Of one group, keys are made only where they are to be `named`: it takes a tenth of a millisecond for
        20,000 tokens, and the first token waits for it."""
        groups = self._groups.all
        if len(groups) == 1:
            keys = self.keys(request, groups[0], first, end) if named else b""
            return keys, list(tables[groups[0].number][first:end])
        # vLLM has no block where a window does not reach, and of states the last one only.
        every = (
            (block, group)
            for unit in range(first, end)
            for group in groups
            for block in range(group.last(unit), group.last(unit + 1))
        )
        wanted = [(block, group) for block, group in every if tables[group.number][block]]
        keys = b"".join(self.keys(request, group, block, block + 1) for block, group in wanted)
        return keys, [tables[group.number][block] for block, group in wanted]

    def find(self, ranks: Sequence[Handshake], request: Request, first: int, last: int) -> tuple[int, int]:
        """How many units from `first` on, up to `last`, every group has, and where full attention by itself would have
        ended."""
        full = self._groups.full
        blocks, coming, self.coming_ms = self._ask(ranks, self._needed(request, full, first, last))
        per_unit = sum(group.per_unit for group in full)
        found = max(0, min(blocks // per_unit, last - first))
        self.coming = max(0, min((blocks + coming) // per_unit, last - first) - found)
        end = first + found
        if not found or not self._groups.tails or self._tails_are_there(ranks, request, first, end):
            return found, end
        earlier = ((one, self._name(request, one)) for one in range(end - 1, first, -1))
        for one in self._ends.before(earlier):
            if self._tails_are_there(ranks, request, first, one):
                return one - first, end
            self._ends.forget(self._name(request, one))
        return 0, end

    def _tails_are_there(self, ranks: Sequence[Handshake], request: Request, first: int, end: int) -> bool:
        tails = self._needed(request, self._groups.tails, first, end)
        return self._count(ranks, tails) == len(tails) // KEY_BYTES if tails else True

    def _needed(self, request: Request, groups: Sequence[Group], first: int, end: int) -> bytes:
        """Keys of the blocks from the unit `first` on that a request needs of some groups to go on after `end`."""
        if len(groups) == 1:
            (group,) = groups
            start = max(group.last(first), group.first(end, self._block_tokens))
            return self.keys(request, group, start, group.last(end))
        blocks = self._groups.blocks(groups, first, end, self._block_tokens)
        return b"".join(self.keys(request, group, block, block + 1) for block, group in blocks)

    def _count(self, ranks: Sequence[Handshake], keys: bytes) -> int:
        return self._ask(ranks, keys)[0]

    def _ask(self, ranks: Sequence[Handshake], keys: bytes) -> tuple[int, int, int]:
        """How many of the first ones of these every worker's own cache can load: from its own leases, its host tier,
        and what its device reaches. How many more are on their way from a disk, and for how many milliseconds."""
        try:
            return self._connection.count(
                [rank.namespace for rank in ranks],
                keys,
                borrowers=[rank.borrower_id for rank in ranks],
                deadline_ms=self._lookup_ms,
            )
        except Exception as reason:
            self._quiet.trouble("a lookup failed", reason)
            return 0, 0, 0
