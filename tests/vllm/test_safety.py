"""What is refused, how loads are chosen, what the namespace tells apart, and the facade over both halves."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import get_args

import pytest
import stage
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from vllm.config import CUDAGraphMode
from vllm.config.cache import CacheDType
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, supports_hma
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    KVCacheConfig,
    KVCacheGroupRole,
    KVCacheSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from swiftcache.engine.fingerprint import Ranks, namespace
from swiftcache.engine.metrics import COUNTERS, GAUGES, Meter
from swiftcache.engine.settings import Settings
from swiftcache.vllm import SwiftCacheConnector, safety
from swiftcache.vllm.facts import facts
from swiftcache.vllm.groups import Groups
from swiftcache.vllm.layout import layout_of
from swiftcache.vllm.metadata import StepMetadata
from swiftcache.vllm.metrics import SwiftCachePromMetrics, SwiftCacheStats


def test_full_attention_and_mla_are_served() -> None:
    safety.check(stage.config(), stage.kv_config())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_transfer_config__kv_role": "kv_producer"}, "kv_both"),
        ({"cache_config__enable_prefix_caching": False}, "no-enable-prefix-caching"),
        ({"cache_config__prefix_caching_hash_algo": "xxhash"}, "prefix_caching_hash_algo"),
        ({"cache_config__calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel_config__distributed_executor_backend": "external_launcher"}, "external_launcher"),
    ],
)
def test_what_could_go_wrong_is_refused_by_name(fields, named) -> None:
    with pytest.raises(ValueError, match=named):
        safety.check(stage.config(parallel_config__world_size=2, **fields), stage.kv_config())


def test_engines_of_one_rank_may_be_launched_by_others() -> None:
    fields = {"distributed_executor_backend": "external_launcher", "world_size": 1}
    safety.check(stage.config(**{f"parallel_config__{name}": of for name, of in fields.items()}), stage.kv_config())


def test_every_kv_dtype_of_vllm_is_served_or_refused_by_name() -> None:
    known = set(get_args(CacheDType))
    assert known >= set(safety.DTYPES)
    for dtype in known:
        config = stage.config(cache_config__cache_dtype=dtype)
        if dtype in safety.DTYPES:
            safety.check(config, stage.kv_config())
        else:
            with pytest.raises(ValueError, match=f"kv-cache-dtype {dtype}: "):
                safety.check(config, stage.kv_config())


def test_other_kinds_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="state beside full attention, not alone"):
        safety.check(stage.config(), stage.kv_config(kv_cache_spec=stage.state()))
    with pytest.raises(ValueError, match="not alone: --disable-hybrid-kv-cache-manager"):
        safety.check(stage.config(), stage.kv_config(kv_cache_spec=stage.window()))
    sinks = SinkFullAttentionSpec(block_size=4, num_kv_heads=2, head_size=4, dtype=torch.float32, sink_len=4)
    with pytest.raises(ValueError, match="not SinkFullAttentionSpec"):
        safety.check(stage.config(), stage.hybrid(sinks))


def test_several_windows_in_one_group_are_refused() -> None:
    for other in (stage.window(sliding_window=16), stage.spec(), stage.chunks()):
        unlike = UniformTypeKVCacheSpecs(block_size=stage.BLOCK, kv_cache_specs={"a": stage.window(), "b": other})
        for kv in (stage.kv_config(kv_cache_spec=unlike), stage.hybrid(unlike)):
            with pytest.raises(ValueError, match="several windows or chunks in one KV cache group"):
                safety.check(stage.config(), kv)
    alike = UniformTypeKVCacheSpecs(block_size=stage.BLOCK, kv_cache_specs={"a": stage.window(), "b": stage.window()})
    safety.check(stage.config(), stage.hybrid(alike))


def check_several(kv: KVCacheConfig | None = None, settings: Settings | None = None, **fields) -> None:
    kv = kv or stage.hybrid()
    config = stage.config(**fields)
    safety.check(config, kv)
    safety.check_several(config, kv, settings or Settings())


def test_sliding_windows_beside_full_attention_are_served() -> None:
    check_several()
    check_several(stage.hybrid(stage.window(), stage.window(sliding_window=4 * stage.BLOCK), stage.spec()))


def test_chunked_local_attention_beside_full_attention_is_served() -> None:
    check_several(stage.hybrid(stage.chunks()))
    with pytest.raises(ValueError, match="chunks beside full attention, not alone"):
        safety.check(stage.config(), stage.kv_config(kv_cache_spec=stage.chunks()))


def test_of_what_is_served_it_is_known_which_blocks_are_needed() -> None:
    """A group that is taken for full attention, and is not, would have vLLM's placeholder stored and loaded."""
    made = {type(spec): spec for spec in (stage.spec(), stage.window(), stage.chunks(), stage.state())}
    made[MLAAttentionSpec] = MLAAttentionSpec(block_size=stage.BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32)
    assert made.keys() == set(safety.SERVED)
    config = stage.config(max_in_flight_tokens=8)
    config.model_config.max_model_len = 100
    for kind, spec in made.items():
        (_, group) = Groups.of(stage.hybrid(spec), config, stage.BLOCK).all
        assert group.full == (kind in safety.FULL)
    with pytest.raises(ValueError, match="a group of SinklessSpec"):
        Groups.of(stage.hybrid(SinklessSpec(block_size=stage.BLOCK)), config, stage.BLOCK)


def test_a_block_of_the_only_group_is_a_unit() -> None:
    """Whatever block size a backend has chosen for it."""
    kv = stage.kv_config(kv_cache_spec=stage.spec(block_size=2 * stage.BLOCK))
    (group,) = Groups.of(kv, stage.config(), stage.BLOCK).all
    assert group.per_unit == 1


@dataclasses.dataclass(frozen=True)
class SinklessSpec(KVCacheSpec):
    """Of a vLLM to come."""

    prefix_cacheable = True
    page_size_bytes = 1


def test_state_beside_full_attention_is_served() -> None:
    check_several(stage.hybrid(stage.state()))
    check_several(stage.hybrid(stage.state(), stage.state(), stage.window()), cache_config__prefix_match_unit=2)


def test_groups_of_which_vllm_keeps_no_prefix_are_not_served_and_do_not_matter() -> None:
    scratch = CircularBufferSpec(block_size=stage.BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32)
    kv = stage.hybrid(stage.state(), scratch)
    check_several(kv)
    groups = Groups.of(kv, stage.config(), stage.BLOCK)
    assert [group.number for group in groups.all] == [0, 1] and groups.several
    only = stage.hybrid(scratch)
    check_several(only)
    assert Groups.of(only, stage.config(), stage.BLOCK).several, "vLLM cannot be told of lost blocks here either"


@pytest.mark.parametrize("how", ["host_resident", "role", "config"])
def test_hisparse_is_refused_by_name(how) -> None:
    kv, config = stage.hybrid(), stage.config()
    if how == "host_resident":
        kv.kv_cache_groups[1].host_resident = True
    elif how == "role":
        kv.kv_cache_groups[1].role = KVCacheGroupRole.HISPARSE_SOURCE
    else:
        config.attention_config = SimpleNamespace(hisparse_config=SimpleNamespace())
    with pytest.raises(ValueError, match="does not serve HiSparse"):
        safety.check(config, kv)


def test_of_several_groups_as_much_is_never_lent_as_the_longest_request_has_of_all() -> None:
    kv = stage.hybrid(stage.window(), stage.state(), blocks=200)
    config = stage.config(scheduler_config=SimpleNamespace(watermark=0.1), max_in_flight_tokens=8)
    config.model_config.max_model_len = 100 * stage.BLOCK
    groups = Groups.of(kv, config, stage.BLOCK)
    window, state = groups.windows[0].most, groups.states[0].most
    assert 0 < window < 10 and 0 < state < 10
    guessing = Groups.of(stage.hybrid(stage.state(num_speculative_blocks=3)), config, stage.BLOCK)
    assert guessing.states[0].most == state + 3
    assert safety.never_lent(config, kv, groups, stage.BLOCK) == (100 + window + state) + 20 + 3 * 3 + 1
    one = stage.kv_config(blocks=200)
    assert safety.never_lent(config, one, Groups.of(one, config, stage.BLOCK), stage.BLOCK) == 100 + 20 + 4


def test_what_nobody_has_shown_to_be_right_with_several_groups_is_refused_by_name(monkeypatch) -> None:
    mla = MLAAttentionSpec(block_size=stage.BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="MLAAttentionSpec"):
        check_several(stage.hybrid(mla))
    with pytest.raises(ValueError, match="mamba-cache-mode align, not all"):
        check_several(stage.hybrid(stage.state(mamba_cache_mode="all")))
    check_several(speculative_config=SimpleNamespace(method="eagle"))
    check_several(stage.hybrid(stage.state()), speculative_config=SimpleNamespace(method="mtp"))
    with pytest.raises(ValueError, match="the setting stream_bytes "):
        check_several(settings=Settings(stream_bytes=1 << 30))
    with pytest.raises(ValueError, match="load 'sync' is refused"):
        check_several(settings=Settings(load="sync"))
    outer = SimpleNamespace(kv_connector="MultiConnector", kv_connector_extra_config={})
    whole = SimpleNamespace(kv_transfer_config=outer)
    monkeypatch.setattr(safety, "get_current_vllm_config_or_none", lambda: whole)
    with pytest.raises(ValueError, match="MultiConnector"):
        check_several()


def test_failed_loads_are_recomputed() -> None:
    config = stage.config()
    safety.require_recompute(config)
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"

    class Frozen:
        kv_load_failure_policy = "fail"

        def __setattr__(self, name, value):
            raise AttributeError("frozen")

    with pytest.raises(ValueError, match="recompute"):
        safety.require_recompute(stage.config(kv_transfer_config=Frozen()))


def test_inside_another_connector_its_policy_is_the_one_that_counts(monkeypatch) -> None:
    def whole(policy: str) -> SimpleNamespace:
        outer = SimpleNamespace(
            kv_connector="MultiConnector", kv_load_failure_policy=policy, kv_connector_extra_config={}
        )
        return SimpleNamespace(kv_transfer_config=outer)

    monkeypatch.setattr(safety, "get_current_vllm_config_or_none", lambda: whole("recompute"))
    safety.require_recompute(stage.config())
    monkeypatch.setattr(safety, "get_current_vllm_config_or_none", lambda: whole("fail"))
    with pytest.raises(ValueError, match=r'"recompute" beside "kv_connector": "MultiConnector"'):
        safety.require_recompute(stage.config())
    # Alone, its own policy is vLLM's.
    monkeypatch.setattr(safety, "get_current_vllm_config_or_none", stage.config)
    safety.require_recompute(stage.config())


def test_twice_in_another_connector_is_refused(monkeypatch) -> None:
    child = {"kv_connector": stage.config().kv_transfer_config.kv_connector}
    for children, refused in [([child, child], True), ([child, {"kv_connector": "Other"}], False)]:
        outer = SimpleNamespace(
            kv_connector="MultiConnector",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connectors": children},
        )
        whole = SimpleNamespace(kv_transfer_config=outer)
        monkeypatch.setattr(safety, "get_current_vllm_config_or_none", lambda whole=whole: whole)
        if refused:
            with pytest.raises(ValueError, match="is twice"):
                safety.surrounding(stage.config())
        else:
            assert safety.surrounding(stage.config()) is outer


def test_a_model_without_prefix_caching_is_told_apart_from_a_flag() -> None:
    off = {"cache_config__enable_prefix_caching": False}
    with pytest.raises(ValueError, match="vLLM switches prefix caching off for this model"):
        safety.check(stage.config(**off, model_config__is_prefix_caching_supported=False), stage.kv_config())
    off_by_itself = off | {"model_config__is_prefix_caching_supported": False}
    for attention in ("encoder_only", "encoder_decoder"):  # BERT, Whisper
        named = attention.replace("_", "-")
        with pytest.raises(ValueError, match=f"vLLM switches prefix caching off for {named} models"):
            safety.check(stage.config(**off_by_itself, model_config__attn_type=attention), stage.kv_config())
    off["model_config__is_prefix_caching_supported"] = True
    with pytest.raises(
        ValueError, match="vLLM switches prefix caching off for models with MLA, such as DeepSeek, on CPUs"
    ):
        safety.check(stage.config(**off, model_config__use_mla=True), stage.kv_config())
    with pytest.raises(ValueError, match="drop --no-enable-prefix-caching"):
        safety.check(stage.config(**off), stage.kv_config())


def test_inside_another_connector_its_counters_are_found_by_name() -> None:
    data = {"SwiftCacheConnector": SwiftCacheStats().data | {"counters": {"lookups": 2}}}
    found = MultiConnector.build_kv_connector_stats(data)
    assert found.reduce() == {"SwiftCacheConnector": {"lookups": 2}}


def test_loads_are_synchronous_only_where_vllm_recovers_from_their_failure() -> None:
    auto, sync, never, wait = (Settings(load=load) for load in ("auto", "sync", "async", "wait"))
    plain = stage.config()
    assert safety.loads_synchronously(plain, auto) and safety.loads_synchronously(plain, sync)
    assert not safety.loads_synchronously(plain, never) and not safety.loads_synchronously(plain, wait)
    for unsafe in ({"max_concurrent_batches": 2}, {"use_v2_model_runner": True}):
        config = stage.config(**unsafe)
        assert not safety.loads_synchronously(config, auto)
        with pytest.raises(ValueError, match="load 'sync' is refused"):
            safety.loads_synchronously(config, sync)
    graphs = stage.config(compilation_config__cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    assert not safety.loads_synchronously(graphs, auto)


def test_loads_end_layer_by_layer_only_where_every_forward_that_needs_them_calls_hooks() -> None:
    def may(settings: Settings | None = None, groups: int = 1, **fields) -> bool:
        kv = SimpleNamespace(kv_cache_groups=[None] * groups)
        return safety.may_promise(stage.config(**fields), kv, settings or Settings())

    modes = "compilation_config__cudagraph_mode"
    assert may() and may(Settings(load="async"))
    assert may(**{modes: CUDAGraphMode.FULL_AND_PIECEWISE}) and may(**{modes: CUDAGraphMode.FULL_DECODE_ONLY})
    assert not may(**{modes: CUDAGraphMode.FULL})
    assert not may(Settings(load="wait")) and not may(Settings(stream_bytes=1 << 30)) and not may(groups=2)
    assert not may(speculative_config=object())


def name_of(settings: Settings | None = None, ranks: Ranks | None = None, blocks: int = 8, **fields) -> str:
    ranks = ranks or Ranks()
    layout = layout_of(stage.caches(blocks=blocks), blocks)
    known = facts(
        stage.config(**fields),
        settings or Settings(),
        layout,
        block_tokens=4,
        backends=["CPU_ATTN"],
        ranks=ranks,
    )
    return namespace(known, ranks)


def test_the_namespace_tells_apart_what_changes_bytes_and_nothing_else() -> None:
    base = name_of()
    assert base == name_of() and len(base.encode()) <= 256
    assert base == name_of(blocks=4), "the pool's size does not matter"
    others = {
        name_of(model_config__dtype=torch.bfloat16),
        name_of(model_config__model="other"),
        name_of(model_config__revision="abc"),
        name_of(model_config__hf_config=stage.Text(layers=3)),
        name_of(model_config__quantization="awq"),
        name_of(cache_config__cache_dtype="fp8"),
        name_of(cache_config__kv_cache_layout="LBNHC"),
        name_of(cache_config__prefix_caching_hash_algo="sha256_cbor"),
        name_of(Settings(salt="s")),
        name_of(ranks=Ranks(0, 2, 0, 1)),
        name_of(ranks=Ranks(1, 2, 0, 1)),
        name_of(ranks=Ranks(0, 1, 1, 2)),
    }
    assert len(others) == 12 and base not in others


def test_engines_of_one_model_id_share_whatever_their_paths() -> None:
    named = Settings(model_id="mine@1")
    assert name_of(named, model_config__model="a") == name_of(named, model_config__model="b")


def test_its_log_lines_go_where_vllms_go(native, monkeypatch) -> None:
    monkeypatch.setattr("swiftcache.vllm.worker.ranks_here", Ranks)
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    theirs = logging.getLogger("vllm")
    theirs.addHandler(handler)
    before = theirs.level
    theirs.setLevel(logging.INFO)
    try:
        worker = SwiftCacheConnector(stage.config(), KVConnectorRole.WORKER, stage.kv_config())
        worker.register_kv_caches(stage.caches())
        worker.shutdown()
        theirs.setLevel(logging.ERROR)
        logging.getLogger("swiftcache").warning("not said")
    finally:
        theirs.removeHandler(handler)
        theirs.setLevel(before)
    assert any("namespace" in line for line in lines) and "not said" not in lines


def read(meter: Meter, totals: dict[str, float]) -> SwiftCacheStats:
    stats = SwiftCacheStats()
    meter.read(totals, stats)
    return stats


def test_metrics_reach_prometheus() -> None:
    registry = CollectorRegistry()

    def kind(of):
        return lambda name, documentation, labelnames, **_: of(name, documentation, labelnames, registry=registry)

    metrics = SwiftCachePromMetrics(
        stage.config(),
        {Counter: kind(Counter), Gauge: kind(Gauge), Histogram: kind(Histogram)},
        ["engine"],
        {0: ["0"]},
    )
    one, other = Meter("0.0"), Meter("0.1")
    totals = {"stored_blocks": 3.0, "loaded_nvlink_bytes": 10.0, "loaded_host_bytes": 5.0, "leased_bytes": 7.0}
    stats = read(one, totals).aggregate(read(other, totals))
    assert stats.reduce()["leased_bytes"] == 14
    metrics.observe(stats.to_dict())
    metrics.observe(read(one, totals | {"stored_blocks": 4.0}).to_dict())
    text = generate_latest(registry).decode()
    assert 'vllm:swiftcache_stored_blocks_total{engine="0"} 7.0' in text
    assert 'vllm:swiftcache_loaded_bytes_total{engine="0"} 30.0' in text
    assert 'vllm:swiftcache_leased_bytes{engine="0"} 14.0' in text
    for name in [*COUNTERS, *GAUGES]:
        assert f"vllm:swiftcache_{name}" in text
    assert SwiftCacheStats().is_empty() and not stats.is_empty()
    assert read(one, {"stored_blocks": 1.0}).data["counters"]["stored_blocks"] == 1, "opened anew: counted from 0"


def test_the_facade(native, monkeypatch) -> None:
    monkeypatch.setattr("swiftcache.vllm.worker.ranks_here", Ranks)
    config = stage.config()
    scheduler = SwiftCacheConnector(config, KVConnectorRole.SCHEDULER, stage.kv_config())
    worker = SwiftCacheConnector(config, KVConnectorRole.WORKER, stage.kv_config())
    assert supports_hma(SwiftCacheConnector) and not scheduler.requires_kv_delivery
    assert SwiftCacheConnector.requires_piecewise_for_cudagraph({"load": "sync"})
    assert not SwiftCacheConnector.requires_piecewise_for_cudagraph({})
    assert SwiftCacheConnector.supports_sleep_mode(config.kv_transfer_config)
    worker.register_kv_caches(stage.caches())
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})

    # A step as Model Runner V2 takes it, with its arguments and hooks.
    request = stage.request("a", 9)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    scheduler.update_state_after_alloc(request, stage.allocation([1, 2, 3]), 0)
    output = stage.output({"a": 9}, {"a": [1, 2, 3]})
    step = scheduler.build_connector_meta(output)
    assert isinstance(step, StepMetadata) and [job.blocks for job in step.stores] == [[1, 2]]
    worker.handle_preemptions(step)
    worker.bind_connector_metadata(step)
    worker.start_load_kv(
        None, scheduler_output=output, request_state_indices=None, request_ids=["a"], num_tokens=9, attn_metadata={}
    )
    for layer, cache in stage.caches().items():
        worker.wait_for_layer_load(layer)
        worker.save_kv_layer(layer, cache, None)
    worker.finish_forward()
    worker.wait_for_save()
    results = worker.get_transfer_results(set())
    assert not results.finished_sending and not results.finished_recving and not results.failed_recving
    assert worker.get_block_ids_with_load_errors() == set()
    meta = worker.build_connector_worker_meta()
    assert worker.get_kv_connector_stats() is not None
    worker.clear_connector_metadata()
    worker.reset_capture_state()
    scheduler.update_connector_output(stage.answer(kv_connector_worker_meta=meta))
    request.num_computed_tokens = 9
    assert scheduler.request_finished_all_groups(request, ([1, 2, 3],)) == (False, None)
    again = stage.request("b", 9)
    assert scheduler.get_num_new_matched_tokens(again, 0) == (8, False)
    assert scheduler.get_external_cache_hit_sources(again, 8)
    assert scheduler.get_kv_connector_stats() is not None
    assert list(scheduler.take_events()) == [] and scheduler.reset_cache() is True
    worker.unregister_kv_caches()
    worker.restore_kv_caches()
    worker.shutdown()
    scheduler.shutdown()


def test_every_hook_of_the_base_class_is_known() -> None:
    """A hook that vLLM adds is one to think about."""
    hooks = {name for name, of in vars(KVConnectorBase_V1).items() if callable(of) and not name.startswith("_")}
    default = {
        "get_mem_pool_context",
        "has_connector_metadata",
        "set_host_xfer_buffer_ops",
        "get_finished",
        "get_kv_connector_kv_cache_events",
        "bind_gpu_block_pool",
        "get_loaded_kv_cache_group_ids",
        "get_external_cache_hit_sources",
        "register_finished_partial_tail",
        "get_finished_count",
    }
    assert hooks - set(vars(SwiftCacheConnector)) <= default
