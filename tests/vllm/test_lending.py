"""When an engine lends and takes back, and the way of a loan between scheduler and workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import stage
from stage import caches
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.block_pool import BlockPool

from swiftcache.vllm import SwiftCacheConnector
from swiftcache.vllm.fingerprint import Ranks
from swiftcache.vllm.layout import layout_of, ranges_of
from swiftcache.vllm.lending import LOOK_SECONDS, LOOKS, Decision, Policy, View, terms
from swiftcache.vllm.loans import MARGIN_SECONDS, PAUSE_SECONDS, Loans, WorkerLoans
from swiftcache.vllm.metadata import StepMetadata, WorkerReport
from swiftcache.vllm.metrics import SwiftCacheStats
from swiftcache.vllm.pool import LentBlocks
from swiftcache.vllm.quiet import Quiet

BLOCKS = 101


def agreed(**changed):
    """8 runs of 5 blocks; 10 stay free; lent after 2 seconds."""
    return terms(**({"share": 0.4, "reserve": 0.1, "after": 2.0, "blocks": BLOCKS, "kept": 20} | changed))


def view(now: float = 0.0, **changed) -> View:
    base = {"free": 100, "wanted": 0, "pressed": False, "at_home": range(8), "lent": (), "returning": 0}
    return View(now=now, **(base | changed))


def all_free(run: int) -> bool:
    return True


def test_the_tail_is_cut_into_runs_and_the_longest_request_keeps_its_blocks() -> None:
    runs = agreed().runs
    assert [len(run) for run in runs] == [5] * 8 and runs[0] == range(96, 101) and runs[-1] == range(61, 66)
    assert sum(map(len, agreed(kept=90).runs)) <= 10
    assert sum(map(len, agreed(kept=97).runs)) == 3
    with pytest.raises(ValueError, match=r"lend 0\.4 is refused: of the 101 blocks .* 100 must stay for its longest"):
        agreed(kept=100)


def test_it_lends_when_it_has_been_quiet_for_long_enough() -> None:
    policy = Policy(agreed())
    assert policy.decide(view(0.0), all_free) == Decision() and policy.due == 2.0
    assert policy.decide(view(1.9), all_free) == Decision()
    assert policy.decide(view(2.0), all_free) == Decision(lend=tuple(range(8)))
    assert policy.due is None


def test_needing_blocks_in_between_begins_the_quiet_anew() -> None:
    policy = Policy(agreed())
    policy.decide(view(0.0), all_free)
    policy.decide(view(1.0, wanted=95), all_free)
    assert policy.due is None
    assert policy.decide(view(2.0), all_free) == Decision() and policy.due == 4.0


def test_it_lends_no_more_than_leaves_a_run_and_the_reserve() -> None:
    policy = Policy(agreed(after=0.0))
    # 30 are free, of which 4 are wanted and 10 reserved.
    assert policy.decide(view(free=30, wanted=4), all_free) == Decision(lend=(0, 1))
    assert policy.decide(view(free=30, wanted=4, at_home=[3]), all_free) == Decision(lend=(3,))
    assert policy.decide(view(free=19), all_free) == Decision()


def test_runs_in_use_are_looked_at_now_and_then_and_not_for_ever() -> None:
    policy, looks = Policy(agreed(after=0.0)), []

    def in_use(run: int) -> bool:
        looks.append(run)
        return run == 7 and len(looks) > 8 * (LOOKS + 1)

    for step in range(10 * (LOOKS + 1)):
        now = step / 10 * LOOK_SECONDS
        assert policy.decide(view(now), in_use) == Decision()
        assert (policy.due is None) == (step >= 10 * (LOOKS - 1)), "nobody steps for its sake any more"
    assert len(looks) == 8 * (LOOKS + 1)
    # A free one among them is lent.
    assert policy.decide(view(now + LOOK_SECONDS), in_use) == Decision(lend=(7,))


def test_an_engine_with_little_left_is_not_looked_at() -> None:
    policy = Policy(agreed())
    policy.decide(view(0.0), all_free)
    assert not policy.needs_no_look(20) and policy.due == 2.0
    assert policy.needs_no_look(19) and policy.due is None, "and is not quiet"


def test_it_asks_back_what_it_lacks_before_requests_wait() -> None:
    policy = Policy(agreed(after=0.0))
    lent = (7, 6, 5, 4)
    assert policy.decide(view(free=30, wanted=20, at_home=(), lent=lent), all_free) == Decision()
    assert policy.decide(view(free=30, wanted=21, at_home=(), lent=lent), all_free) == Decision(take_back=(7, 6))
    # What is on its way is not asked for twice.
    assert policy.decide(view(free=30, wanted=21, at_home=(), lent=(5, 4), returning=10), all_free) == Decision()
    assert policy.decide(view(pressed=True, at_home=(), lent=lent), all_free) == Decision(take_back=lent)


def test_what_was_just_taken_back_is_not_lent_at_once() -> None:
    """Hysteresis: no need makes it lend and ask back in turns."""
    for wanted in range(0, 100):
        policy, lent, free = Policy(agreed(after=0.0)), [], 100
        changes = 0
        for _ in range(20):
            at_home = [run for run in range(8) if run not in lent]
            seen = view(free=free, wanted=wanted, at_home=at_home, lent=sorted(lent)[::-1])
            decision = policy.decide(seen, all_free)
            lent = [run for run in lent if run not in decision.take_back] + list(decision.lend)
            free = 100 - 5 * len(lent)
            changes += bool(decision.lend or decision.take_back)
        assert changes <= 2, f"{changes} changes while {wanted} are wanted"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A scheduler's half over a real block pool."""

    def __init__(self, workers: int = 2, **changed) -> None:
        self.blocks = BlockPool(BLOCKS, enable_caching=True, hash_block_size=4)
        self.clock, self.stats = Clock(), SwiftCacheStats()
        pool = LentBlocks(self.blocks)
        self.loans = Loans(agreed(**changed), pool, workers=workers, drain_seconds=0.5, clock=self.clock)

    def step(self, wanted: int = 0, pressed: bool = False) -> StepMetadata:
        step = StepMetadata()
        self.loans.step(step, lambda: wanted, pressed, self.stats)
        return step

    def hear(self, *back: int, refused: str = "") -> None:
        self.loans.heard(WorkerReport(back=dict.fromkeys(back, 1), lend_refused=refused), self.stats)

    @property
    def free(self) -> int:
        return self.blocks.get_num_free_blocks()


def test_blocks_are_back_when_every_worker_says_so() -> None:
    bench = Bench(after=0.0)
    lend = bench.step().lend
    assert [(job.first, job.last) for job in lend][:2] == [(96, 101), (91, 96)] and len(lend) == 8
    assert bench.free == 60
    asked = bench.step(wanted=55).take_back
    assert asked and bench.step(wanted=55).take_back == [], "asked once"
    bench.hear(*asked)
    assert bench.free == 60, "the other worker's part may be written to"
    bench.clock.now = 0.25
    bench.hear(*asked)
    assert bench.free == 60 + 5 * len(asked)
    assert bench.stats.data["counters"] == {
        "lends": 8,
        "give_backs": len(asked),
        "give_back_ms": 250.0 * len(asked),
    }
    assert bench.stats.gauges()["lent_blocks"] == 40 - 5 * len(asked)
    assert bench.stats.gauges()["returning_blocks"] == 0
    # Again, under other numbers: a late word about the old loan is about nothing.
    again = bench.step().lend
    assert again and not {job.loan for job in again} & {job.loan for job in lend}
    free = bench.free
    bench.hear(*asked)
    bench.hear(*asked)
    assert bench.free == free


def test_an_idle_engine_is_stepped_until_it_has_lent_and_no_longer() -> None:
    bench = Bench()
    assert bench.loans.wants_steps(), "it never was busy"
    assert bench.step().lend == [] and bench.loans.wants_steps()
    bench.clock.now = 2.0
    assert bench.step().lend and not bench.loans.wants_steps()


def test_requests_wait_for_blocks_on_their_way_and_not_for_ever() -> None:
    bench = Bench(after=0.0)
    bench.step()
    assert not bench.loans.frees_pending()
    asked = bench.step(pressed=True).take_back
    assert len(asked) == 8 and bench.loans.frees_pending() and bench.loans.wants_steps()
    bench.clock.now = 0.5 + MARGIN_SECONDS
    assert bench.loans.frees_pending()
    # A borrower that does not let go: from now on the pool is a smaller one.
    bench.clock.now += 0.001
    assert not bench.loans.frees_pending() and not bench.loans.wants_steps()
    bench.hear(*asked)
    bench.hear(*asked)
    assert bench.free == 100 and bench.stats.data["counters"]["late_give_backs"] == 8


def test_what_comes_back_unasked_is_not_lent_at_once() -> None:
    bench = Bench(after=0.0)
    first = bench.step().lend[0].loan
    bench.hear(first)
    assert bench.step().take_back == [first], "one worker's part is no use without the other's"
    bench.hear(first)
    bench.hear(first + 1)
    bench.hear(first + 1)
    assert bench.free == 70 and bench.step().lend == []
    assert not bench.loans.wants_steps(), "nobody steps an idle engine for half a minute"
    bench.clock.now = PAUSE_SECONDS
    assert len(bench.step().lend) == 2


def test_a_refusal_ends_lending_and_blocks_come_back() -> None:
    bench = Bench(workers=1, after=0.0)
    loans = [job.loan for job in bench.step().lend]
    bench.hear(*loans, refused="no such layout")
    bench.clock.now = PAUSE_SECONDS
    assert bench.free == 100 and bench.step().lend == [] and not bench.loans.wants_steps()


def test_a_worker_lends_the_bytes_of_blocks_and_says_when_they_are_back(native) -> None:
    cache = native.Cache(native.Connection("", name=""), namespace="n", layer_bytes=[128, 128])
    tensors = caches(layers=2, blocks=8)
    layout = layout_of(tensors, 8)
    worker, bench = WorkerLoans(Quiet()), Bench(workers=1, after=0.0)
    jobs = bench.step().lend[:1]
    jobs[0].first, jobs[0].last = 6, 8
    assert worker.lend(jobs, cache, layout, lambda: None) == ([], "")
    starts = [tensor.data_ptr() for tensor in tensors.values()]
    size = 256
    assert cache.lent == {jobs[0].loan: [(start + 6 * size, 2 * size) for start in starts]}
    assert worker.returned(cache) == []
    worker.take_back([jobs[0].loan], cache)
    assert cache.lent == {} and worker.returned(cache) == [jobs[0].loan] and worker.returned(cache) == []


def test_what_a_worker_cannot_lend_is_back_at_once(native) -> None:
    worker, jobs = WorkerLoans(Quiet()), Bench(after=0.0).step().lend
    loans = [job.loan for job in jobs]
    assert worker.lend(jobs, None, None, lambda: None) == (loans, "")
    layout = layout_of({name: tensor[:, :1] for name, tensor in caches(blocks=BLOCKS).items()}, BLOCKS)
    cache = native.Cache(native.Connection("", name=""), namespace="n", layer_bytes=[128, 128])

    def unmarkable() -> None:
        raise RuntimeError("no such stream")

    whole = layout_of(caches(blocks=BLOCKS), BLOCKS)
    assert worker.lend(jobs, cache, whole, unmarkable) == (loans, "") and cache.lent == {}
    back, refused = worker.lend(jobs, cache, layout, lambda: None)
    assert back == loans and "does not lend from this layout" in refused and cache.lent == {}


def test_layers_side_by_side_in_a_block_are_one_range() -> None:
    import torch

    pool = torch.zeros(8, 2, 64)
    layout = layout_of({f"model.layers.{layer}.attn": pool[:, layer] for layer in range(2)}, 8)
    assert ranges_of(layout, 5, 8) == [(pool.data_ptr() + 5 * 512, 3 * 512)]
    # Its twin: with a third layer that nobody registered, the bytes between are not known to be the blocks'.
    layout = layout_of({f"model.layers.{layer}.attn": torch.zeros(8, 3, 64)[:, layer] for layer in range(2)}, 8)
    with pytest.raises(NotImplementedError):
        ranges_of(layout, 5, 8)


def connector(role: KVConnectorRole, lend: float = 0.5, longest: int = 8 * stage.BLOCK, **settings):
    extra = {"lend": lend, "lend_after_ms": 0} | settings
    config = stage.config(
        kv_transfer_config__kv_connector_extra_config=extra,
        model_config__max_model_len=longest,
        scheduler_config=SimpleNamespace(watermark=0.0),
    )
    return SwiftCacheConnector(config, role, stage.kv_config(blocks=40))


@pytest.fixture
def engine(native, monkeypatch):
    """An engine that lends: both halves of its connector, and its block pool."""
    monkeypatch.setattr(Ranks, "here", staticmethod(Ranks))
    scheduler, worker = connector(KVConnectorRole.SCHEDULER), connector(KVConnectorRole.WORKER)
    worker.register_kv_caches(caches(blocks=40))
    pool = BlockPool(40, enable_caching=True, hash_block_size=stage.BLOCK)
    bind(scheduler, pool)
    return scheduler, worker, pool


def bind(scheduler, pool) -> None:
    scheduler.bind_kv_cache_manager(SimpleNamespace(block_pool=pool))


def nothing() -> SimpleNamespace:
    return stage.output({}, {})


def test_the_facade_lends(engine) -> None:
    scheduler, worker, pool = engine
    assert scheduler.has_pending_push_work()
    lent = hand(scheduler, worker, nothing())
    assert [job.last - job.first for job in lent.lend] == [2] * 8 and pool.get_num_free_blocks() == 23
    assert not scheduler.has_pending_push_work() and not scheduler.has_pending_block_frees()
    # A request arrives that needs more than is left.
    request = stage.request("a", 24 * stage.BLOCK)
    scheduler.on_new_request(request)
    assert hand(scheduler, worker, nothing()).take_back
    assert pool.get_num_free_blocks() >= 26
    worker.shutdown()
    scheduler.shutdown()


def hand(scheduler, worker, output) -> StepMetadata:
    """A step, there and back."""
    step = scheduler.build_connector_meta(output)
    worker.handle_preemptions(step)
    worker.bind_connector_metadata(step)
    worker.get_finished(set())
    report = worker.build_connector_worker_meta()
    worker.clear_connector_metadata()
    scheduler.update_connector_output(stage.answer(kv_connector_worker_meta=report))
    return step


def test_a_vllm_without_the_hooks_is_served_and_lends_nothing(native, monkeypatch) -> None:
    said = []
    monkeypatch.setattr("swiftcache.vllm.connector.logger.error", lambda text, *of: said.append(text % of))
    scheduler = connector(KVConnectorRole.SCHEDULER)
    pool = BlockPool(40, enable_caching=True, hash_block_size=stage.BLOCK)
    pool.touch = None
    bind(scheduler, pool)
    assert "lends nothing: the block pool of vLLM" in said[0] and "lacks touch()" in said[0]
    assert not scheduler.has_pending_push_work()
    assert scheduler.build_connector_meta(nothing()).lend == []
    assert pool.get_num_free_blocks() == 39


def test_an_engine_that_has_nothing_to_lend_says_so_at_start(native) -> None:
    with pytest.raises(ValueError, match=r"lend 0\.5 is refused: of the 40 blocks"):
        connector(KVConnectorRole.SCHEDULER, longest=40 * stage.BLOCK)
    connector(KVConnectorRole.SCHEDULER, lend=0, longest=40 * stage.BLOCK)


def test_a_pool_that_goes_to_sleep_says_what_is_back(engine, monkeypatch) -> None:
    scheduler, worker, pool = engine
    lent = [job.loan for job in hand(scheduler, worker, nothing()).lend]
    stuck, cache = lent[0], worker.worker._cache
    # Closing takes back what it can.
    monkeypatch.setattr(cache, "close", lambda: cache.take_back(lent[1:]))
    worker.unregister_kv_caches()
    hand(scheduler, worker, nothing())
    assert pool.get_num_free_blocks() == 39 - 2, "one run is still out"
    worker.restore_kv_caches()
    hand(scheduler, worker, nothing())
    assert stuck in worker.worker._loans._out
