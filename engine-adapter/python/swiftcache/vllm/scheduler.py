"""The scheduler's half: what to look up, load and store. It never touches a byte of KV.

Which blocks may be stored. A block is offered once it is full, its tokens are known (vLLM has hashed them) and it is
computed after this step at the latest. A step in which anything is loaded synchronously is the exception, also when
another connector loads it (vLLM's MultiConnector). If the load fails, what was loaded and all that the step computes on
it is worthless, on every rank and for every request that shares the lost block. Such a step is in doubt until the
workers' output of it is here: it names the lost blocks, and vLLM has rolled back its requests. Until then only what was
computed before is offered. What other connectors load asynchronously is in doubt until the request is scheduled: vLLM
schedules it when the load is over.

What is done when blocks were lost. vLLM's requests compute them again, but not always right: see `_spoil`.

Who may overwrite a block that is still being stored. Finished requests keep their blocks until every worker is
through (`request_finished`). Preempted ones have lost theirs already, to this very step: the workers wait for the
stores first (`fence`). Blocks of a full-attention group are given away in no other way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swiftcache.engine.events import Events
from swiftcache.engine.keys import Keys
from swiftcache.engine.quiet import Quiet
from swiftcache.vllm import events
from swiftcache.vllm.metadata import LoadJob, StepMetadata, StoreJob, WorkerReport
from swiftcache.vllm.metrics import SwiftCacheStats

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from swiftcache._native import Connection
    from swiftcache.engine.loans import Loans
    from swiftcache.engine.settings import Settings

ANSWER_SECONDS = 1.0
"""A request that waits for room asks anew after this long: what was found may have gone."""


@dataclass(slots=True)
class Hit:
    computed: int
    blocks: int
    at: float


@dataclass(slots=True)
class Tracked:
    request: Request
    hit: Hit | None = None
    kept: int = 0
    """Leading blocks that are kept, on their way, or were found in vLLM's own cache."""
    stores: set[int] = field(default_factory=set)
    """Store jobs that are not known to be over."""
    loading: bool = False
    """An asynchronous load is under way; vLLM keeps the blocks until it is over."""
    waiting: bool = False
    """It has blocks and has not been scheduled since it got them: others may still be loading into them."""
    doubt: int = 0
    """The last step in doubt when it was scheduled first. Until that is settled, nobody knows whether the blocks that
    it started from are there."""
    spoiled: int | None = None
    """From this block on its KV is wrong, or not known to be right: see `_spoil`."""
    failed: bool = False
    """A load failed: whatever is promised, this request does not try again."""
    closed: bool = False
    """Nothing more of it is stored: its KV is older than a reset."""
    finished: bool = False


class SchedulerSide:
    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        *,
        block_tokens: int,
        hashes_per_block: int,
        sync: bool,
        recovers: bool,
        workers: int,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sync`: loads run inside the step that needs them. `recovers`: this vLLM computes the right KV after a
        synchronous load has failed."""
        self._connection = connection
        self._lookup_ms = settings.lookup_ms
        self._block_tokens = block_tokens
        self._hashes_per_block = hashes_per_block
        self._sync = sync
        self._recovers = recovers
        self._workers = workers
        self._events = events
        self._clock = clock
        self._namespaces: list[str] = []
        self._tracked: dict[str, Tracked] = {}
        self._jobs: dict[int, tuple[str, int]] = {}
        self._next_job = 0
        self._loads: list[LoadJob] = []
        self._late: list[StoreJob] = []
        self._retained: list[str] = []
        self._kept_back: set[str] = set()
        self._doubt = 0
        """The last step in doubt."""
        self._settled = 0
        """The last one of which the outcome is known."""
        self._spoiled: set[str] = set()
        self._key = Keys()
        self._manager: KVCacheManager | None = None
        self._loans: Loans | None = None
        self._quiet = Quiet()
        self.stats = SwiftCacheStats()

    def bind(self, manager: KVCacheManager) -> None:
        self._manager = manager

    def lend(self, loans: Loans) -> None:
        """Lends part of the engine's own pool from now on."""
        self._loans = loans

    def namespaces(self, namespaces: Iterable[str]) -> None:
        """Those of all workers. Without them nothing is looked up."""
        self._namespaces = sorted(set(namespaces))

    # Per request.

    def on_new_request(self, request: Request) -> None:
        self._tracked[request.request_id] = Tracked(request)

    def matched_tokens(self, request: Request, computed: int) -> tuple[int, bool]:
        tracked = self._track(request)
        now = self._clock()
        hit = tracked.hit
        if hit is None or hit.computed != computed or now - hit.at > ANSWER_SECONDS:
            hit = tracked.hit = Hit(computed, self._look_up(tracked, computed), now)
        tokens = hit.blocks * self._block_tokens
        return tokens, tokens > 0 and not self._sync

    def _look_up(self, tracked: Tracked, computed: int) -> int:
        request = tracked.request
        first = computed // self._block_tokens
        # One token at least is left to compute: its logits are what the request came for.
        last = min((request.num_tokens - 1) // self._block_tokens, self._hashed(request))
        if last <= first or tracked.failed or not self._namespaces or request.skip_reading_prefix_cache:
            return 0
        try:
            found = self._connection.count_hits(
                self._namespaces, self._keys(request, first, last), deadline_ms=self._lookup_ms
            )
        except Exception as reason:
            self._quiet.trouble("a lookup failed", reason)
            found = 0
        self.stats.add("lookups", 1)
        self.stats.add("lookup_tokens", (last - first) * self._block_tokens)
        return max(0, min(found, last - first))

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        tracked = self._track(request)
        hit, tracked.hit = tracked.hit, None
        if hit is None:
            # The second call for an asynchronous load: the blocks are known already.
            return
        # All of it is computed or loaded anew.
        tracked.waiting, tracked.doubt, tracked.spoiled = True, 0, None
        self._spoiled.discard(request.request_id)
        first = hit.computed // self._block_tokens
        count = external // self._block_tokens
        tracked.kept = first + count
        if count == 0:
            return
        self.stats.add("promised_tokens", external)
        tracked.loading = not self._sync
        self._loads.append(
            LoadJob(
                request.request_id,
                first,
                self._keys(request, first, first + count),
                list(blocks.get_block_ids()[0][first : first + count]),
                self._sync,
            )
        )

    def request_finished(self, request: Request, blocks: list[int]) -> bool:
        """Whether vLLM must keep the blocks until the workers say that they are through."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return False
        if tracked.loading:
            # Aborted while loading: vLLM keeps the blocks until the load is over, and frees them then.
            tracked.finished = True
            return False
        if tracked.waiting:
            # Aborted while another connector loads: nothing of it is known to be there, and vLLM keeps the blocks until
            # that load is over. Stores from before a preemption were waited for.
            self._drop(request.request_id)
            return False
        if tracked.spoiled is not None:
            self._forget_locally(set(blocks[tracked.spoiled :]))
        done = request.num_computed_tokens - request.num_in_flight_tokens
        if tracked.doubt > self._settled and request.num_in_flight_tokens:
            # Aborted in a step in doubt. When the outcome is here nobody knows these blocks any more. A request without
            # a step in flight is one of which vLLM has seen the outcome.
            self._forget_locally(set(blocks[tracked.kept :]))
            done = 0
        job = self._store(tracked, min(done // self._block_tokens, len(blocks)), blocks)
        if job is not None:
            self._late.append(job)
        if not tracked.stores:
            self._drop(request.request_id)
            return False
        tracked.finished = True
        self._retained.append(request.request_id)
        self._kept_back.add(request.request_id)
        return True

    # Per step.

    def metadata(self, output: SchedulerOutput) -> StepMetadata:
        step = StepMetadata(self._loads, self._late, [], self._retained)
        self._loads, self._late, self._retained = [], [], []
        for request_id in output.preempted_req_ids or ():
            if tracked := self._tracked.get(request_id):
                step.fence.extend(sorted(tracked.stores))
        step.stores = [job for job in step.stores if job.number in self._jobs]
        if output.has_sync_kv_loads:
            self._doubt += 1
            step.doubt = self._doubt
        if self._spoiled:
            self._contain()
        blocks_of = output.kv_connector_block_state
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            if tracked.waiting:
                tracked.waiting, tracked.doubt = False, self._doubt
            full = self._computed(tracked, scheduled) // self._block_tokens
            if full <= tracked.kept or blocks_of is None:
                continue
            if (tables := blocks_of.get_block_ids(request_id)) is None:
                continue
            if job := self._store(tracked, min(full, len(tables[0])), tables[0]):
                step.stores.append(job)
        if self._loans is not None:
            orders = self._loans.step(lambda: self._wanted(output), bool(output.preempted_req_ids), self.stats)
            step.lend, step.take_back = orders.lend, orders.take_back
        return step

    def _computed(self, tracked: Tracked, scheduled: int) -> int:
        """Tokens of a request of this step whose KV is known to be right when the step is over."""
        request = tracked.request
        if self._settled == self._doubt:
            return request.num_computed_tokens + scheduled
        if tracked.doubt > self._settled:
            return 0
        return request.num_computed_tokens - request.num_in_flight_tokens

    def _wanted(self, output: SchedulerOutput) -> int:
        """Blocks that requests will need soon and do not have: those of their tokens, and the next one."""
        wanted = 0
        for request_id, tracked in self._tracked.items():
            if not tracked.finished:
                had = tracked.request.num_computed_tokens + output.num_scheduled_tokens.get(request_id, 0)
                wanted += tracked.request.num_tokens // self._block_tokens + 2 - -(-had // self._block_tokens)
        return wanted

    def _store(self, tracked: Tracked, full: int, blocks: list[int]) -> StoreJob | None:
        request, first = tracked.request, tracked.kept
        full = min(full, self._hashed(request))
        if full <= first or tracked.closed or tracked.spoiled is not None:
            return None
        number, self._next_job = self._next_job, self._next_job + 1
        tracked.kept = full
        tracked.stores.add(number)
        self._jobs[number] = (request.request_id, 0)
        self._events.offered(
            number, lambda: events.stored(request, first, full, self._hashes_per_block, self._block_tokens)
        )
        return StoreJob(number, request.request_id, self._keys(request, first, full), list(blocks[first:full]))

    def worker_output(self, output: KVConnectorOutput) -> None:
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            for number, workers in report.done.items():
                self._job_done(number, workers, number in report.lost)
            for request_id, block in report.failed.items():
                self._load_failed(request_id, block)
            if self._loans is not None:
                self._loans.heard(report.back, report.lend_refused, self.stats)
        if output.invalid_block_ids:
            self._spoil(output.invalid_block_ids)
        if isinstance(report, WorkerReport):
            self._settled = max(self._settled, report.settled)
        for request_id in output.finished_recving or ():
            if tracked := self._tracked.get(request_id):
                tracked.loading = False
                if tracked.finished:
                    self._drop(request_id)
        for request_id in output.finished_sending or ():
            self._kept_back.discard(request_id)
            self._drop(request_id)

    def _job_done(self, number: int, workers: int, lost: bool) -> None:
        request_id, so_far = self._jobs.get(number, ("", 0))
        if not request_id:
            return
        if lost:
            self._events.gone(number)
        if so_far + workers < self._workers:
            self._jobs[number] = (request_id, so_far + workers)
            return
        del self._jobs[number]
        self._events.kept(number)
        if tracked := self._tracked.get(request_id):
            tracked.stores.discard(number)

    def _load_failed(self, request_id: str, block: int) -> None:
        self.stats.add("failed_loads", 1)
        if tracked := self._tracked.get(request_id):
            tracked.failed = True
            if block < (kept := tracked.kept):
                self._events.removed(lambda: events.removed(tracked.request, block, kept, self._hashes_per_block))
                tracked.kept = block

    def _spoil(self, lost: set[int]) -> None:
        """Keeps what was computed on lost blocks from being found, in vLLM's own prefix cache too.

        vLLM registers blocks when it allocates them and relies on a request to compute what was lost again. If that
        request is aborted first, the next one would be served garbage: so lost blocks, and what follows them, are
        forgotten. A request that shares a lost block goes on as if it were there, and is spoiled. Where vLLM does not
        recover from a failed synchronous load, so is every request that had one. A request whose load was asynchronous
        has computed nothing on it.
        """
        stale = set(lost)
        for request_id, tracked in self._tracked.items():
            if tracked.finished:
                continue
            table = self._table(request_id)
            at = _first(table, lost)
            if at is None:
                continue
            stale.update(table[at:])
            shares = tracked.request.num_computed_tokens > at * self._block_tokens
            if not tracked.waiting and (shares or not self._recovers):
                tracked.spoiled = at
                self._spoiled.add(request_id)
        self._forget_locally(stale)

    def _contain(self) -> None:
        """Has vLLM forget what spoiled requests have registered in this step. Requests that were admitted in it, and
        found it already, are spoiled too."""
        stale: set[int] = set()
        for request_id in self._spoiled:
            stale.update(self._table(request_id)[self._tracked[request_id].spoiled :])
        for request_id, tracked in self._tracked.items():
            if not tracked.waiting:
                continue
            table = self._table(request_id)
            at = _first(table, stale)
            if at is not None:
                tracked.spoiled = at
                self._spoiled.add(request_id)
                stale.update(table[at:])
        self._forget_locally(stale)

    def _table(self, request_id: str) -> list[int]:
        """The blocks that a request has now."""
        if self._manager is None:
            return []
        try:
            return self._manager.get_block_ids(request_id)[0]
        except Exception:  # it has none now
            return []

    def _forget_locally(self, blocks: set[int]) -> None:
        """Takes blocks out of vLLM's own prefix cache. Requests that have them keep them."""
        if self._manager is None or not blocks:
            return
        try:
            self._manager.evict_blocks(blocks)
        except Exception as reason:
            self._quiet.trouble("vLLM would not forget blocks that failed to load", reason)

    def _drop(self, request_id: str) -> None:
        self._spoiled.discard(request_id)
        if tracked := self._tracked.pop(request_id, None):
            for number in tracked.stores:
                self._jobs.pop(number, None)
                self._events.gone(number)

    def frees_pending(self) -> bool:
        return bool(self._kept_back) or (self._loans is not None and self._loans.frees_pending())

    def wants_steps(self) -> bool:
        return self._loans is not None and self._loans.wants_steps()

    def reset(self) -> bool:
        """Forgets everything: what this engine stored until now, it finds no more. Others' engines do."""
        self._key.reset()
        for tracked in self._tracked.values():
            tracked.closed = True
            tracked.hit = None
        return True

    def take_stats(self) -> SwiftCacheStats | None:
        stats, self.stats = self.stats, SwiftCacheStats()
        return None if stats.is_empty() else stats

    def take_events(self) -> Iterable[Any]:
        return self._events.take()

    # Hashes.

    def _track(self, request: Request) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = Tracked(request)
        return tracked

    def _hashed(self, request: Request) -> int:
        return len(request.block_hashes) // self._hashes_per_block

    def _keys(self, request: Request, first: int, last: int) -> bytes:
        """Hashes are chained, so that of a block's last part names the block and all before it."""
        step = self._hashes_per_block
        return self._key.of(request.block_hashes[first * step + step - 1 : last * step : step])

    def close(self) -> None:
        self._connection.close()


def _first(table: list[int], blocks: set[int]) -> int | None:
    """Where the first of the blocks is in a request's table."""
    return next((index for index, block in enumerate(table) if block in blocks), None)
