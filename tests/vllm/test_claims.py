"""Loads that cannot fail from the lookup on: the scheduler's half and the worker's in one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import stage
import torch
from test_scheduler import Stand
from test_worker import LAYERS, made, run
from vllm.v1.request import RequestStatus

from swiftcache.vllm import landing, others
from swiftcache.vllm.landing import BrokenPromise
from swiftcache.vllm.metadata import Adapter, Handshake, StepMetadata, StoreJob

TABLE = [4, 5, 6, 7, 0]
"""Where a request's blocks are when they are loaded: elsewhere than when they were stored."""
STORED = [1, 2, 3]


class Engine(Stand):
    """Its worker keeps the first three blocks of a prompt of 17 tokens, and has seen a forward wait for every layer."""

    def __init__(self, native) -> None:
        super().__init__(native, sync=False, recovers=False, promises=True)
        self.caches = stage.caches()
        self.worker = made(self.caches, sync=False, promises=True)
        self.side.meet([self.worker.handshake()])
        request = stage.request("before", 17)
        keys = self.side._finder.keys(request, self.side._groups.full[0], 0, 3)
        run(self.worker, StepMetadata(stores=[StoreJob(0, "before", keys, STORED)]))
        self.stored = {name: cache[STORED].clone() for name, cache in self.caches.items()}
        native.calls.clear()

    def ask(self, name: str = "a"):
        """A request of the same prompt, and what vLLM hears of it."""
        request = stage.request(name, 17)
        return request, self.side.matched_tokens(request, 0)

    def begin(self, name: str = "a", tokens: int = 5):
        """The step that a request is admitted in, after its lookup."""
        request, answer = self.ask(name)
        self.admit(request, answer[0], TABLE)
        request.num_computed_tokens = answer[0]
        return self.step(request, tokens, TABLE, loads=not answer[1])


@pytest.fixture
def engine(native) -> Engine:
    return Engine(native)


def test_what_the_worker_has_is_loaded_in_the_step_that_finds_it(engine, native) -> None:
    native.hold_loads = True
    request, answer = engine.ask()
    assert answer == (12, False)
    engine.admit(request, 12, TABLE)
    request.num_computed_tokens = 12
    step = engine.step(request, 5, TABLE, loads=True)
    (job,) = step.loads
    assert (job.blocks, job.sync, job.claimed, job.computes) == (TABLE[:3], False, True, True)
    assert step.doubt == 0, "it cannot fail, so what is computed on it is right"
    assert [store.blocks for store in step.stores] == [[7]]
    done = run(engine.worker, step)
    (load,) = engine.worker._landing._behind
    assert load.waited == [0, 1] and not load.is_done()
    assert (done.received, done.failed, done.invalid) == (set(), set(), set())
    for name, cache in engine.caches.items():
        assert torch.equal(cache[TABLE[:3]], engine.stored[name])
    assert len(native.Claim.there) == 0
    assert engine.worker._landing.claimed == 1


def test_the_forward_waits_for_all_of_it_where_it_may_call_no_hooks(engine, native) -> None:
    step = engine.begin(tokens=1)
    assert not step.loads[0].computes
    native.hold_loads = True
    engine.worker.before_overwriting(step)
    engine.worker.bind(step)
    engine.worker.start_loads()
    assert engine.worker._landing._read == [], "it is over"


def loads(native) -> list[tuple]:
    return [call for call in native.calls if call[0] == "load"]


def test_copies_begin_as_soon_as_the_request_has_its_blocks(engine, native, monkeypatch) -> None:
    """vLLM takes a while from there to the forward."""
    monkeypatch.setattr(engine.worker, "_cuda", True)
    streams = iter([77, 77, 78, 78])
    for name, early in (("a", False), ("b", True), ("c", True), ("d", False)):
        native.calls.clear()
        stream = next(streams)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: SimpleNamespace(cuda_stream=stream))
        request, answer = engine.ask(name)
        engine.admit(request, answer[0], TABLE)
        # Behind what the engine has queued on its stream, which is known from earlier steps if they had only one.
        assert [call[2].stream for call in loads(native)] == ([77] if early else [])
        request.num_computed_tokens = answer[0]
        run(engine.worker, engine.step(request, 5, TABLE, loads=True))
        assert [call[2].stream for call in loads(native)] == [77 if early else stream]


@pytest.mark.parametrize("stored", [TABLE[1], 1], ids=["its-own", "another"])
def test_copies_begin_with_the_step_where_a_store_reads_one_of_its_blocks(engine, native, stored) -> None:
    """The step has given the block away, and waits for the store first."""
    native.hold_stores = True
    other = stage.request("other", 5, start=100)
    engine.side.matched_tokens(other, 0)
    engine.admit(other, 0, [stored, 2])
    run(engine.worker, engine.step(other, 5, [stored, 2]))
    ((_, store),) = engine.worker._storing["other"].values()
    step = engine.begin()
    assert len(loads(native)) == (0 if stored in TABLE else 1)
    engine.worker.bind(step)
    engine.worker.start_loads()
    assert len(loads(native)) == 1 and not store.is_done()


def test_what_has_begun_is_over_before_its_blocks_are_anybody_elses(engine, native) -> None:
    """vLLM does not give up a request after it has got its blocks. If it does after all:"""
    request, answer = engine.ask()
    native.hold_loads = True
    engine.admit(request, answer[0], TABLE)
    ((load, _),) = engine.worker._claims._begun.values()
    engine.side._loads.clear()
    assert not load.finished
    engine.side.metadata(stage.output({}, {}))
    assert load.finished


def test_a_claim_ends_with_the_step_and_is_made_anew(engine, native) -> None:
    """vLLM has no room for the request, or no tokens left in this step."""
    request, answer = engine.ask()
    assert answer == (12, False) and len(native.Claim.there) == 1
    other = stage.request("other", 5)
    engine.side.matched_tokens(other, 0)
    engine.admit(other, 0, [1, 2])
    engine.step(other, 5, [1, 2])
    assert len(native.Claim.there) == 0
    assert engine.side.matched_tokens(request, 0) == (12, False)
    assert len(native.Claim.there) == 1
    assert engine.begin("a").loads[0].claimed


@pytest.mark.parametrize("free", [3, 4, 5, 6])
def test_nothing_is_claimed_again_while_the_pool_has_no_room_for_the_request(engine, native, free) -> None:
    """It has 17 tokens, which is 5 blocks, and vLLM keeps one free for those that run."""
    pool = SimpleNamespace(get_num_free_blocks=lambda: free, blocks=range(100))
    request, answer = engine.ask()
    assert answer == (12, False)
    engine.side._manager = SimpleNamespace(block_pool=pool, watermark_blocks=1, get_block_ids=lambda _: ([],))
    engine.side.metadata(stage.output({}, {}))
    tracked = engine.side._tracked["a"]
    tracked.too_few = None
    native.calls.clear()
    answers = []
    for _ in range(3):
        answers.append(engine.side.matched_tokens(request, 0))
        engine.side.metadata(stage.output({}, {}))
    claims = [call for call in native.calls if call[0] == "claim"]
    fits = free >= 6
    # vLLM has its reasons where it does not schedule what fits, and they last.
    assert answers == [(12, not fits), (12, True), (12, True)] and len(claims) == fits
    assert len(native.Claim.there) == 0
    tracked.too_few = None
    # What vLLM has computed itself may need no room.
    assert engine.side._fits(tracked, 4) == (free >= 5)


def test_what_vllm_had_no_room_for_is_claimed_again_when_more_is_free(engine, native) -> None:
    """Blocks of its own cache that no request has count as free until vLLM gives them to the request."""
    free = 20
    pool = SimpleNamespace(get_num_free_blocks=lambda: free, blocks=range(100))
    engine.side._manager = SimpleNamespace(block_pool=pool, watermark_blocks=0, get_block_ids=lambda _: ([],))
    request, answer = engine.ask()
    assert answer == (12, False)
    for free, claimed in ((20, True), (20, False), (19, False), (20, False), (21, True), (21, False)):
        assert engine.side.matched_tokens(request, 0) == (12, not claimed), free
        engine.side.metadata(stage.output({}, {}))
    engine.side.matched_tokens(request, 0)
    engine.admit(request, 12, TABLE)
    assert engine.side._tracked["a"].too_few is None


def test_what_was_claimed_may_be_gone_when_it_is_asked_for_again(engine) -> None:
    request, answer = engine.ask()
    assert answer == (12, False)
    engine.side.metadata(stage.output({}, {}))
    engine.worker._cache.blocks.clear()
    assert engine.side.matched_tokens(request, 0) == (12, True), "it is loaded as what may fail"


def test_others_are_asked_as_long_as_they_have_more_now_and_then(engine, native, monkeypatch) -> None:
    asked = []
    for number in range(others.IN_VAIN + 2 * others.EVERY):
        before = engine.lookups()
        assert engine.ask(f"r{number}")[1] == (12, False)
        asked.append(engine.lookups() > before)
        engine.side.metadata(stage.output({}, {}))
    quiet = [False] * (others.EVERY - 1) + [True]
    assert asked == [True] * others.IN_VAIN + quiet + quiet
    # Somebody else has more: it is loaded from there, as what may fail, and the question is worth something again.
    mine = engine.worker.handshake().borrower_id
    native.hosts[mine] = {key[:16] for key in stage.request("b", 17).block_hashes}
    answers = [engine.ask(f"s{number}")[1] for number in range(others.EVERY + 1)]
    assert answers == [(12, False)] * (others.EVERY - 1) + [(16, True)] * 2
    # Where much is missing, nobody counts.
    native.hosts.clear()
    monkeypatch.setattr(others, "FEW_TOKENS", stage.BLOCK - 1)
    for number in range(2 * others.IN_VAIN):
        before = engine.lookups()
        assert engine.ask(f"t{number}")[1] == (12, False) and engine.lookups() == before + 1


def test_nobody_is_asked_for_what_is_there(native) -> None:
    engine = Engine(native)
    request = stage.request("a", 15)
    assert engine.side.matched_tokens(request, 0) == (12, False) and engine.lookups() == 0


def test_what_the_worker_has_is_found_without_a_broker(engine, native, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(native.Connection, "count_hits", fail)
    assert engine.ask()[1] == (12, False)


def test_nothing_is_claimed_before_a_forward_has_waited_for_every_layer(native) -> None:
    engine = Engine(native)
    engine.worker.unregister()
    engine.worker.restore()
    assert engine.ask()[1] == (12, True)
    # The next forward shows it.
    run(engine.worker, StepMetadata())
    assert engine.ask("b")[1] == (12, False)


def test_loads_of_other_connectors_are_in_doubt_all_the_same(engine) -> None:
    """Where there are others, workers claim nothing."""
    engine.worker._claims = None
    request = stage.request("x", 17, start=100)
    assert engine.side.matched_tokens(request, 0) == (0, False)
    engine.admit(request, 0, TABLE)
    assert engine.step(request, 17, TABLE, loads=True).doubt > 0


@pytest.mark.parametrize(
    "why", ["more than a forward may wait for", "what may fail", "other weights", "an adapter", "asleep", "two workers"]
)
def test_what_cannot_be_claimed_is_loaded_beside_the_forward(engine, native, monkeypatch, why) -> None:
    if why == "more than a forward may wait for":
        monkeypatch.setattr(landing, "MOST_BYTES_ALONE", 1)
    if why == "what may fail":
        monkeypatch.setattr(native, "promises", False)
    if why == "other weights":
        engine.worker.weights_changed()
    if why == "an adapter":
        engine.side._track(stage.request("a", 17)).adapter = Adapter(1, b"files")
    if why == "asleep":
        engine.worker.unregister()
    if why == "two workers":
        me = engine.worker.handshake()
        engine.side.meet([me, Handshake(me.namespace, bytes(16))])
    assert engine.ask()[1] == (12, True)


def test_a_load_that_would_be_behind_another_is_not_claimed(engine, native) -> None:
    native.hold_loads = True
    run(engine.worker, engine.begin("a"))
    (first,) = engine.worker._landing._behind
    step = engine.begin("b")
    assert not step.loads[0].claimed
    first.held = False
    # The other one's copies are queued by now, and vLLM has not heard that they are over.
    engine.worker.bind(step)
    engine.worker.start_loads()
    assert engine.ask("c")[1] == (16, True)
    engine.worker.finished()
    assert engine.ask("d")[1] == (16, True)
    engine.worker._landing._promised["b"].held = False
    assert engine.ask("e")[1] == (16, False)


def test_several_are_claimed_in_a_step_as_far_as_a_forward_may_wait(engine, monkeypatch) -> None:
    block = sum(entry.page for entry in engine.worker._layout.entries)
    monkeypatch.setattr(landing, "MOST_BYTES_ALONE", 7 * block)
    assert [engine.ask(name)[1] for name in "abc"] == [(12, False), (12, False), (12, True)]


@pytest.mark.parametrize("other", RequestStatus)
def test_more_is_claimed_where_no_other_request_runs(engine, native, monkeypatch, other) -> None:
    """It would wait for all of it."""
    block = sum(entry.page for entry in engine.worker._layout.entries)
    monkeypatch.setattr(landing, "MOST_BYTES", 3 * block - 1)
    running = stage.request("other", 5, start=100)
    engine.side.matched_tokens(running, 0)
    running.status = other
    native.calls.clear()
    waits = other == RequestStatus.RUNNING
    assert engine.ask()[1] == (12, waits)
    claims = [call for call in native.calls if call[0] == "claim"]
    assert len(claims) == 1, "what is too much is not looked for again"
    engine.side.metadata(stage.output({}, {}))
    # It waits for so much in any case.
    monkeypatch.setattr(landing, "MOST_BYTES", 3 * block)
    assert engine.ask("b")[1] == (12, False)


def test_the_engine_ends_where_it_would_compute_on_kv_that_is_not_there(engine, native, monkeypatch) -> None:
    step = engine.begin("a")
    engine.worker._claims.keep(())
    with pytest.raises(BrokenPromise, match="cannot begin"):
        run(engine.worker, step)
    step = engine.begin("b")
    with pytest.raises(BrokenPromise, match="behind the forward"):
        run(engine.worker, step, before=False)
    step = engine.begin("c")
    monkeypatch.setattr(native, "hold_loads", True)
    with pytest.raises(BrokenPromise, match="without waiting for every layer"):
        run(engine.worker, step, layers=LAYERS[:1])


def test_the_engine_ends_where_the_device_fails(engine, native, monkeypatch) -> None:
    step = engine.begin("a")
    monkeypatch.setattr(native, "promises", False)
    with pytest.raises(BrokenPromise, match="could not begin"):
        run(engine.worker, step)
