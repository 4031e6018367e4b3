"""What is refused, when the engine starts, by the flag that brings it about; and what tells engines apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.utils import get_storage_hash_str
from test_layout import mha, mla

from swiftcache.engine.fingerprint import Ranks, namespace
from swiftcache.engine.settings import Settings
from swiftcache.sglang import linker, safety

SERVED = {
    "speculative_algorithm": None,
    "pp_size": 1,
    "dcp_size": 1,
    "attn_cp_size": 1,
    "disaggregation_mode": "null",
    "enable_hisparse": False,
    "enable_memory_saver": False,
    "enable_page_major_kv_layout": False,
}


def stage(pool=None, page: int = 16, **arguments):
    pool = pool if pool is not None else mha(page=page)
    allocator = SimpleNamespace(get_kvcache=lambda: pool)
    params = SimpleNamespace(page_size=page, token_to_kv_pool_allocator=allocator)
    return SimpleNamespace(**SERVED | arguments), params, {ComponentType.FULL}


@pytest.mark.parametrize("make", [mha, mla])
def test_what_is_served(make) -> None:
    safety.check(*stage(make()))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("speculative_algorithm", "EAGLE"),
        ("speculative_algorithm", "NGRAM"),
        ("pp_size", 2),
        ("dcp_size", 2),
        ("attn_cp_size", 2),
        ("disaggregation_mode", "prefill"),
        ("disaggregation_mode", "decode"),
        ("enable_hisparse", True),
        ("enable_memory_saver", True),
        ("enable_page_major_kv_layout", True),
    ],
)
def test_a_refusal_names_its_flag(argument, value) -> None:
    flag = "--" + argument.replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        safety.check(*stage(**{argument: value}))


def test_the_flags_are_sglangs() -> None:
    """A flag that SGLang calls otherwise by now would be served unseen."""
    from sglang.srt.server_args import ServerArgs

    known = ServerArgs.__struct_fields__
    assert [name for name, _, _ in safety._REFUSED if name not in known] == []


@pytest.mark.parametrize("component", [ComponentType.SWA, ComponentType.MAMBA])
def test_state_that_no_page_holds_is_refused(component) -> None:
    arguments, params, _ = stage()
    with pytest.raises(ValueError, match=component.name):
        safety.check(arguments, params, {ComponentType.FULL, component})


def test_small_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="--page-size 16 or more, not 8"):
        safety.check(*stage(mha(page=8), page=8))


class OtherPool(type(mha())):
    """A pool that keeps more than its parent."""


def changed(**attributes):
    pool = mha()
    for name, value in attributes.items():
        setattr(pool, name, value)
    return pool


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (lambda: OtherPool.__new__(OtherPool), "OtherPool"),
        (lambda: changed(kv_cache_layout="hnd"), "SGLANG_USE_HND_KVCACHE"),
        (lambda: changed(k_scale_buffer=[torch.zeros(1)]), "--kv-cache-dtype"),
        (lambda: changed(native_k_scale_buffer=[torch.zeros(1)]), "--kv-cache-dtype"),
        (lambda: changed(post_capture_active=True), "piece by piece"),
        (lambda: changed(enable_custom_mem_pool=True), "SGLANG_MOONCAKE_CUSTOM_MEM_POOL"),
        (lambda: changed(page_size=32), "one page size"),
    ],
)
def test_pools_that_are_not_known_are_refused(pool, says) -> None:
    with pytest.raises(ValueError, match=says):
        safety.check(*stage(pool()))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"lend": 0.5}, "swiftcache donate --elastic"),
        ({"stream_bytes": "1GiB"}, "stream_bytes is not served under SGLang"),
        ({"load": "sync"}, "one of auto, wait"),
        ({"sockte": "/x"}, "'sockte'"),
        ({"max_leased_bytes": "much"}, "max_leased_bytes"),
    ],
)
def test_settings_are_refused_by_name(extra, says) -> None:
    with pytest.raises(ValueError, match="linker_extra_config.*" + says):
        linker.SwiftCacheLinker(*stage()[:2], components={ComponentType.FULL}, extra_config=extra)


def test_settings_are_those_of_every_engine() -> None:
    read = Settings.read(linker.WHERE, {"load": "wait", "max_leased_bytes": "1GiB"}, {}, loads=linker.LOADS)
    assert (read.load, read.max_leased_bytes) == ("wait", 1 << 30)
    with pytest.raises(ValueError, match="SWIFTCACHE_LOAD"):
        Settings.read(linker.WHERE, {}, {"SWIFTCACHE_LOAD": "async"}, loads=linker.LOADS)


# What tells blocks apart.


def key(extra_key=None, cache_salt=None):
    from sglang.srt.mem_cache.radix_cache import RadixKey

    made = RadixKey(list(range(32)), extra_key)
    made.cache_salt = cache_salt
    return get_storage_hash_str(made, None, page_size=16)


def test_requests_of_other_adapters_and_salts_have_other_keys() -> None:
    ways = [key(), key("adapter"), key("other"), key(None, "s"), key(None, "t"), key("s"), key("adapter", "s")]
    first, second = zip(*ways, strict=True)
    assert len(set(first)) == len(set(second)) == len(ways)
    assert key("adapter", "s") == key("adapter", "s")


def test_an_adapter_with_other_files_is_another_namespace(tmp_path, monkeypatch) -> None:
    from swiftcache.sglang import facts as of

    monkeypatch.setattr(of, "model_config_of", lambda _: SimpleNamespace(hf_config=SimpleNamespace(to_dict=dict)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = adapter / "adapter_model.safetensors"

    def named(**changes) -> str:
        arguments = SimpleNamespace(
            **{
                "model_path": str(tmp_path),
                "revision": None,
                "load_format": "auto",
                "quantization_param_path": None,
                "model_loader_extra_config": "{}",
                "random_seed": 1,
                "lora_paths": [SimpleNamespace(lora_path=str(adapter))],
                "dtype": "float32",
            }
            | changes
        )
        pool = mha()
        known = of.facts(arguments, Settings(), pool, linker.layout_of(pool, 16), page=16, ranks=Ranks())
        return namespace(known, Ranks())

    weights.write_bytes(b"one")
    before = named()
    assert named() == before
    weights.write_bytes(b"another")
    assert named() != before
    weights.unlink()
    assert len({named(), named(lora_paths=None), named(dtype="bfloat16"), named(model_path="elsewhere")}) == 4
