"""The way of a loan through vLLM's hooks, between scheduler and workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import stage
from stage import caches
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.block_pool import BlockPool

from swiftcache.engine.fingerprint import Ranks
from swiftcache.engine.layout import ranges_of
from swiftcache.engine.loans import LendJob, WorkerLoans
from swiftcache.engine.quiet import Quiet
from swiftcache.vllm import SwiftCacheConnector
from swiftcache.vllm.layout import layout_of
from swiftcache.vllm.metadata import StepMetadata


def test_a_worker_lends_the_bytes_of_blocks_and_says_when_they_are_back(native) -> None:
    cache = native.Cache(native.Connection("", name=""), namespace="n", layer_bytes=[128, 128])
    tensors = caches(layers=2, blocks=8)
    layout = layout_of(tensors, 8)
    worker, jobs = WorkerLoans(Quiet()), [LendJob(3, 6, 8)]
    assert worker.lend(jobs, cache, layout, lambda: None) == ([], "")
    starts = [tensor.data_ptr() for tensor in tensors.values()]
    size = 256
    assert cache.lent == {jobs[0].loan: [(start + 6 * size, 2 * size) for start in starts]}
    assert worker.returned(cache) == []
    worker.take_back([jobs[0].loan], cache)
    assert cache.lent == {} and worker.returned(cache) == [jobs[0].loan] and worker.returned(cache) == []


def test_what_a_worker_cannot_lend_is_back_at_once(native) -> None:
    worker, jobs = WorkerLoans(Quiet()), [LendJob(number, 2 * number, 2 * number + 2) for number in range(4)]
    loans = [job.loan for job in jobs]
    assert worker.lend(jobs, None, None, lambda: None) == (loans, "")
    layout = layout_of({name: tensor[:, :1] for name, tensor in caches(blocks=8).items()}, 8)
    cache = native.Cache(native.Connection("", name=""), namespace="n", layer_bytes=[128, 128])

    def unmarkable() -> None:
        raise RuntimeError("no such stream")

    whole = layout_of(caches(blocks=8), 8)
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
    monkeypatch.setattr("swiftcache.vllm.worker.ranks_here", Ranks)
    scheduler, worker = connector(KVConnectorRole.SCHEDULER), connector(KVConnectorRole.WORKER)
    worker.register_kv_caches(caches(blocks=40))
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})
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
    worker.get_transfer_results(set())
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
    assert scheduler.build_connector_meta(nothing()).lend == []
    assert not scheduler.has_pending_push_work()
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
    assert scheduler.scheduler._loans.out()[0][0] == stuck
