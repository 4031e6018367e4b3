"""Which KV is known to be right, when loads may fail: this connector's and, in vLLM's MultiConnector, others'.

A step in which anything is loaded synchronously is in doubt. If the load fails, what was loaded and all that the step
computes on it is worthless, on every rank and for every request that shares the lost block. The workers' output of
the step settles it: it names the lost blocks, and vLLM has rolled back its requests. Until then only what was
computed before is right. What is loaded asynchronously is in doubt until the request is scheduled: vLLM schedules it
when the load is over.

vLLM's requests compute lost blocks again, but the KV is not always right then. It registers blocks when it allocates
them and relies on one request to compute what was lost. If that request is aborted first, the next one would be
served garbage: so lost blocks, and what follows them, are taken out of vLLM's own prefix cache. A request that shares
a lost block goes on as if it were there. Where vLLM does not recover from a failed synchronous load
(`safety.unrecoverable`), so does every request that had one. These are spoiled: nothing of them is stored, or stays
in vLLM's prefix cache.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from swiftcache.engine.quiet import Quiet
from swiftcache.vllm.tracked import Tracked

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager


class Doubt:
    def __init__(self, *, recovers: bool, block_tokens: int, quiet: Quiet, group: int = 0) -> None:
        """
        Args:
            recovers: this vLLM computes the right KV after a synchronous load has failed.
            block_tokens: of a block of the group.
            group: a group of full attention, whose blocks stand for a request's. Nothing is found without them, and
                other groups have a placeholder in place of what their windows have left.
        """
        self._recovers, self._block_tokens, self._quiet, self._group = recovers, block_tokens, quiet, group
        self._manager: KVCacheManager | None = None
        self._last = 0
        """The last step in doubt."""
        self._settled = 0
        """The last one of which the outcome is known."""
        self._spoiled: dict[str, Tracked] = {}

    def bind(self, manager: KVCacheManager) -> None:
        self._manager = manager

    # The way of a request.

    def admitted(self, tracked: Tracked) -> None:
        """It has got blocks, of which all is computed or loaded anew."""
        tracked.waiting, tracked.doubt, tracked.spoiled = True, 0, None
        self._spoiled.pop(tracked.request.request_id, None)

    def scheduled(self, tracked: Tracked) -> None:
        """It waited, and is in this step. vLLM has seen how any asynchronous load of it ended."""
        tracked.waiting, tracked.doubt = False, self._last

    def computed(self, tracked: Tracked, scheduled: int) -> int:
        """Tokens of a request of this step whose KV is known to be right when the step is over."""
        request = tracked.request
        if tracked.spoiled is not None or tracked.doubt > self._settled:
            return 0
        if self._last > self._settled:
            return request.num_computed_tokens - request.num_in_flight_tokens
        return request.num_computed_tokens + scheduled

    def finished(self, tracked: Tracked, blocks: list[int]) -> int:
        """It has finished, or was aborted, and gives up its blocks. Returns the tokens whose KV is known to be
        right."""
        request = tracked.request
        if tracked.spoiled is not None:
            self._forget(set(blocks[tracked.spoiled :]))
            return 0
        if tracked.doubt > self._settled and request.num_in_flight_tokens:
            # Aborted in a step in doubt. When the outcome is here nobody knows these blocks any more. A request without
            # a step in flight is one of which vLLM has seen the outcome.
            self._forget(set(blocks[tracked.kept :]))
            return 0
        return request.num_computed_tokens - request.num_in_flight_tokens

    def gone(self, request_id: str) -> None:
        self._spoiled.pop(request_id, None)

    # The way of a step.

    def begin(self, loads: bool) -> int:
        """A step is scheduled; `loads`: with synchronous loads. Returns its number if it is in doubt, else 0."""
        if not loads:
            return 0
        self._last += 1
        return self._last

    def settle(self, number: int, lost: set[int], requests: Iterable[Tracked]) -> None:
        """The workers' output of a step is here. `number` is 0 if it was not in doubt; `lost`: blocks that were not
        loaded, whenever that was."""
        if lost:
            self._spoil(lost, requests)
        self._settled = max(self._settled, number)

    def _spoil(self, lost: set[int], requests: Iterable[Tracked]) -> None:
        stale = set(lost)
        for tracked in requests:
            table = [] if tracked.finished else self._table(tracked)
            at = _first(table, lost)
            if at is None:
                continue
            stale.update(table[at:])
            # It goes on from behind the lost block: another request is to compute that.
            shares = tracked.request.num_computed_tokens > at * self._block_tokens
            if not tracked.waiting and (shares or not self._recovers):
                self._mark(tracked, at)
        self._forget(stale)

    def contain(self, requests: Iterable[Tracked], scheduled: Container[str]) -> None:
        """Has vLLM forget what spoiled requests have registered in this step. Requests that were admitted in it, and
        found it already, are spoiled too. `scheduled`: the requests of the step."""
        if not self._spoiled:
            return
        stale: set[int] = set()
        for tracked in self._spoiled.values():
            stale.update(self._registered_since(tracked, scheduled))
        for tracked in requests:
            table = self._table(tracked) if tracked.waiting else []
            at = _first(table, stale)
            if at is not None:
                self._mark(tracked, at)
                stale.update(table[at:])
        self._forget(stale)

    def _registered_since(self, tracked: Tracked, scheduled: Container[str]) -> list[int]:
        """Blocks of a spoiled request that vLLM may have registered since this was asked last. It registers a block
        once: in the next step of the request in which all of the block's tokens are known, and what is loaded
        asynchronously when it has come."""
        request, first = tracked.request, max(tracked.spoiled or 0, tracked.forgotten)
        if first >= request.num_tokens // self._block_tokens:
            # So it is in most steps of a request that decodes.
            return []
        if request.request_id in scheduled and not tracked.waiting:
            known = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens)
            tracked.forgotten = max(first, known // self._block_tokens)
        return self._table(tracked)[first:]

    def _mark(self, tracked: Tracked, at: int) -> None:
        tracked.spoiled, tracked.forgotten = at, 0
        self._spoiled[tracked.request.request_id] = tracked

    def distrust(self, requests: Iterable[Tracked]) -> None:
        """What vLLM has cached of prefixes may be wrong from now on, and what these requests compute on theirs."""
        for tracked in requests:
            if not tracked.finished:
                self._mark(tracked, 0)
        if self._manager is not None:
            self._forget(set(range(len(self._manager.block_pool.blocks))))

    # vLLM's own cache.

    def _table(self, tracked: Tracked) -> list[int]:
        """The blocks that a request has now."""
        if self._manager is None:
            return []
        try:
            return self._manager.get_block_ids(tracked.request.request_id)[self._group]
        except Exception:  # it has none now
            return []

    def _forget(self, blocks: set[int]) -> None:
        """Takes blocks out of vLLM's own prefix cache. Requests that have them keep them."""
        if self._manager is not None and blocks:
            self._quiet.attempt("vLLM would not forget blocks that failed to load", self._manager.evict_blocks, blocks)


def _first(table: list[int], blocks: set[int]) -> int | None:
    """Where the first of the blocks is in a request's table."""
    return next((index for index, block in enumerate(table) if block in blocks), None)
