"""The worker's half over a pool of CPU tensors, and as if on CUDA where streams and marks matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import stage
import torch

import swiftcache.vllm.worker
from swiftcache.engine.fingerprint import Ranks
from swiftcache.engine.loans import LendJob
from swiftcache.engine.settings import Settings
from swiftcache.vllm.metadata import LoadJob, StepMetadata, StoreJob, WorkerReport
from swiftcache.vllm.worker import WorkerSide

KEYS = [bytes([number]) * 16 for number in range(8)]
LAYERS = [f"model.layers.{layer}.self_attn.attn" for layer in range(2)]


@pytest.fixture
def caches():
    return stage.caches()


@pytest.fixture
def worker(native, caches):
    return made(caches)


def made(caches, **options):
    options = {"sync": True, "publish_outcome": False, "ranks": Ranks(), "clock": lambda: 0.0} | options
    side = WorkerSide(stage.config(), Settings(), stage.kv_config(), block_tokens=stage.BLOCK, **options)
    side.register(caches)
    return side


@pytest.fixture
def cuda(worker, monkeypatch):
    monkeypatch.setattr(worker, "_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return worker


def load(blocks: list[int], *, sync: bool = True, first: int = 0, request: str = "a") -> LoadJob:
    return LoadJob(request, first, b"".join(KEYS[: len(blocks)]), blocks, sync)


def store(number: int, blocks: list[int], request: str = "a") -> StoreJob:
    return StoreJob(number, request, b"".join(KEYS[: len(blocks)]), blocks)


def run(worker, step: StepMetadata, *, before: bool = True, layers: Sequence[str] = LAYERS):
    """A step in vLLM's order, whose forward calls the hooks of these layers. Returns what it reports."""
    worker.before_overwriting(step)
    worker.bind(step)
    if before:
        worker.start_loads()
    for layer in layers:
        worker.wait_for_layer(layer)
        worker.layer_computed(layer)
    if not before:
        worker.start_loads()
    worker.start_stores()
    received, failed = worker.finished()
    invalid = worker.invalid_blocks()
    report = worker.report()
    worker.bind(None)
    return SimpleNamespace(received=received, failed=failed, invalid=invalid, report=report)


def test_bytes_come_back_into_other_blocks(worker, caches) -> None:
    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    want = {name: cache[1:3].clone() for name, cache in caches.items()}
    done = run(worker, StepMetadata(loads=[load([6, 7])]))
    assert done.invalid == set() and done.report is None
    for name, cache in caches.items():
        assert torch.equal(cache[6:8], want[name])


def test_each_layer_is_awaited_in_its_own_turn(worker, native) -> None:
    run(worker, StepMetadata(stores=[store(0, [1])]))
    native.hold_loads = True
    worker.bind(StepMetadata(loads=[load([5])]))
    worker.start_loads()
    (_, one), *_ = worker._loading
    worker.wait_for_layer(LAYERS[0])
    assert one.waited == [0]
    worker.wait_for_layer(LAYERS[1])
    assert one.waited == [0, 1]
    worker.wait_for_layer("model.layers.9.mlp")
    assert one.waited == [0, 1]


def test_what_has_arrived_is_not_waited_for(worker, native) -> None:
    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    native.hold_loads = True
    worker.bind(StepMetadata(loads=[load([5], request="a"), load([6], request="b")]))
    worker.start_loads()
    (_, one), (_, other) = worker._loading
    worker.wait_for_layer(LAYERS[0])
    one.held = False
    worker.wait_for_layer(LAYERS[1])
    assert one.waited == [0] and other.waited == [0, 1]
    # How it ended is known from its end.
    one.failed = [0]
    assert worker.invalid_blocks() == {5}


def test_blocks_that_failed_are_invalid_in_the_same_step(worker) -> None:
    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    done = run(worker, StepMetadata(loads=[load([4, 5, 6], first=3)]))
    assert done.invalid == {6}
    assert done.report.failed == {"a": 5}


@pytest.mark.parametrize("broken", ["load", "wait_layer", "finish"])
def test_trouble_anywhere_in_a_load_fails_all_of_it(worker, native, monkeypatch, broken) -> None:
    def fail(*_, **__):
        raise RuntimeError("broken")

    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    native.hold_loads = True
    monkeypatch.setattr(native.Cache if broken == "load" else native.Load, broken, fail)
    assert run(worker, StepMetadata(loads=[load([4, 5])])).invalid == {4, 5}


def test_a_forward_that_waited_for_nothing_cannot_be_trusted(worker) -> None:
    run(worker, StepMetadata(stores=[store(0, [1])]))
    worker.bind(StepMetadata(loads=[load([4])]))
    worker.start_loads()
    assert worker.invalid_blocks() == {4}


def test_an_asynchronous_load_is_reported_when_it_is_over(native, caches) -> None:
    worker = made(caches, sync=False)
    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    native.hold_loads = True
    done = run(worker, StepMetadata(loads=[load([4, 5, 6], sync=False)]), before=False)
    assert done.received == set() and done.invalid == set()
    worker._receiving["a"][1].held = False
    done = run(worker, StepMetadata())
    assert done.received == {"a"} and done.invalid == {6}
    assert done.report.failed == {"a": 2}


def test_a_load_that_cannot_start_is_over_at_once(native, caches, monkeypatch) -> None:
    worker = made(caches, sync=False)
    monkeypatch.setattr(native.Cache, "load", lambda *_, **__: 1 / 0)
    done = run(worker, StepMetadata(loads=[load([4, 5], sync=False)]), before=False)
    assert done.received == {"a"} and done.invalid == {4, 5}


def test_stores_are_reported_when_they_are_over(worker, native) -> None:
    native.hold_stores = True
    run(worker, StepMetadata(stores=[store(0, [1]), store(1, [2])]))
    assert run(worker, StepMetadata()).report is None
    for _, held in worker._storing["a"].values():
        held.held = False
    assert run(worker, StepMetadata()).report.done == {0: 1, 1: 1}
    assert run(worker, StepMetadata()).report is None


def test_a_fence_waits_for_the_stores_it_names(worker, native) -> None:
    native.hold_stores = True
    run(worker, StepMetadata(stores=[store(0, [1]), store(1, [2])]))
    first, second = (held for _, held in worker._storing["a"].values())
    worker.before_overwriting(StepMetadata(fence=[1]))
    assert second.finished and not first.finished


def test_a_store_that_cannot_start_lets_go_at_once(worker, native, monkeypatch) -> None:
    monkeypatch.setattr(native.Cache, "store", lambda *_, **__: 1 / 0)
    done = run(worker, StepMetadata(stores=[store(0, [1])]))
    assert done.report.done == {0: 1} and done.report.lost == {0}


def test_on_cuda_stores_follow_each_layers_mark_and_loads_the_stream(cuda, native, monkeypatch) -> None:
    monkeypatch.setattr(swiftcache.vllm.worker, "MARKED_BYTES", 0)
    run(cuda, StepMetadata(stores=[store(0, [1])]))
    (_, _, marks) = native.calls[-1]
    assert [mark.stream for mark in marks] == [77, 77] and marks[0] is not marks[1]
    run(cuda, StepMetadata(loads=[load([4])]))
    (_, _, after) = next(call for call in native.calls if call[0] == "load")
    assert after.stream == 77


@pytest.mark.parametrize("few", [True, False], ids=["few", "more"])
def test_on_cuda_few_bytes_of_a_step_are_stored_behind_its_end(cuda, native, monkeypatch, few) -> None:
    """All layers have one mark then, and the client queues them together."""
    monkeypatch.setattr(swiftcache.vllm.worker, "MARKED_BYTES", 3 * cuda._layout.block_bytes - (0 if few else 1))
    run(cuda, StepMetadata(stores=[store(0, [1, 2]), store(1, [3], "b")]))
    for _, _, marks in native.calls[-2:]:
        assert (marks[0] is marks[1]) == few


def test_on_cuda_a_graph_that_skips_hooks_still_stores_after_the_forward(cuda, native) -> None:
    cuda.bind(StepMetadata(stores=[store(0, [1])]))
    cuda.start_stores()
    (_, _, marks) = native.calls[-1]
    assert len(marks) == 2


def test_on_cuda_an_unmarkable_stream_stores_and_loads_nothing(cuda, native, monkeypatch) -> None:
    run(cuda, StepMetadata(stores=[store(0, [1])]))
    monkeypatch.setattr(native.Cache, "mark", lambda *_: 1 / 0)
    done = run(cuda, StepMetadata(stores=[store(1, [2])], loads=[load([4])]))
    assert done.invalid == {4}
    assert done.report.lost == {1}


def test_the_outcome_of_a_step_in_doubt_is_reported_with_it(worker) -> None:
    assert run(worker, StepMetadata(doubt=3)).report.settled == 3
    assert run(worker, StepMetadata()).report is None
    # All of vLLM's workers report a step in one output.
    both = WorkerReport(settled=4).aggregate(WorkerReport(settled=4))
    assert both.settled == 4 and not both.is_empty()


def test_capturing_graphs_leaves_nothing_behind(cuda) -> None:
    cuda.bind(StepMetadata(stores=[store(0, [1])], loads=[load([4])]))
    cuda.start_loads()
    for layer in LAYERS:
        cuda.wait_for_layer(layer)
        cuda.layer_computed(layer)
    cuda.reset_capture()
    assert not cuda._marks and not cuda._loading and cuda.invalid_blocks() == set()


def test_the_pool_is_let_go_and_taken_up_again(worker, native) -> None:
    run(worker, StepMetadata(stores=[store(0, [1])]))
    cache, name = worker._cache, worker.namespace
    worker.unregister()
    assert cache.closed
    done = run(worker, StepMetadata(stores=[store(1, [2])], loads=[load([4])]))
    assert done.invalid == {4} and done.report.lost == {1}
    worker.restore()
    assert worker._cache is not cache and worker.namespace == name
    # The scheduler hears once who a worker is.
    assert worker._cache.more["borrower_id"] == cache.more["borrower_id"] == worker.handshake().borrower_id
    assert len(worker.handshake().borrower_id) == 16
    assert run(worker, StepMetadata(loads=[load([4])])).invalid == set()
    worker.close()


def test_outcomes_are_asked_for_only_when_someone_listens(native, caches) -> None:
    worker = made(caches, publish_outcome=True)
    run(worker, StepMetadata(stores=[store(0, [1])]))
    assert worker.report() is None

    class Full(native.Store):
        def finish(self):
            return {"stored": 0, "known": 0, "unplaced": 1, "lost": 0}

    native_store = native.Store
    native.Store = Full
    try:
        assert run(worker, StepMetadata(stores=[store(1, [2])])).report.lost == {1}
    finally:
        native.Store = native_store


def test_a_store_that_does_not_answer_is_over_when_it_has_ended(worker, native, monkeypatch) -> None:
    class Mute(native.Store):
        def is_done(self):
            raise RuntimeError("no answer")

    monkeypatch.setattr(native, "Store", Mute)
    monkeypatch.setattr(native, "hold_stores", True)
    monkeypatch.setattr(worker, "_poll_stores", lambda: None)
    run(worker, StepMetadata(stores=[store(0, [1])]))
    ((_, copy),) = worker._storing["a"].values()
    assert not copy.finished
    monkeypatch.undo()
    worker.finished()
    assert copy.finished and not worker._storing
    assert worker.report().done == {0: 1}


def test_beside_another_connector_a_worker_reports_who_it_is(native, caches) -> None:
    worker = made(caches, reports_itself=True)
    assert worker.handshake() is None
    (met,) = worker.report().met.items()
    assert met[0] == (0, 0) and met[1].namespace == worker.namespace and len(met[1].borrower_id) == 16
    assert worker.report() is None, "once"
    assert made(caches).report() is None, "alone, its handshake says it"


def test_less_than_a_block_is_refused_by_name(native, caches) -> None:
    for name in ("max_leased_bytes", "host_tier_bytes", "lease_step_bytes"):
        side = WorkerSide(
            stage.config(),
            Settings(**{name: 1}),
            stage.kv_config(),
            block_tokens=stage.BLOCK,
            sync=True,
            publish_outcome=False,
            ranks=Ranks(),
        )
        with pytest.raises(ValueError, match=f"{name} is 1, which is less than one block"):
            side.register(caches)


def test_counters_of_the_last_step_are_read_at_once(native, caches) -> None:
    worker = made(caches, clock=lambda: 0.0)
    run(worker, StepMetadata(stores=[store(0, [1])]))
    assert worker.stats() is not None
    run(worker, StepMetadata(stores=[store(1, [2, 3])]))
    assert worker.stats() is None, "within the second"
    worker.bind(StepMetadata(idle=True))
    assert worker.stats().data["counters"] == {"stored_blocks": 1}
    assert worker.report() is None
    worker.bind(None)


def test_an_engine_is_not_held_up_until_its_last_stores_are_counted(native, caches, monkeypatch) -> None:
    worker = made(caches)
    counted = {"stored_blocks": 1.0, "unsettled_slabs": 1.0}
    monkeypatch.setattr(native.Cache, "stats", lambda _: counted)
    worker.bind(StepMetadata(idle=True))
    assert worker.stats() is not None and worker.report().unsettled
    counted["unsettled_slabs"] = 0.0
    assert worker.stats() is not None and worker.report() is None
    worker.bind(None)
    # While there are requests, nobody waits.
    counted["unsettled_slabs"] = 1.0
    worker._next_stats = 0.0
    assert worker.stats() is not None and worker.report() is None


def test_counters_are_read_at_most_once_a_second(native, caches) -> None:
    now = [0.0]
    worker = made(caches, clock=lambda: now[0])
    run(worker, StepMetadata(stores=[store(0, [1])]))
    assert worker.stats().data["counters"] == {"stored_blocks": 1}
    assert worker.stats() is None
    now[0] = 2.0
    assert worker.stats().data["counters"] == {}


STEPS = {
    "loads": StepMetadata(loads=[load([4])]),
    "stores": StepMetadata(stores=[store(0, [1])]),
    "lend": StepMetadata(lend=[LendJob(1, 8, 9)]),
    "take_back": StepMetadata(take_back=[1]),
    "staged": StepMetadata(staged=1),
    "idle": StepMetadata(idle=True),
    "doubt": StepMetadata(doubt=1),
}
"""Of everything that a step can order of a worker once it has begun, one."""


def test_every_order_of_a_step_is_among_those_that_are_tried() -> None:
    others = {"fence", "arrived", "weights"}
    assert STEPS.keys() | others == {field.name for field in dataclasses.fields(StepMetadata)}


@pytest.fixture
def quiet(worker) -> WorkerSide:
    """A worker that has counted, and has nothing to say."""
    run(worker, StepMetadata())
    worker.stats()
    worker.bind(StepMetadata())
    assert worker.is_quiet()
    worker.bind(None)
    return worker


@pytest.mark.parametrize("order", STEPS)
def test_a_step_that_orders_something_is_not_quiet(quiet, order) -> None:
    quiet.bind(STEPS[order])
    assert not quiet.is_quiet()


def test_outside_of_a_step_nothing_is_quiet(quiet) -> None:
    assert not quiet.is_quiet()


@pytest.mark.parametrize("what", ["store", "load", "report", "counters", "weights"])
def test_what_is_under_way_or_to_be_said_keeps_steps_from_being_quiet(quiet, native, monkeypatch, what) -> None:
    if what == "store":
        native.hold_stores = True
        run(quiet, StepMetadata(stores=[store(0, [1])]))
    elif what == "load":
        native.hold_loads = True
        run(quiet, StepMetadata(loads=[load([4], sync=False)]))
    elif what == "report":
        quiet._report.done[3] = 1
    elif what == "counters":
        monkeypatch.setattr(quiet, "_clock", lambda: 1.0)
    else:
        quiet.weights_changed()
    for _ in range(2):
        quiet.bind(StepMetadata())
        assert not quiet.is_quiet()
        quiet.bind(None)


def test_a_worker_that_makes_promises_is_quiet_once_it_has_seen_a_forward_wait(native, caches) -> None:
    worker = made(caches, sync=False, promises=True)
    worker.stats()

    def is_quiet() -> bool:
        worker.bind(StepMetadata())
        return worker.is_quiet()

    assert not is_quiet(), "it has not seen a forward wait for every layer"
    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    run(worker, StepMetadata())
    worker.stats()
    assert is_quiet()
    native.hold_loads = True
    run(worker, StepMetadata(loads=[load([4, 5], sync=False)]))
    assert worker._landing._promised and not is_quiet()
