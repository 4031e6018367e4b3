"""Every layout that vLLM 0.32 has, made by vLLM's own code, read back as opaque pages."""

from __future__ import annotations

import ctypes

import pytest
import stage
import torch
from vllm.v1.kv_cache_interface import KVCacheTensor, MLAAttentionSpec, compute_layout_strides, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

from swiftcache.vllm.layout import layout_of

BLOCKS, LAYERS = 6, 3


def views(layout: KVCacheLayout, spec, kernel_block: int | None = None) -> dict[str, torch.Tensor]:
    strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    raw = torch.randint(-128, 127, (LAYERS * BLOCKS * spec.page_size_bytes,), dtype=torch.int8)
    names = [f"model.layers.{layer}.attn" for layer in range(LAYERS)]
    placed = KVCacheTensor(size=raw.numel(), layers=names, layer_stride=strides[0], block_stride=strides[1])
    made = create_kv_cache_views(raw, spec, BLOCKS, layout, placed, kernel_block)
    return dict(zip(names, made, strict=True))


def whole(layout: KVCacheLayout) -> bool:
    """Whether heads, states and content of a block lie together."""
    letters = layout.name
    return {letters.index(letter) for letter in "HNC"} == {2, 3, 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_pages_are_what_vllm_addresses(layout: KVCacheLayout, dtype: torch.dtype) -> None:
    caches = views(layout, stage.spec(dtype=dtype))
    if not whole(layout):
        with pytest.raises(ValueError, match="one run of bytes"):
            layout_of(caches, BLOCKS)
        return
    found = layout_of(caches, BLOCKS)
    assert len(found.entries) == LAYERS
    for name, cache in caches.items():
        (number,) = found.by_layer[name]
        entry = found.entries[number]
        for block in range(BLOCKS):
            page = ctypes.string_at(entry.address + entry.offset + block * entry.stride, entry.page)
            values = sorted(cache[block].contiguous().view(torch.uint8).flatten().tolist())
            assert sorted(page) == values
        assert entry.offset + (BLOCKS - 1) * entry.stride + entry.page <= entry.bytes


def test_kernels_that_split_blocks() -> None:
    caches = views(KVCacheLayout.LBNHC, stage.spec(), kernel_block=2)
    assert next(iter(caches.values())).shape[0] == 2 * BLOCKS
    found = layout_of(caches, BLOCKS)
    assert [entry.page for entry in found.entries] == [stage.spec().page_size_bytes] * LAYERS


def test_mla() -> None:
    spec = MLAAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    assert [entry.page for entry in layout_of(views(KVCacheLayout.LBNHC, spec), BLOCKS).entries] == [4 * 8 * 2] * LAYERS


def test_k_and_v_apart_are_two_entries() -> None:
    cache = torch.zeros(2, BLOCKS, 4, 2, 8)
    found = layout_of({"model.layers.0.attn": cache}, BLOCKS)
    assert found.by_layer["model.layers.0.attn"] == (0, 1)
    assert found.entries[1].offset - found.entries[0].offset == cache.stride(0) * 4


def test_layers_come_in_the_order_of_the_forward() -> None:
    pool = torch.zeros(12, BLOCKS, 64)
    found = layout_of({f"model.layers.{layer}.attn": pool[layer] for layer in reversed(range(12))}, BLOCKS)
    assert [found.by_layer[f"model.layers.{layer}.attn"] for layer in range(12)] == [(layer,) for layer in range(12)]


def test_layers_that_share_kv_are_copied_once() -> None:
    cache = torch.zeros(BLOCKS, 64)
    found = layout_of({"model.layers.0.attn": cache, "model.layers.5.attn": cache}, BLOCKS)
    assert len(found.entries) == 1
    assert found.by_layer["model.layers.5.attn"] == (0,)


def test_what_overlaps_without_being_the_same_is_refused() -> None:
    pool = torch.zeros(2 * BLOCKS * 64)
    one, other = pool[: BLOCKS * 64].view(BLOCKS, 64), pool[32 : 32 + BLOCKS * 64].view(BLOCKS, 64)
    with pytest.raises(ValueError, match="overlap"):
        layout_of({"model.layers.0.attn": one, "model.layers.1.attn": other}, BLOCKS)


def test_what_is_not_block_major_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks first"):
        layout_of({"model.layers.0.attn": torch.zeros(5, BLOCKS, 8)}, BLOCKS)
    with pytest.raises(ValueError, match="no KV cache"):
        layout_of({}, BLOCKS)
