"""The scheduler's half against made-up requests: what it promises, offers, holds back and forgets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import stage
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from swiftcache.engine.events import Events
from swiftcache.engine.loans import Orders
from swiftcache.engine.settings import Settings
from swiftcache.vllm.metadata import Handshake, WorkerReport
from swiftcache.vllm.scheduler import ANSWER_SECONDS, SETTLING_SECONDS, SchedulerSide

NAMESPACES = ["m/tp0of2", "m/tp1of2"]
WORKERS = [Handshake(name, bytes([rank]) * 16) for rank, name in enumerate(NAMESPACES)]


class Stand:
    def __init__(
        self,
        native,
        *,
        sync: bool = True,
        recovers: bool = True,
        promises: bool = False,
        workers: int = 1,
        events: bool = False,
    ) -> None:
        self.native, self.now = native, 0.0
        self.side = SchedulerSide(
            Settings(),
            native.Connection("", name="test"),
            block_tokens=stage.BLOCK,
            hashes_per_block=1,
            sync=sync,
            recovers=recovers,
            workers=workers,
            promises=promises,
            events=Events(events),
            clock=lambda: self.now,
        )
        self.side.meet(WORKERS)
        self.pinned: list[int] = []
        self.freed: list[int] = []
        """In the order in which vLLM would give them away."""
        pool = SimpleNamespace(
            blocks=range(100),
            touch=self.pinned.extend,
            free_blocks=self._free,
        )
        self.side._pins.bind(SimpleNamespace(block_pool=pool))

    def _free(self, blocks) -> None:
        for block in blocks:
            self.pinned.remove(block)
            self.freed.append(block)

    def idle_step(self):
        """A step that no request needs, if the scheduler wants one."""
        return self.side.metadata(stage.output({}, {})) if self.side.wants_steps() else None

    def publish(self, request, blocks: int, namespaces=NAMESPACES) -> None:
        keys = self.side._finder.keys(request, self.side._groups.full[0], 0, blocks)
        for name in namespaces:
            self.native.published.setdefault(name, {}).update({key: [] for key in self.native.split(keys)})

    def lookups(self) -> int:
        return sum(1 for call in self.native.calls if call[0] == "count_hits")

    def admit(self, request, external: int, table: list[int]) -> None:
        self.side.allocated(request, stage.allocation(table), external)

    def step(self, request, tokens: int, table: list[int], **more):
        return self.side.metadata(stage.output({request.request_id: tokens}, {request.request_id: table}, **more))

    def settle(self, step, lost: set[int] = frozenset()) -> None:
        """The workers' output of a step in doubt, after vLLM has taken note of lost blocks."""
        assert step.doubt > 0
        report = WorkerReport(settled=step.doubt)
        self.side.worker_output(stage.answer(kv_connector_worker_meta=report, invalid_block_ids=set(lost)))


@pytest.fixture
def stand(native):
    return Stand(native)


def test_a_hit_must_be_there_for_every_rank(stand) -> None:
    request = stage.request("a", 17)
    stand.publish(request, 4)
    del stand.native.published[NAMESPACES[1]][request.block_hashes[2][:16]]
    assert stand.side.matched_tokens(request, 0) == (8, False)


def test_what_a_worker_keeps_in_host_memory_is_a_hit_when_every_rank_has_it(stand) -> None:
    request = stage.request("a", 17)
    keys = [key[:16] for key in request.block_hashes]
    # One rank has two on donors and the rest in host memory, the other the first three in host memory.
    stand.publish(request, 2, NAMESPACES[:1])
    stand.native.hosts[WORKERS[0].borrower_id] = set(keys[2:])
    stand.native.hosts[WORKERS[1].borrower_id] = set(keys[:3])
    assert stand.side.matched_tokens(request, 0) == (12, False)


def test_workers_of_one_namespace_are_asked_for_each(stand) -> None:
    """Every worker has host memory of its own, whatever they share on donors."""
    stand.side.meet([Handshake("m", bytes(16)), Handshake("m", bytes([1]) * 16)])
    request = stage.request("a", 17)
    stand.native.hosts[bytes(16)] = {key[:16] for key in request.block_hashes}
    assert stand.side.matched_tokens(request, 0) == (0, False)


def test_one_token_is_always_left_to_compute(stand) -> None:
    for tokens, promised in ((16, 12), (17, 16), (4, 0), (3, 0)):
        request = stage.request(f"r{tokens}", tokens)
        stand.publish(request, 9)
        assert stand.side.matched_tokens(request, 0)[0] == promised


def test_one_lookup_for_each_request_until_it_has_waited_long(stand) -> None:
    request = stage.request("a", 17)
    for _ in range(3):
        stand.side.matched_tokens(request, 4)
    assert stand.lookups() == 1
    assert stand.native.calls[0][2] == 3, "only hashes beyond what is computed"
    stand.now += 2 * ANSWER_SECONDS
    stand.side.matched_tokens(request, 4)
    assert stand.lookups() == 2


def test_no_lookup_without_namespaces_or_when_the_request_forbids(stand) -> None:
    request = stage.request("a", 17)
    request.skip_reading_prefix_cache = True
    assert stand.side.matched_tokens(request, 0) == (0, False)
    stand.side.meet([])
    assert stand.side.matched_tokens(stage.request("b", 17), 0) == (0, False)
    assert stand.lookups() == 0


def test_a_request_waits_for_what_comes_from_a_disk_and_the_engine_goes_on(stand) -> None:
    request = stage.request("a", 17)
    stand.native.coming.extend([(4, 100), (4, 100), (0, 0)])
    assert stand.side.matched_tokens(request, 0) == (None, False)
    # Asked in the same moment, it asks nobody.
    assert stand.side.matched_tokens(request, 0) == (None, False)
    assert stand.lookups() == 1
    stand.now += 0.01
    assert stand.side.matched_tokens(request, 0) == (None, False)
    stand.publish(request, 4)
    stand.now += 0.01
    assert stand.side.matched_tokens(request, 0) == (16, False)
    assert stand.lookups() == 3


def test_a_request_waits_for_a_disk_no_longer_than_it_may(stand) -> None:
    request = stage.request("a", 17)
    stand.publish(request, 2)
    stand.native.coming.extend([(4, 0)] * 5)
    assert stand.side.matched_tokens(request, 0) == (None, False)
    stand.now += 10
    assert stand.side.matched_tokens(request, 0) == (8, False), "what is there is used"
    # A disk that takes longer than that is not waited for at all.
    other = stage.request("b", 17)
    stand.native.coming[:] = [(4, 60_000)]
    assert stand.side.matched_tokens(other, 0) == (8, False)


def test_trouble_in_a_lookup_is_a_miss(stand, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(stand.native.Connection, "count_hits", fail)
    assert stand.side.matched_tokens(stage.request("a", 17), 0) == (0, False)


def test_what_is_loaded_is_what_was_promised_and_is_not_stored_again(stand) -> None:
    request = stage.request("a", 21)
    stand.publish(request, 3)
    assert stand.side.matched_tokens(request, 4) == (8, False)
    table = [10, 11, 12, 13, 14, 15]
    stand.admit(request, 8, table)
    request.num_computed_tokens = 12
    step = stand.step(request, 9, table, loads=True)
    (load,) = step.loads
    assert (load.first, load.blocks, load.sync) == (1, [11, 12], True)
    assert load.keys == b"".join(key[:16] for key in request.block_hashes[1:3])
    assert step.stores == [], "computed on top of a load that may yet fail"
    stand.settle(step)
    request.num_computed_tokens = 21
    stage.grow(request, 1)
    (store,) = stand.step(request, 1, table).stores
    assert store.blocks == [13, 14]


def test_blocks_are_stored_once_when_they_are_full(stand) -> None:
    request = stage.request("a", 6)
    stand.side.matched_tokens(request, 0)
    table = [5, 6, 7]
    stand.admit(request, 0, table)
    assert [job.blocks for job in stand.step(request, 4, table).stores] == [[5]]
    request.num_computed_tokens = 4
    assert stand.step(request, 2, table).stores == []
    request.num_computed_tokens = 6
    stage.grow(request, 1)
    assert stand.step(request, 1, table).stores == []
    request.num_computed_tokens = 7
    stage.grow(request, 1)
    assert [job.blocks for job in stand.step(request, 1, table).stores] == [[6]]


def test_a_block_whose_last_token_is_not_known_is_not_stored(stand) -> None:
    """Asynchronous scheduling computes a token before the scheduler has seen it."""
    request = stage.request("a", 7)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    stand.step(request, 7, [1, 2])
    request.num_computed_tokens = 7
    assert stand.step(request, 1, [1, 2]).stores == []
    stage.grow(request, 1)
    request.num_computed_tokens = 8
    assert [job.blocks for job in stand.step(request, 1, [1, 2]).stores] == [[2]]


def test_an_asynchronous_load_is_allocated_twice_and_loaded_once(native) -> None:
    stand = Stand(native, sync=False)
    request = stage.request("a", 17)
    stand.publish(request, 2)
    assert stand.side.matched_tokens(request, 0) == (8, True)
    stand.admit(request, 8, [1, 2])
    step = stand.side.metadata(stage.output({}, {}))
    assert [job.sync for job in step.loads] == [False]
    stand.side.worker_output(stage.answer(finished_recving={"a"}))
    stand.admit(request, 0, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 8
    step = stand.step(request, 9, [1, 2, 3, 4, 5])
    assert step.loads == []
    assert [job.blocks for job in step.stores] == [[3, 4]]


@pytest.mark.parametrize("tokens", [9, 1, 0])
def test_workers_hear_once_what_becomes_of_the_blocks_of_a_load_that_may_still_run(native, tokens: int) -> None:
    stand = Stand(native, sync=False, promises=True)
    request = stage.request("a", 17)
    stand.publish(request, 2)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 8, [1, 2])
    assert stand.side.metadata(stage.output({}, {})).arrived == {}
    stand.side.worker_output(stage.answer(finished_recving={"a"}))
    if tokens:
        stand.admit(request, 0, [1, 2, 3, 4, 5])
        request.num_computed_tokens = 8
        step = stand.step(request, tokens, [1, 2, 3, 4, 5])
    else:
        stand.side.request_finished(request, ())
        step = stand.side.metadata(stage.output({}, {}))
    # A step of one token may be a graph that calls no hooks.
    assert step.arrived == {"a": tokens == 9}
    assert stand.side.metadata(stage.output({}, {})).arrived == {}


def test_a_failed_load_is_not_tried_again_and_its_blocks_are_stored_anew(native) -> None:
    stand = Stand(native, sync=False)
    request = stage.request("a", 17)
    stand.publish(request, 3)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 12, [1, 2, 3])
    stand.side.metadata(stage.output({}, {}))
    report = WorkerReport(failed={"a": 1}).aggregate(WorkerReport(failed={"a": 2}))
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=report, finished_recving={"a"}))
    assert stand.side.matched_tokens(request, 4) == (0, False)
    stand.admit(request, 0, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 4
    assert [job.blocks for job in stand.step(request, 13, [1, 2, 3, 4, 5]).stores] == [[2, 3, 4]]


def test_of_a_finished_request_what_is_being_stored_stays_until_every_worker_is_through(native) -> None:
    stand = Stand(native, workers=2)
    request = stage.request("a", 9)
    stand.publish(request, 1)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 4, [1, 2, 3])
    request.num_computed_tokens = 4
    (job,) = stand.step(request, 5, [1, 2, 3]).stores
    request.num_computed_tokens = 9
    stand.side.request_finished(request, ([1, 2, 3],))
    assert job.blocks == [2] == stand.pinned, "the others are free"
    assert stand.side.frees_pending() and stand.idle_step() is not None, "an engine without requests goes on for it"
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1})))
    assert stand.pinned == [2]
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1})))
    assert stand.pinned == [] and not stand.side.frees_pending()
    assert not stand.side._tracked and not stand.side._jobs


def test_of_a_prefix_that_was_being_stored_the_end_is_given_away_first(stand) -> None:
    """As vLLM itself does: nothing of a prefix is found without its head."""
    request, table = stage.request("a", 17), [5, 3, 8, 1, 9]
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, table)
    done = {}
    for computed, tokens in ((0, 8), (8, 9)):
        request.num_computed_tokens = computed
        done |= {job.number: 1 for job in stand.step(request, tokens, table).stores}
    request.num_computed_tokens = 17
    stand.side.request_finished(request, (table,))
    assert stand.pinned == [5, 3, 8, 1] and len(done) == 2
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done=done)))
    assert stand.freed == [1, 8, 3, 5]


def test_another_request_of_the_same_name_does_not_let_go_of_the_ones_before(stand) -> None:
    one, other = stage.request("a", 9), stage.request("a", 9)
    for request, table in ((one, [1, 2, 3]), (other, [4, 5, 6])):
        stand.side.on_new_request(request)
        stand.side.matched_tokens(request, 0)
        stand.admit(request, 0, table)
        (job,) = stand.step(request, 9, table).stores
        request.num_computed_tokens = 9
        if request is one:
            stand.side.request_finished(one, (table,))
            before = job
    assert stand.pinned == [1, 2]
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1})))
    assert stand.pinned == [1, 2]
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={before.number: 1})))
    assert stand.pinned == [] and stand.side._tracked["a"].request is other


def test_a_finished_request_with_nothing_to_store_keeps_nothing(stand) -> None:
    request = stage.request("a", 8)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    (job,) = stand.step(request, 8, [1, 2]).stores
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1})))
    request.num_computed_tokens = 8
    stand.side.request_finished(request, ([1, 2],))
    assert not stand.side._tracked and not stand.pinned


def test_what_a_last_step_filled_is_stored_after_the_request(stand) -> None:
    """A prompt whose load was synchronous and that wanted one token: nothing could be offered with its only step."""
    request = stage.request("a", 17)
    stand.publish(request, 1)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 4, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 4
    assert stand.step(request, 13, [1, 2, 3, 4, 5], loads=True).stores == []
    request.num_computed_tokens = 17
    stand.side.request_finished(request, ([1, 2, 3, 4, 5],))
    step = stand.side.metadata(stage.output({}, {}))
    assert [job.blocks for job in step.stores] == [[2, 3, 4]] == [stand.pinned]


def test_steps_in_flight_are_not_counted_when_a_request_is_aborted(stand) -> None:
    request = stage.request("a", 8)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    request.num_computed_tokens = request.num_in_flight_tokens = 8
    stand.side.request_finished(request, ([1, 2],))
    assert not stand.pinned and not stand.side._tracked


def test_an_abort_while_loading_leaves_the_blocks_to_the_load(native) -> None:
    stand = Stand(native, sync=False)
    request = stage.request("a", 17)
    stand.publish(request, 2)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 8, [1, 2])
    stand.side.request_finished(request, ([1, 2],))
    assert not stand.side.frees_pending()
    stand.side.worker_output(stage.answer(finished_recving={"a"}))
    assert not stand.side._tracked


def test_a_preempted_request_fences_its_stores(stand) -> None:
    request = stage.request("a", 8)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    (job,) = stand.step(request, 8, [1, 2]).stores
    request.num_computed_tokens = 0
    assert stand.side.metadata(stage.output({}, {}, preempted=("a",))).fence == [job.number]
    stand.publish(request, 1)
    assert stand.side.matched_tokens(request, 0) == (4, False), "resumed, it is looked up again"


class Manager:
    """What the scheduler's half sees of vLLM's blocks."""

    def __init__(self, side) -> None:
        self.tables: dict[str, list[int]] = {}
        self.evicted: set[int] = set()
        side.bind(self)

    def get_block_ids(self, name):
        return (self.tables[name],)

    def evict_blocks(self, blocks) -> None:
        self.evicted.update(blocks)

    def take_evicted(self) -> set[int]:
        evicted, self.evicted = self.evicted, set()
        return evicted


def test_what_a_failed_load_left_behind_leaves_vllms_own_cache(stand) -> None:
    manager = Manager(stand.side)
    manager.tables = {"a": [1, 2, 3], "b": [1, 2, 9], "c": [7, 8]}
    for name in manager.tables:
        stand.side.on_new_request(stage.request(name, 12))
    stand.side.worker_output(stage.answer(invalid_block_ids={2}))
    assert manager.take_evicted() == {2, 3, 9}


# Another connector's loads. The request has 5 blocks; the other one loads the second and third.

TABLE = [1, 2, 3, 4, 5, 6]


def beside(stand, name: str = "a", *, external: int = 8, start: int = 0):
    """A request of which another connector is to load what follows its first block."""
    request = stage.request(name, 21, start=start)
    stand.side.matched_tokens(request, 4)
    stand.admit(request, 0, TABLE)
    request.num_computed_tokens = 4 + external
    return request


def test_what_another_connector_loads_is_stored_when_its_step_is_settled(stand) -> None:
    request = beside(stand)
    step = stand.step(request, 9, TABLE, loads=True)
    assert step.stores == [] and step.loads == []
    stand.settle(step)
    request.num_computed_tokens = 21
    assert [job.blocks for job in stand.step(request, 1, TABLE).stores] == [[2, 3, 4, 5]]


def test_what_another_connector_lost_is_computed_before_it_is_stored(stand) -> None:
    manager = Manager(stand.side)
    request = beside(stand)
    manager.tables["a"] = TABLE
    step = stand.step(request, 9, TABLE, loads=True)
    # vLLM starts again from the lost block.
    request.num_computed_tokens = 8
    stand.settle(step, lost={3})
    assert manager.take_evicted() == {3, 4, 5, 6}
    again = stand.step(request, 8, TABLE)
    assert [job.blocks for job in again.stores] == [[2, 3, 4]] and again.doubt == 0


def test_without_doubt_garbage_would_be_stored(stand) -> None:
    """The twin: the step does not say that others load something."""
    request = beside(stand)
    assert [job.blocks for job in stand.step(request, 9, TABLE, loads=False).stores] == [[2, 3, 4, 5]]


def test_requests_that_run_already_store_what_they_had_before_a_step_in_doubt(stand) -> None:
    running = stage.request("r", 17, start=50)
    stand.side.matched_tokens(running, 0)
    stand.admit(running, 0, [11, 12, 13, 14, 15])
    running.num_computed_tokens = 8
    other = beside(stand)
    tables = {"r": [11, 12, 13, 14, 15], "a": TABLE}
    step = stand.side.metadata(stage.output({"r": 5, "a": 9}, tables, loads=True))
    assert [(job.request, job.blocks) for job in step.stores] == [], "it was scheduled for the first time"
    stand.settle(step)
    running.num_computed_tokens, other.num_computed_tokens = 13, 21
    newcomer = beside(stand, "n", start=100)
    step = stand.side.metadata(stage.output({"r": 4, "n": 9}, {**tables, "n": TABLE}, loads=True))
    assert [(job.request, job.blocks) for job in step.stores] == [("r", [11, 12, 13])]
    assert newcomer.request_id == "n"


def test_doubt_lasts_until_the_outcome_is_here_however_many_steps_are_in_flight(native) -> None:
    stand = Stand(native, sync=False, recovers=False)
    request = beside(stand)
    first = stand.step(request, 5, TABLE, loads=True)
    request.num_computed_tokens, request.num_in_flight_tokens = 17, 5
    second = stand.step(request, 4, TABLE)
    assert first.stores == second.stores == [] and second.doubt == 0
    request.num_computed_tokens, request.num_in_flight_tokens = 21, 4
    stand.settle(first)
    stage.grow(request, 1)
    assert [job.blocks for job in stand.step(request, 1, TABLE).stores] == [[2, 3, 4, 5]]


def test_where_vllm_does_not_recover_a_request_with_lost_blocks_is_stored_no_more(native) -> None:
    stand = Stand(native, sync=False, recovers=False)
    manager = Manager(stand.side)
    request = beside(stand)
    manager.tables["a"] = TABLE
    step = stand.step(request, 9, TABLE, loads=True)
    request.num_computed_tokens = 8
    stand.settle(step, lost={3})
    assert manager.take_evicted() == {3, 4, 5, 6}
    # What it computes now, from wherever, is registered by vLLM and forgotten again.
    assert stand.step(request, 13, TABLE).stores == []
    assert manager.take_evicted() == {3, 4, 5, 6}
    request.num_computed_tokens = 21
    stand.side.request_finished(request, (TABLE[:5],))
    assert manager.take_evicted() == {3, 4, 5}
    stand.side.metadata(stage.output({}, {}))
    assert manager.take_evicted() == set() and not stand.side._doubt._spoiled


def test_a_request_admitted_on_spoiled_blocks_is_spoiled_too(native) -> None:
    stand = Stand(native, sync=False, recovers=False)
    manager = Manager(stand.side)
    request = beside(stand)
    manager.tables["a"] = TABLE
    step = stand.step(request, 9, TABLE, loads=True)
    request.num_computed_tokens = 8
    stand.settle(step, lost={3})
    # In one step the spoiled one computes its blocks, and another finds them in vLLM's cache.
    late = stage.request("l", 21)
    stand.side.matched_tokens(late, 16)
    late_table = [1, 2, 3, 4, 15, 16]
    stand.admit(late, 0, late_table)
    late.num_computed_tokens = 16
    manager.tables["l"] = late_table
    manager.take_evicted()
    step = stand.side.metadata(stage.output({"a": 13, "l": 5}, {"a": TABLE, "l": late_table}))
    assert step.stores == [] and manager.take_evicted() == {3, 4, 5, 6, 15, 16}
    late.num_computed_tokens = 21
    stand.side.request_finished(late, (late_table[:5],))


def test_a_request_that_shares_lost_blocks_relies_on_another_and_is_stored_no_more(stand) -> None:
    manager = Manager(stand.side)
    first, second = beside(stand), stage.request("b", 21)
    stand.side.matched_tokens(second, 12)
    shared = [1, 2, 3, 7, 8, 9]
    stand.admit(second, 0, shared)
    second.num_computed_tokens = 12
    manager.tables = {"a": TABLE, "b": shared}
    step = stand.side.metadata(stage.output({"a": 9, "b": 9}, manager.tables, loads=True))
    assert step.stores == []
    # vLLM has the first compute it again, and the second go on from where it was.
    first.num_computed_tokens = 8
    stand.settle(step, lost={3})
    step = stand.side.metadata(stage.output({"a": 13, "b": 9}, manager.tables))
    assert [(job.request, job.blocks) for job in step.stores] == [("a", [2, 3, 4, 5])]


def test_a_request_that_starts_anew_is_stored_again(native) -> None:
    stand = Stand(native, sync=False, recovers=False)
    manager = Manager(stand.side)
    request = beside(stand)
    manager.tables["a"] = TABLE
    step = stand.step(request, 9, TABLE, loads=True)
    stand.settle(step, lost={3})
    request.num_computed_tokens = 0
    stand.side.metadata(stage.output({}, {}, preempted=("a",)))
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [21, 22, 23, 24, 25, 26])
    manager.tables["a"] = [21, 22, 23, 24, 25, 26]
    assert [job.blocks for job in stand.step(request, 21, manager.tables["a"]).stores] == [[21, 22, 23, 24, 25]]


def test_an_abort_while_another_connector_loads_stores_nothing_of_it(stand) -> None:
    request = beside(stand)
    stand.side.metadata(stage.output({}, {}))
    stand.side.request_finished(request, (TABLE[:3],))
    assert stand.side.metadata(stage.output({}, {})).stores == []


def test_an_abort_while_another_connector_loads_lets_the_load_decide_when_blocks_are_free(stand) -> None:
    """vLLM would free them twice, and end, if they were kept for stores too."""
    request = stage.request("a", 21)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, TABLE)
    (job,) = stand.step(request, 8, TABLE).stores
    request.num_computed_tokens = 0
    assert stand.side.metadata(stage.output({}, {}, preempted=("a",))).fence == [job.number]
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, TABLE)
    request.num_computed_tokens = 12
    stand.side.request_finished(request, (TABLE[:3],))
    stand.side.metadata(stage.output({}, {}))
    assert not stand.side.frees_pending() and not stand.side._jobs
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1})))


def test_an_asynchronous_load_of_another_connector_is_over_when_the_request_is_scheduled(stand) -> None:
    request = beside(stand)
    stand.side.metadata(stage.output({}, {}))
    stand.admit(request, 0, TABLE)
    assert [job.blocks for job in stand.step(request, 9, TABLE).stores] == [[2, 3, 4, 5]]


def test_an_abort_in_a_step_in_doubt_leaves_nothing_of_it_behind(native) -> None:
    stand = Stand(native, sync=False, recovers=False)
    manager = Manager(stand.side)
    request = beside(stand)
    manager.tables["a"] = TABLE
    step = stand.step(request, 9, TABLE, loads=True)
    request.num_computed_tokens = request.num_in_flight_tokens = 9
    request.num_computed_tokens = 21
    stand.side.request_finished(request, (TABLE[:5],))
    assert manager.take_evicted() == {2, 3, 4, 5}
    del manager.tables["a"]
    stand.settle(step, lost={3})
    assert stand.side.metadata(stage.output({}, {})).stores == []


def test_a_lost_outcome_is_settled_by_the_next(native) -> None:
    stand = Stand(native, sync=False, recovers=False)
    request = beside(stand)
    stand.step(request, 9, TABLE, loads=True)
    request.num_computed_tokens = 21
    stage.grow(request, 8)
    stand.settle(stand.step(request, 1, TABLE, loads=True))
    request.num_computed_tokens = 22
    assert [job.blocks for job in stand.step(request, 1, TABLE).stores] == [[2, 3, 4, 5]]


def test_a_reset_makes_everything_stored_before_unfindable(stand) -> None:
    request = stage.request("a", 17)
    stand.publish(request, 4)
    running = stage.request("r", 9)
    stand.side.matched_tokens(running, 0)
    stand.admit(running, 0, [1, 2, 3])
    assert stand.side.reset()
    assert stand.side.matched_tokens(request, 0) == (0, False)
    assert stand.step(running, 8, [1, 2, 3]).stores == [], "computed before the reset"


def test_events_say_what_is_kept_and_what_is_gone(native) -> None:
    stand = Stand(native, workers=2, events=True)
    request = stage.request("a", 12)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2, 3])
    stand.step(request, 4, [1, 2, 3])
    request.num_computed_tokens = 4
    stand.step(request, 8, [1, 2, 3])
    stand.publish(request, 3, NAMESPACES[:1])
    assert stand.side.take_events() == [], "one rank does not have them"
    stand.publish(request, 3)
    names = [maybe_convert_block_hash(one) for one in request.block_hashes]
    (event,) = stand.side.take_events()
    assert (event.block_hashes, event.parent_block_hash, event.medium) == (names, None, "SWIFTCACHE_HBM")
    assert (event.block_size, event.token_ids, event.extra_keys) == (4, list(range(12)), [None] * 3)
    # A revocation, say: no load was needed to find out.
    for key in request.block_hashes[1:]:
        del native.published[NAMESPACES[1]][key[:16]]
    (event,) = stand.side.take_events()
    assert type(event) is BlockRemoved and event.block_hashes == names[1:]
    assert (event.medium, event.group_idx) == ("SWIFTCACHE_HBM", None)
    stand.publish(request, 3)
    (event,) = stand.side.take_events()
    assert (event.block_hashes, event.parent_block_hash, event.token_ids) == (names[1:], names[0], list(range(4, 12)))
    stand.side.reset()
    (event,) = stand.side.take_events()
    assert type(event) is AllBlocksCleared


def test_events_tell_of_blocks_that_others_have_stored(native, tmp_path) -> None:
    """Also with what their tokens do not say: an adapter, and a salt in the first block."""
    stand = Stand(native, workers=2, events=True)
    request = stage.request("a", 12)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).touch()
    request.lora_request = SimpleNamespace(lora_int_id=7, lora_name="adapter", lora_path=str(tmp_path))
    request.cache_salt = "salt"
    stand.publish(request, 2)
    assert stand.side.matched_tokens(request, 0) == (8, False)
    stand.admit(request, 8, [1, 2, 3])
    (event,) = stand.side.take_events()
    assert (len(event.block_hashes), event.lora_name, event.lora_id) == (2, "adapter", 7)
    assert event.extra_keys == [("adapter", "salt"), ("adapter",)]


def test_requests_want_the_blocks_of_their_tokens_and_the_next_one(native) -> None:
    heard = []

    def recorded(wanted, pressed: bool, stats) -> Orders:
        heard.append((wanted(), pressed))
        return Orders()

    stand = Stand(native)
    stand.side.lend(SimpleNamespace(step=recorded))
    waiting, running = stage.request("w", 9), stage.request("r", 9)
    stand.side.on_new_request(waiting)
    stand.side.on_new_request(running)
    stand.side.metadata(stage.output({}, {}))
    # Half of its prompt is computed in this step, the rest in the next.
    stand.side.metadata(stage.output({"r": 5}, {"r": [1, 2]}))
    running.num_computed_tokens = 5
    stand.side.metadata(stage.output({"r": 4}, {"r": [1, 2, 3]}, preempted=("w",)))
    running.num_computed_tokens = 9
    stand.side.request_finished(running, ([1, 2, 3],))
    stand.side.metadata(stage.output({}, {}))
    assert heard == [(8, False), (6, False), (5, True), (4, False)]


def test_workers_beside_another_connector_say_who_they_are_in_their_first_step(native) -> None:
    stand = Stand(native, workers=2)
    stand.side.meet([])
    request = stage.request("a", 9)
    stand.publish(request, 2)
    assert stand.side.matched_tokens(request, 0) == (0, False), "nothing is looked up for nobody"
    assert stand.idle_step() is not None and stand.idle_step() is None, "one step is enough"
    for rank, worker in enumerate(WORKERS):
        report = WorkerReport(met={(0, rank): worker})
        assert not report.is_empty()
        stand.side.worker_output(stage.answer(kv_connector_worker_meta=report))
    again = stage.request("b", 9)
    assert stand.side.matched_tokens(again, 0) == (8, False)
    both = WorkerReport(met={(0, 0): WORKERS[0]}).aggregate(WorkerReport(met={(0, 1): WORKERS[1]}))
    assert list(both.met.values()) == WORKERS


def test_what_the_last_requests_did_is_counted_in_a_step_of_its_own(stand) -> None:
    assert stand.idle_step() is None
    request = stage.request("a", 9)
    stand.side.on_new_request(request)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2, 3])
    step = stand.step(request, 9, [1, 2, 3])
    assert not step.idle and len(step.stores) == 1
    stand.side.request_finished(request, ([1, 2, 3],))
    assert not stand.idle_step().idle, "its blocks are still being stored"
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={step.stores[0].number: 1})))
    assert stand.idle_step().idle
    assert stand.idle_step() is None, "once"
    # Not all of it was counted: once more, but not for ever.
    unsettled = stage.answer(kv_connector_worker_meta=WorkerReport(unsettled=True))
    stand.side.worker_output(unsettled)
    assert stand.idle_step().idle and stand.idle_step() is None
    stand.now += SETTLING_SECONDS
    stand.side.worker_output(unsettled)
    assert stand.idle_step() is None
