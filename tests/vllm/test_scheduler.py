"""The scheduler's half against made-up requests: what it promises, offers, holds back and forgets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import stage

from swiftcache.vllm.config import Settings
from swiftcache.vllm.events import Events
from swiftcache.vllm.metadata import WorkerReport
from swiftcache.vllm.scheduler import ANSWER_SECONDS, SchedulerSide

NAMESPACES = ["m/tp0of2", "m/tp1of2"]


class Stand:
    def __init__(self, native, *, sync: bool = True, workers: int = 1, events: bool = False) -> None:
        self.native, self.now = native, 0.0
        self.side = SchedulerSide(
            Settings(),
            native.Connection("", name="test"),
            block_tokens=stage.BLOCK,
            hashes_per_block=1,
            sync=sync,
            workers=workers,
            events=Events(events, stage.BLOCK),
            clock=lambda: self.now,
        )
        self.side.namespaces(NAMESPACES)

    def publish(self, request, blocks: int, namespaces=NAMESPACES) -> None:
        for name in namespaces:
            for key in request.block_hashes[:blocks]:
                self.native.published.setdefault(name, {})[key[:16]] = []

    def lookups(self) -> int:
        return sum(1 for call in self.native.calls if call[0] == "count_hits")

    def admit(self, request, external: int, table: list[int]) -> None:
        self.side.allocated(request, stage.allocation(table), external)

    def step(self, request, tokens: int, table: list[int], **more):
        return self.side.metadata(stage.output({request.request_id: tokens}, {request.request_id: table}, **more))


@pytest.fixture
def stand(native):
    return Stand(native)


def test_a_hit_must_be_there_for_every_rank(stand) -> None:
    request = stage.request("a", 17)
    stand.publish(request, 4)
    del stand.native.published[NAMESPACES[1]][request.block_hashes[2][:16]]
    assert stand.side.matched_tokens(request, 0) == (8, False)


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
    stand.side.namespaces([])
    assert stand.side.matched_tokens(stage.request("b", 17), 0) == (0, False)
    assert stand.lookups() == 0


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
    step = stand.step(request, 9, table)
    (load,) = step.loads
    assert (load.first, load.blocks, load.sync) == (1, [11, 12], True)
    assert load.keys == b"".join(key[:16] for key in request.block_hashes[1:3])
    assert step.stores == [], "computed on top of a load that may yet fail"
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


def test_a_finished_request_keeps_its_blocks_until_every_worker_is_through(native) -> None:
    stand = Stand(native, workers=2)
    request = stage.request("a", 8)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    (job,) = stand.step(request, 8, [1, 2]).stores
    request.num_computed_tokens = 8
    assert stand.side.request_finished(request, [1, 2])
    assert stand.side.frees_pending()
    assert stand.side.metadata(stage.output({}, {})).retained == ["a"]
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1})))
    stand.side.worker_output(
        stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1}), finished_sending={"a"})
    )
    assert not stand.side.frees_pending()
    assert not stand.side._tracked and not stand.side._jobs


def test_a_finished_request_with_nothing_to_store_keeps_nothing(stand) -> None:
    request = stage.request("a", 8)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    (job,) = stand.step(request, 8, [1, 2]).stores
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={job.number: 1})))
    request.num_computed_tokens = 8
    assert not stand.side.request_finished(request, [1, 2])
    assert not stand.side._tracked


def test_what_a_last_step_filled_is_stored_after_the_request(stand) -> None:
    """A prompt whose load was synchronous and that wanted one token: nothing could be offered with its only step."""
    request = stage.request("a", 17)
    stand.publish(request, 1)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 4, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 4
    assert stand.step(request, 13, [1, 2, 3, 4, 5]).stores == []
    request.num_computed_tokens = 17
    assert stand.side.request_finished(request, [1, 2, 3, 4, 5])
    step = stand.side.metadata(stage.output({}, {}))
    assert [job.blocks for job in step.stores] == [[2, 3, 4]]
    assert step.retained == ["a"]


def test_steps_in_flight_are_not_counted_when_a_request_is_aborted(stand) -> None:
    request = stage.request("a", 8)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    request.num_computed_tokens = request.num_in_flight_tokens = 8
    assert not stand.side.request_finished(request, [1, 2])


def test_an_abort_while_loading_leaves_the_blocks_to_the_load(native) -> None:
    stand = Stand(native, sync=False)
    request = stage.request("a", 17)
    stand.publish(request, 2)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 8, [1, 2])
    assert not stand.side.request_finished(request, [1, 2])
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


def test_what_a_failed_load_left_behind_leaves_vllms_own_cache(stand) -> None:
    evicted: set[int] = set()
    tables = {"a": [1, 2, 3], "b": [1, 2, 9], "c": [7, 8]}
    for name in tables:
        stand.side.on_new_request(stage.request(name, 12))

    class Manager:
        def get_block_ids(self, name):
            return (tables[name],)

        def evict_blocks(self, blocks):
            evicted.update(blocks)

    stand.side.bind(Manager())
    stand.side.worker_output(stage.answer(invalid_block_ids={2}))
    assert evicted == {2, 3, 9}


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
    (first,) = stand.step(request, 4, [1, 2, 3]).stores
    request.num_computed_tokens = 4
    (second,) = stand.step(request, 8, [1, 2, 3]).stores
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(done={first.number: 2})))
    stand.side.worker_output(
        stage.answer(kv_connector_worker_meta=WorkerReport(done={second.number: 2}, lost={second.number}))
    )
    (event,) = stand.side.take_events()
    assert (event.block_size, event.token_ids, event.parent_block_hash) == (4, [0, 1, 2, 3], None)
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=WorkerReport(failed={"a": 1})))
    (event,) = stand.side.take_events()
    assert type(event).__name__ == "BlockRemoved" and len(event.block_hashes) == 2


def test_requests_want_the_blocks_of_their_tokens_and_the_next_one(native) -> None:
    heard = []
    stand = Stand(native)
    stand.side.lend(SimpleNamespace(step=lambda step, wanted, pressed, stats: heard.append((wanted(), pressed))))
    waiting, running = stage.request("w", 9), stage.request("r", 9)
    stand.side.on_new_request(waiting)
    stand.side.on_new_request(running)
    stand.side.metadata(stage.output({}, {}))
    # Half of its prompt is computed in this step, the rest in the next.
    stand.side.metadata(stage.output({"r": 5}, {"r": [1, 2]}))
    running.num_computed_tokens = 5
    stand.side.metadata(stage.output({"r": 4}, {"r": [1, 2, 3]}, preempted=("w",)))
    running.num_computed_tokens = 9
    stand.side.request_finished(running, [1, 2, 3])
    stand.side.metadata(stage.output({}, {}))
    assert heard == [(8, False), (6, False), (5, True), (4, False)]
