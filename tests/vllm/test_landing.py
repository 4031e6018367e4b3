"""Loads that count as over before they are: who waits for them, and when."""

from __future__ import annotations

import pytest
import stage
from test_worker import LAYERS, load, made, run, store

from swiftcache.vllm.landing import BrokenPromise
from swiftcache.vllm.metadata import StepMetadata


@pytest.fixture
def worker(native):
    """It has seen a forward wait for all layers, and two blocks are stored."""
    side = made(stage.caches(), sync=False, promises=True)
    run(side, StepMetadata(stores=[store(0, [1, 2])]))
    native.hold_loads = True
    return side


def start(worker, *requests: str):
    """Loads begin in a step of others. Returns them by request, and what vLLM hears of them."""
    jobs = [load([4 + at], sync=False, request=request) for at, request in enumerate(requests)]
    worker.before_overwriting(StepMetadata())
    worker.bind(StepMetadata(loads=jobs))
    worker.start_loads()
    loads = {request: of for request, (_, of) in worker._receiving.items()}
    received, _ = worker.finished()
    worker.bind(None)
    return loads, received


def test_a_load_counts_as_over_while_its_copies_run_and_the_forward_waits_for_each_layer(worker) -> None:
    loads, received = start(worker, "a")
    assert received == {"a"} and not loads["a"].is_done()
    # The next step was ordered before vLLM heard of it.
    assert run(worker, StepMetadata()).received == set() and loads["a"].waited == []
    done = run(worker, StepMetadata(arrived={"a": True}))
    assert loads["a"].waited == [0, 1]
    assert done.received == set() and done.invalid == set()
    loads["a"].held = False
    run(worker, StepMetadata())
    assert loads["a"].finished


def test_whatever_else_happens_to_its_blocks_happens_after_it(worker) -> None:
    """It was aborted, or waits for room, or the forward may be one that calls no hooks."""
    loads, _ = start(worker, "a")
    worker.before_overwriting(StepMetadata(arrived={"a": False}))
    assert loads["a"].finished and loads["a"].waited == []


def test_one_load_is_promised_at_a_time_in_the_order_of_the_copies(worker) -> None:
    loads, received = start(worker, "a", "b")
    assert received == {"a"}
    assert run(worker, StepMetadata(arrived={"a": True})).received == set()
    loads["a"].held = False
    assert run(worker, StepMetadata()).received == {"b"}


def test_nothing_is_promised_before_a_forward_has_waited_for_every_layer(native) -> None:
    side = made(stage.caches(), sync=False, promises=True)
    run(side, StepMetadata(stores=[store(0, [1])]), layers=LAYERS[:1])
    native.hold_loads = True
    loads, received = start(side, "a")
    assert received == set()
    # What capturing graphs calls is no forward.
    for layer in LAYERS:
        side.wait_for_layer(layer)
    side.reset_capture()
    assert run(side, StepMetadata(), layers=()).received == set()
    assert run(side, StepMetadata()).received == {"a"} and not loads["a"].is_done()


@pytest.mark.parametrize("why", ["what may fail", "other weights", "not asked for"])
def test_what_cannot_be_promised_is_waited_for(worker, native, monkeypatch, why) -> None:
    if why == "what may fail":
        monkeypatch.setattr(native, "promises", False)
    if why == "not asked for":
        worker._landing = None
    worker.bind(StepMetadata(loads=[load([4], sync=False)]))
    worker.start_loads()
    if why == "other weights":
        worker.weights_changed()
    assert worker.finished()[0] == set()


def test_the_engine_ends_where_kv_may_have_been_read_that_was_not_there(worker) -> None:
    start(worker, "a")
    with pytest.raises(BrokenPromise, match="without waiting for every layer"):
        run(worker, StepMetadata(arrived={"a": True}), layers=LAYERS[:1])


def test_the_engine_ends_where_the_device_fails(worker) -> None:
    loads, _ = start(worker, "a")
    loads["a"].failed = [0]
    run(worker, StepMetadata(arrived={"a": True}))
    loads["a"].held = False
    with pytest.raises(BrokenPromise, match="copies of 1 blocks failed"):
        run(worker, StepMetadata())


def test_a_pool_goes_when_they_are_there(worker) -> None:
    loads, _ = start(worker, "a")
    worker.unregister()
    assert loads["a"].finished
