"""The scheduler's half: what to look up, load and store. It never touches a byte of KV. Prefixes are counted in units
(`groups`).

Which blocks may be stored. A block is offered once it is full, its tokens are known (vLLM has hashed them) and it is
computed after this step at the latest, on KV that is known to be right (`doubt`).

Who may overwrite a block that is still being stored. Of a finished request such blocks are pinned until every worker is
through, and the others are free at once (`pins`). Preempted ones have lost theirs already, to this very step: the
workers wait for the stores first (`fence`). Blocks of a full-attention group are given away in no other way. Those of a
sliding-window group are also given away when the window has moved on: for those the workers wait, too. A block with a
state is given away a step later: it is pinned from the beginning.

With several groups (`groups`) a prefix is found as long as full attention has all of it, and the other groups have its
tail. Tails are kept where somebody is likely to go on: at a prompt's end, at the end of what a request has computed,
and where a lookup found that a tail was missing. Blocks that full attention computes after the prompt are kept when
the request ends, and only with the tail there: a prefix without its tail would be found and could not be used.

Which names blocks have. After an update of the workers' weights, and after a reset, they are other ones than before; of
a LoRA adapter whose files are others than those of the one before, too (`updates`).

States are kept where vLLM offers them, which is at a prompt's end and where it is told to (`junction`): only vLLM knows
which block of a request has the state of which token. So what a request computes after its prompt is not kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from swiftcache.engine.events import Events
from swiftcache.engine.quiet import Quiet
from swiftcache.vllm import claims, events, junction
from swiftcache.vllm.claims import Claims
from swiftcache.vllm.doubt import Doubt
from swiftcache.vllm.finder import Finder, Tables
from swiftcache.vllm.groups import ONE, Group, Groups
from swiftcache.vllm.metadata import Handshake, LoadJob, StepMetadata, StoreJob, WorkerReport
from swiftcache.vllm.metrics import SwiftCacheStats
from swiftcache.vllm.others import Others
from swiftcache.vllm.pins import Pins
from swiftcache.vllm.room import Room
from swiftcache.vllm.tracked import Hit, Tracked
from swiftcache.vllm.updates import Adapters

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from swiftcache._native import Connection
    from swiftcache.engine.loans import Loans
    from swiftcache.engine.settings import Settings
    from swiftcache.vllm.stream.inside import FreeBlocks
    from swiftcache.vllm.stream.placement import Placement

States = dict[int, dict[int, int]]
"""By the end after which a request can go on from them, in units: of each group the block of the pool."""

DISK_ASK_SECONDS = 0.002
"""How often a request that waits for blocks from a disk asks whether they are there."""
ANSWER_SECONDS = 1.0
"""A request that waits for room asks anew after this long: what was found may have gone."""
SETTLING_SECONDS = 0.02
"""As long an engine without requests goes on stepping until its stores are counted: they are over, and it takes a
millisecond, mostly. A request that comes meanwhile waits for a step without tokens at most."""


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
        promises: bool = False,
        events: Events,
        groups: Groups = ONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sync`: loads run inside the step that needs them. `recovers`: this vLLM computes the right KV after a
        synchronous load has failed. `promises`: workers may say that a load is over before it is (`landing`)."""
        self._connection = connection
        self._block_tokens = block_tokens
        self._hashes_per_block = hashes_per_block
        self._sync = sync
        self._promises = promises
        self._workers = workers
        self._events = events
        self._groups = groups
        self._table_of = groups.full[0].number
        """The group of which a request's computed blocks are counted."""
        self._table_units = groups.full[0].per_unit
        self._clock = clock
        self._disk_ms = settings.disk_ms
        self._ranks: list[Handshake] = []
        self._met: dict[tuple[int, int], Handshake] = {}
        self._stepped = False
        self._counted = True
        self._counted_by = 0.0
        """When an engine without requests gives up waiting for its stores to be counted."""
        self._tracked: dict[str, Tracked] = {}
        self._jobs: dict[int, tuple[str, int]] = {}
        self._next_job = 0
        self._loads: list[LoadJob] = []
        self._late: list[StoreJob] = []
        self._moved: list[int] = []
        """Stores of blocks that a window had left when its request was finished."""
        self._arrived: set[str] = set()
        self._claiming = False
        """Something was claimed for this step."""
        self._loans: Loans | None = None
        self._free: FreeBlocks | None = None
        self._placement: Placement | None = None
        self._offered: dict[int, list[tuple[int, Any]]] = {}
        """The blocks of each store, with what they hold, where local ones are to be given away first."""
        self._quiet = Quiet()
        self._adapters = Adapters()
        self._weights: dict[tuple[int, int], int] = {}
        """Of each worker, the updates of its weights that it has reported."""
        self._finder = Finder(
            connection,
            groups,
            adapters=self._adapters,
            block_tokens=block_tokens,
            hashes_per_block=hashes_per_block,
            lookup_ms=settings.lookup_ms,
            quiet=self._quiet,
        )
        self._others = Others()
        self._doubt = Doubt(
            recovers=recovers,
            block_tokens=block_tokens // groups.full[0].per_unit,
            quiet=self._quiet,
            group=self._table_of,
        )
        self._room = Room(groups, block_tokens) if groups.several else None
        self._pins = Pins(workers)
        self._manager: KVCacheManager | None = None
        self.stats = SwiftCacheStats()

    def bind(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._doubt.bind(manager)
        self._pins.bind(manager)

    def lend(self, loans: Loans) -> None:
        """Lends part of the engine's own pool from now on."""
        self._loans = loans

    def stitch(self, free: FreeBlocks) -> None:
        """The engine's pool is stitched: local blocks are to be used first, once workers have said which these are."""
        self._free = free

    def meet(self, workers: Iterable[Handshake]) -> None:
        """All workers. Without them nothing is looked up."""
        self._ranks = list(workers)
        if self._ranks:
            self._events.follow([of.namespace for of in self._ranks], self._connection.watch_index)
        local = [of.local_blocks for of in self._ranks if of.local_blocks is not None]
        if self._free is not None and self._placement is None and local:
            from swiftcache.vllm.stream.placement import Placement

            self._placement = Placement(self._free, min(local))

    def _introduced(self, workers: dict[tuple[int, int], Handshake]) -> None:
        """Some workers, who say in their first report who they are."""
        self._met |= workers
        if len(self._met) == self._workers:
            self.meet(self._met.values())

    # Per request.

    def on_new_request(self, request: Request) -> None:
        self._counted, self._counted_by = False, 0.0
        self._start(request)

    def _start(self, request: Request) -> Tracked:
        adapter = self._adapters.of(request)
        tracked = self._tracked[request.request_id] = Tracked(request, adapter=adapter)
        if adapter is not None:
            if not adapter.files:
                tracked.closed = tracked.failed = True
            if self._adapters.is_another(request, adapter):
                name = request.lora_request.lora_name
                alike = [
                    of
                    for of in self._tracked.values()
                    if of is not tracked and of.adapter is not None and of.request.lora_request.lora_name == name
                ]
                self._doubt.distrust(alike)
        return tracked

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens after those that are computed can be loaded, and whether that is done before the request is
        scheduled. None: it is to ask again in the next step."""
        tracked = self._track(request)
        now = self._clock()
        hit, tracked.claimed = tracked.hit, False
        if tracked.disk_since is not None and now - tracked.disk_asked < DISK_ASK_SECONDS:
            return None, False
        if hit is None or hit.computed != computed or now - hit.at > ANSWER_SECONDS:
            hit = tracked.hit = Hit(computed, *self._look_up(tracked, computed), now)
            if self._waits_for_disk(tracked, now):
                tracked.hit = None
                return None, False
        tokens = hit.blocks * self._block_tokens
        if self._groups.states and hit.junction * self._block_tokens > computed + tokens:
            junction.keep_state_at(request, hit.junction * self._block_tokens)
        if self._room is not None and not self._has_room(self._room, tracked, hit):
            return None, False
        if tokens and (here := self._claims(tracked)) is not None and self._fits(tracked, computed):
            if here.blocks(request.request_id) != hit.blocks:
                self._claim(here, tracked, computed // self._block_tokens, hit.blocks, least=hit.blocks)
            tracked.claimed = here.blocks(request.request_id) == hit.blocks
        return tokens, tokens > 0 and not self._sync and not tracked.claimed

    def _fits(self, tracked: Tracked, computed: int) -> bool:
        """Whether the pool may have room for all of a request. Else vLLM schedules it later, and asks in every step
        until then: what it claimed would be given up again as often, which takes longer than a step's other hooks. What
        vLLM finds in its own cache takes room, too, unless another request has it. So when vLLM had no room after all,
        more is to be free."""
        if self._manager is None:
            return True
        wanted = -(-tracked.request.num_tokens // self._block_tokens) - computed // self._block_tokens
        free = self._free_blocks(self._manager)
        return wanted <= free and (tracked.too_few is None or free > tracked.too_few)

    @staticmethod
    def _free_blocks(manager: KVCacheManager) -> int:
        """What waiting requests may take of the pool."""
        return manager.block_pool.get_num_free_blocks() - getattr(manager, "watermark_blocks", 0)

    def _claims(self, tracked: Tracked) -> Claims | None:
        """Where what this request loads may be claimed, if it may."""
        # Of an adapter the worker knows only later whether it is the one that the blocks are of.
        return self._here() if tracked.adapter is None else None

    def _here(self) -> Claims | None:
        """The claims of the one worker, if it is in this process."""
        if not self._promises or len(self._ranks) != 1:
            return None
        return claims.of(self._ranks[0].borrower_id)

    def _claim(self, here: Claims, tracked: Tracked, first: int, blocks: int, *, least: int = 1) -> int:
        """Claims what the worker has of so many blocks, if there is room for `least` of them."""
        self._claiming = True
        keys = self._finder.keys(tracked.request, self._groups.full[0], first, first + blocks)
        alone = all(of.request.status != RequestStatus.RUNNING for of in self._tracked.values())
        return here.claim(tracked.request.request_id, keys, self._weights, alone=alone, least=least)

    def _waits_for_disk(self, tracked: Tracked, now: float) -> bool:
        """Whether blocks come from a disk sooner than a request may wait for them. The engine goes on meanwhile."""
        since = tracked.disk_since if tracked.disk_since is not None else now
        waited_ms = (now - since) * 1000
        within_ms = max(self._finder.coming_ms, 1) if tracked.disk_since is None else 0
        if not self._finder.coming or waited_ms + within_ms > self._disk_ms:
            tracked.disk_since = None
            return False
        tracked.disk_since, tracked.disk_asked = since, now
        return True

    def _has_room(self, room: Room, tracked: Tracked, hit: Hit) -> bool:
        if not hit.blocks or self._manager is None:
            room.gone(tracked.request.request_id)
            return True
        end = hit.computed // self._block_tokens + hit.blocks
        return room.allows(tracked, end, self._tracked.values(), self._free_blocks(self._manager))

    def _look_up(self, tracked: Tracked, computed: int) -> tuple[int, int]:
        """See `Finder.find`."""
        request, first = tracked.request, computed // self._block_tokens
        # One token at least is left to compute: its logits are what the request came for.
        last = min((request.num_tokens - 1) // self._block_tokens, self._finder.hashed(request))
        self._finder.coming = 0
        if last <= first or tracked.failed or not self._ranks or request.skip_reading_prefix_cache:
            return 0, 0
        self.stats.add("lookups", 1)
        self.stats.add("lookup_tokens", (last - first) * self._block_tokens)
        here = self._claims(tracked)
        own = self._claim(here, tracked, first, last - first) if here is not None else 0
        missing = (last - first - own) * self._block_tokens
        if own and not self._others.worth_asking(missing):
            return own, first + own
        found, junction = self._finder.find(self._ranks, request, first, last)
        if own:
            self._others.answered(missing, found > own)
        # Who does not answer has no more.
        return (found, junction) if found >= own else (own, first + own)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        tracked = self._track(request)
        hit, tracked.hit = tracked.hit, None
        if hit is None:
            # The second call for an asynchronous load: the blocks are known already.
            return
        self._doubt.admitted(tracked)
        tracked.looked, tracked.leased, tracked.promised, tracked.too_few = 0, False, 0, None
        first = hit.computed // self._block_tokens
        count = external // self._block_tokens
        tracked.kept = end = first + count
        if self._groups.tails:
            # What vLLM found in its own cache may be kept nowhere else.
            tracked.tail = end if count else 0
            prompt = request.num_prompt_tokens
            ends = {hit.junction, (prompt - 1) // self._block_tokens}
            if not self._groups.states:
                ends |= {first, prompt // self._block_tokens}
            tracked.ends = sorted(one for one in ends if one > tracked.tail)
        if count == 0:
            return
        self.stats.add("promised_tokens", external)
        if self._groups.tails:
            self._finder.has_tail(request, end)
        tracked.promised = end if self._groups.several else 0
        tracked.loading = not self._sync and not tracked.claimed
        keys, places = self._finder.present(request, first, end, blocks.get_block_ids(), named=not tracked.claimed)
        job = LoadJob(request.request_id, first, keys, places, self._sync, tracked.adapter, tracked.claimed)
        self._loads.append(job)
        if job.claimed and (here := self._claims(tracked)) is not None:
            here.begin(request.request_id, places)
        if self._events.enabled:
            for group in self._groups.full:
                # Whoever stored them: this engine can load them.
                start, last = group.last(first), group.last(end)
                self._tell(request, group, start, self._finder.keys(request, group, start, last))

    def request_finished(self, request: Request, tables: Tables) -> None:
        """vLLM frees its blocks after this."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        if tracked.loading:
            # Aborted while loading: vLLM keeps the blocks until the load is over, and frees them then.
            tracked.finished = True
            return
        if tracked.waiting:
            # Aborted while another connector loads: nothing of it is known to be there, and vLLM keeps the blocks until
            # that load is over. Stores from before a preemption were waited for.
            self._drop(request.request_id)
            return
        if tables:
            done = self._doubt.finished(tracked, tables[self._table_of])
            self._late += self._stores(tracked, done // self._block_tokens, tables, finished=True)
        if not tracked.stores:
            self._drop(request.request_id)
            return
        tracked.finished = True
        # What its window has left may be another's already.
        moved = tracked.left_by_windows(tables)
        self._moved += moved
        tracked.sliding.clear()
        for number, blocks in tracked.stores.items():
            if number not in self._pins and number not in moved:
                self._pins.hold(number, blocks)

    # Per step.

    def metadata(self, output: SchedulerOutput) -> StepMetadata:
        step = StepMetadata(self._loads, self._late, weights=dict(self._weights))
        self._loads, self._late = [], []
        claimed = self._claiming and self._keep_claims(step.loads, output)
        if self._arrived:
            step.arrived = {request: output.num_scheduled_tokens.get(request, 0) > 1 for request in self._arrived}
            self._arrived.clear()
        for request_id in output.preempted_req_ids or ():
            if tracked := self._tracked.get(request_id):
                step.fence.extend(sorted(number for number in tracked.stores if number not in self._pins))
        if self._groups.windows:
            step.fence.extend(self._moved_on())
        if step.stores:
            step.stores = [job for job in step.stores if job.number in self._jobs]
        self._stepped = True
        if self._idle():
            step.idle, self._counted = True, True
            self._counted_by = self._counted_by or self._clock() + SETTLING_SECONDS
        # What is claimed cannot fail, and nobody else loads where anything is claimed.
        step.doubt = self._doubt.begin(output.has_sync_kv_loads and not claimed)
        self._doubt.contain(self._tracked.values(), output.num_scheduled_tokens)
        blocks_of, block_tokens = output.kv_connector_block_state, self._block_tokens
        tails, states = bool(self._groups.tails), bool(self._groups.states)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            if tracked.waiting:
                self._doubt.scheduled(tracked)
            tracked.promised = 0
            most = (tracked.request.num_computed_tokens + scheduled) // block_tokens
            if blocks_of is None or (most <= tracked.kept and not tails):
                # So it is in most steps of a request that decodes.
                continue
            offers = blocks_of.boundary_state_offloads.get(request_id, ()) if states else ()
            if not offers and not self._has_more(tracked, most):
                continue
            full = self._doubt.computed(tracked, scheduled) // block_tokens
            offered = self._offered_states(tracked, full, offers)
            if not offered and not self._has_more(tracked, full):
                continue
            if (tables := blocks_of.get_block_ids(request_id)) is None:
                continue
            step.stores += self._stores(tracked, full, tables, offered)
        if self._placement is not None:
            step.staged = self._staged(output, self._placement)
        if self._loans is not None:
            orders = self._loans.step(lambda: self._wanted(output), bool(output.preempted_req_ids), self.stats)
            step.lend, step.take_back = orders.lend, orders.take_back
        return step

    def _keep_claims(self, loads: list[LoadJob], output: SchedulerOutput) -> bool:
        """Lets go of what was claimed for requests that are not scheduled after all. Returns whether others are."""
        self._claiming = False
        claimed = [job for job in loads if job.claimed]
        for job in claimed:
            job.computes = output.num_scheduled_tokens.get(job.request, 0) > 1
        if (here := self._here()) is not None:
            for request in here.keep({job.request for job in claimed}):
                if self._manager is not None and (tracked := self._tracked.get(request)):
                    tracked.too_few = self._free_blocks(self._manager)
        return bool(claimed)

    def _staged(self, output: SchedulerOutput, placement: Placement) -> int:
        """Blocks of all contexts of a step if any is leased, else 0."""
        total, leased, blocks_of = 0, False, output.kv_connector_block_state
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            total += -(-(tracked.request.num_computed_tokens + scheduled) // self._block_tokens)
            if not tracked.leased and blocks_of is not None and (tables := blocks_of.get_block_ids(request_id)):
                tracked.leased = placement.is_leased(tables[0][tracked.looked :])
                tracked.looked = len(tables[0])
            leased = leased or tracked.leased
        return total if leased else 0

    def _wanted(self, output: SchedulerOutput) -> int:
        """Blocks that requests will need soon and do not have: those of their tokens, and the next ones."""
        wanted = 0
        for request_id, tracked in self._tracked.items():
            if not tracked.finished:
                had = tracked.request.num_computed_tokens + output.num_scheduled_tokens.get(request_id, 0)
                units = tracked.request.num_tokens // self._block_tokens + 2 - -(-had // self._block_tokens)
                wanted += sum(group.held(units) for group in self._groups.all)
        return wanted

    def _offered_states(self, tracked: Tracked, full: int, offers: Iterable[tuple[int, int, int]]) -> States:
        """What vLLM offers of a request's states: at which ends it offers those of every group."""
        found: States = {}
        for group, block, tokens in offers:
            end, part = divmod(tokens, self._block_tokens)
            # An offer within a unit is for those who find prefixes of parts of a block.
            if not part and tracked.tail < end <= full:
                found.setdefault(end, {})[group] = block
        return {end: blocks for end, blocks in found.items() if len(blocks) == len(self._groups.states)}

    def _has_more(self, tracked: Tracked, full: int) -> bool:
        """Whether anything of a request that goes on is to be kept, once its first `full` units are computed."""
        if self._groups.tails and not tracked.ends:
            return False
        return full > tracked.kept or tracked.reaches_end(full)

    def _stores(
        self, tracked: Tracked, full: int, tables: Tables, states: States | None = None, finished: bool = False
    ) -> list[StoreJob]:
        """What is to be kept of a request whose first `full` units are right when this step is over. `states`: those
        that vLLM offers."""
        full = min(full, self._finder.hashed(tracked.request), len(tables[self._table_of]) // self._table_units)
        if tracked.closed:
            return []
        jobs: list[StoreJob] = []
        if self._groups.tails:
            prompt = bool(tracked.ends) and not finished
            if finished:
                tracked.ends = sorted({end for end in tracked.ends if end < full} | {full})
            elif states:
                tracked.ends = sorted({*tracked.ends, *states})
            while tracked.reaches_end(full):
                end = tracked.ends.pop(0)
                jobs += self._tail(tracked, end, tables, (states or {}).get(end, {}))
            # See the module.
            if not prompt or (self._groups.states and not tracked.ends):
                full = min(full, tracked.tail)
        first, tracked.kept = tracked.kept, max(full, tracked.kept)
        if first < full:
            for group in self._groups.full:
                start = group.last(first)
                jobs.append(self._store(tracked, group, start, tables[group.number][start : group.last(full)]))
        return jobs

    def _tail(self, tracked: Tracked, end: int, tables: Tables, states: Mapping[int, int]) -> list[StoreJob]:
        """Keeps what a request needs of all but full attention to go on after `end` units: all of it, or nothing.
        `states`: the block of each group that vLLM offers."""
        if end <= tracked.tail or len(states) < len(self._groups.states):
            return []
        parts = []
        for group in self._groups.windows:
            first = max(group.first(end, self._block_tokens), group.last(tracked.tail))
            blocks = tables[group.number][first : group.last(end)]
            if len(blocks) < group.last(end) - first or not all(blocks):
                return []
            parts.append((group, first, blocks))
        tracked.tail = end
        self._finder.has_tail(tracked.request, end)
        jobs = []
        for group, first, blocks in parts:
            if blocks:
                job = self._store(tracked, group, first, blocks)
                tracked.sliding[job.number] = (group.number, first, job.blocks)
                jobs.append(job)
        for group in self._groups.states:
            job = self._store(tracked, group, group.last(end) - 1, [states[group.number]])
            self._pins.hold(job.number, job.blocks)
            jobs.append(job)
        return jobs

    def _store(self, tracked: Tracked, group: Group, first: int, blocks: Sequence[int]) -> StoreJob:
        """Of a group, the request's blocks from `first` on, a number of the group's own blocks."""
        request, last = tracked.request, first + len(blocks)
        number, self._next_job = self._next_job, self._next_job + 1
        tracked.stores[number] = list(blocks)
        self._jobs[number] = (request.request_id, 0)
        if self._placement is not None:
            self._offered[number] = self._placement.holding(blocks)
        keys = self._finder.keys(request, group, first, last)
        self._tell(request, group, first, keys)
        return StoreJob(number, request.request_id, keys, tracked.stores[number], tracked.adapter)

    def _tell(self, request: Request, group: Group, first: int, keys: bytes) -> None:
        """Has what becomes of a request's blocks from `first` on reported."""
        of = group if self._groups.several else None
        step, size = self._hashes_per_block // group.per_unit, self._block_tokens // group.per_unit
        self._events.offered(keys, lambda number: events.block(request, first + number, step, size, of))

    def _moved_on(self) -> list[int]:
        """Stores of blocks that vLLM has given up since, because the window has moved on."""
        moved, self._moved = self._moved, []
        for request_id, tracked in self._tracked.items():
            if tracked.sliding:
                tables = self._manager.get_block_ids(request_id) if self._manager is not None else ()
                moved += tracked.left_by_windows(tables)
        return moved

    def worker_output(self, output: KVConnectorOutput) -> None:
        report = output.kv_connector_worker_meta
        if report is None and not output.invalid_block_ids and not output.finished_recving:
            # So it is in most steps.
            return
        if isinstance(report, WorkerReport):
            if report.met:
                self._introduced(report.met)
            if report.weights:
                self._updated(report.weights)
            # The last first: see `Pins.done`.
            for number, workers in sorted(report.done.items(), reverse=True):
                self._job_done(number, workers, number in report.lost)
            for request_id, block in report.failed.items():
                self._load_failed(request_id, block)
            if self._loans is not None:
                self._loans.heard(report.back, report.lend_refused, self.stats)
            if report.unsettled and self._clock() < self._counted_by:
                self._counted = False
        settled = report.settled if isinstance(report, WorkerReport) else 0
        self._doubt.settle(settled, output.invalid_block_ids, self._tracked.values())
        for request_id in output.finished_recving or ():
            if self._promises:
                self._arrived.add(request_id)
            if tracked := self._tracked.get(request_id):
                tracked.loading = False
                if tracked.finished:
                    self._drop(request_id)

    def _updated(self, weights: Mapping[tuple[int, int], int]) -> None:
        """Workers have other weights. They have done nothing since that was ordered by old names."""
        self._weights |= weights
        self.reset()
        self._doubt.distrust(self._tracked.values())
        late, self._late = self._late, []
        for job in late:
            self._job_done(job.number, self._workers, True)

    def _job_done(self, number: int, workers: int, lost: bool) -> None:
        self._pins.done(number, workers)
        request_id, so_far = self._jobs.get(number, ("", 0))
        if not request_id:
            return
        if lost:
            self._offered.pop(number, None)
        if so_far + workers < self._workers:
            self._jobs[number] = (request_id, so_far + workers)
            return
        del self._jobs[number]
        if self._placement is not None and (offered := self._offered.pop(number, None)):
            self._placement.kept_elsewhere(offered)
        if tracked := self._tracked.get(request_id):
            tracked.stores.pop(number, None)
            tracked.sliding.pop(number, None)
            if tracked.finished and not tracked.stores and not tracked.loading:
                self._drop(request_id)

    def _load_failed(self, request_id: str, block: int) -> None:
        self.stats.add("failed_loads", 1)
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        tracked.failed = True
        tracked.kept = min(tracked.kept, block)

    def _drop(self, request_id: str) -> None:
        self._doubt.gone(request_id)
        if self._room is not None:
            self._room.gone(request_id)
        if tracked := self._tracked.pop(request_id, None):
            for number in tracked.stores:
                self._jobs.pop(number, None)
                self._offered.pop(number, None)

    def frees_pending(self) -> bool:
        return bool(self._pins) or (self._loans is not None and self._loans.frees_pending())

    def wants_steps(self) -> bool:
        """Whether vLLM should take a step though no request needs one: for stores that are not known to be over, for
        loans, for the workers' first report, or for what they have counted since their last one."""
        introductions = not self._ranks and not self._stepped
        lends = self._loans is not None and self._loans.wants_steps()
        return introductions or bool(self._pins) or self._idle() or lends

    def _idle(self) -> bool:
        """Whether all requests are over, and what the workers did for them is not counted yet."""
        return not self._counted and not self._tracked

    def reset(self) -> bool:
        """Forgets everything: what this engine stored until now, it finds no more. Others' engines do."""
        self._finder.reset()
        self._events.reset()
        for tracked in self._tracked.values():
            tracked.closed = True
            tracked.hit = None
        return True

    def take_stats(self) -> SwiftCacheStats | None:
        if self.stats.is_empty():
            return None
        stats, self.stats = self.stats, SwiftCacheStats()
        return stats

    def take_events(self) -> Iterable[Any]:
        return events.of(self._events.take()) if self._events.enabled else ()

    def _track(self, request: Request) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._start(request)
        return tracked

    def close(self) -> None:
        self._events.close()
        self._connection.close()
