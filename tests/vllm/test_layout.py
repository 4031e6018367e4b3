"""Every layout that vLLM 0.32 has, made by vLLM's own code, read back as opaque pages."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import stage
import torch
from vllm.utils.torch_utils import nvfp4_kv_cache_full_dim
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    KVQuantMode,
    MLAAttentionSpec,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from swiftcache.vllm.layout import layout_of

BLOCKS, LAYERS = 6, 3


@pytest.mark.parametrize(
    "layout", [one for one in KVCacheLayout if one.name.startswith("LB")], ids=lambda one: one.name
)
def test_states_lie_over_pages_of_attention(layout: KVCacheLayout) -> None:
    """Of each pair of layers that vLLM lays over each other, a block is one run of bytes: the longer page."""
    attention = stage.spec()
    state = stage.state(page_size_padded=attention.page_size_bytes)
    raw = torch.zeros(LAYERS * BLOCKS * attention.page_size_bytes, dtype=torch.int8)
    caches: dict[str, torch.Tensor] = {}
    for kind, spec in (("attn", attention), ("mamba", state)):
        strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
        names = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS)]
        placed = KVCacheTensor(size=raw.numel(), layers=names, layer_stride=strides[0], block_stride=strides[1])
        caches |= dict(zip(names, create_kv_cache_views(raw, spec, BLOCKS, layout, placed), strict=True))
    with pytest.raises(ValueError, match="overlap"):
        layout_of(caches, BLOCKS)
    found = layout_of(caches, BLOCKS, several=True)
    assert [entry.page for entry in found.entries] == [attention.page_size_bytes] * LAYERS
    for layer in range(LAYERS):
        assert found.by_layer[f"model.layers.{layer}.attn"] == found.by_layer[f"model.layers.{layer}.mamba"]
    assert len(set(found.shape)) == 1 and " over " in found.shape[0]


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


def nvfp4() -> FullAttentionSpec:
    """As vLLM's FlashInfer backend makes it, which needs FlashInfer to be imported."""
    spec = stage.spec(head_size=64, dtype=torch.uint8, kv_quant_mode=KVQuantMode.NVFP4)
    return replace(spec, num_head_slots=2 * spec.num_kv_heads, state_content_bytes=nvfp4_kv_cache_full_dim(64))


def per_token_head(mode: KVQuantMode) -> FullAttentionSpec:
    return TritonAttentionBackend.customize_spec(stage.spec(head_size=64, dtype=torch.uint8, kv_quant_mode=mode))


QUANTISED = {mode.name: per_token_head(mode) for mode in KVQuantMode if mode.is_per_token_head} | {"NVFP4": nvfp4()}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC], ids=lambda one: one.name)
def test_scales_are_in_the_page(layout: KVCacheLayout, name: str) -> None:
    """Every byte that vLLM's views of a block address is in its page, and the page is longer than the numbers alone."""
    spec = QUANTISED[name]
    numbers = stage.BLOCK * spec.num_kv_heads * 2 * 64 // (2 if "4" in name else 1)
    assert spec.page_size_bytes > numbers
    caches = views(layout, spec)
    found = layout_of(caches, BLOCKS)
    assert [entry.page for entry in found.entries] == [spec.page_size_bytes] * LAYERS
    for cache, entry in zip(caches.values(), found.entries, strict=True):
        for block in range(BLOCKS):
            page = ctypes.string_at(entry.address + entry.offset + block * entry.stride, entry.page)
            assert sorted(page) == sorted(cache[block].contiguous().view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize("row", [576 * 2, 656, 352], ids=["bf16", "fp8_ds_mla", "nvfp4_ds_mla"])
def test_an_indexers_cache_beside_mla(row: int) -> None:
    """DeepSeek V3.2: one group of layers with pages of two sizes, whose scales are in their rows."""
    latent = MLAAttentionSpec(
        block_size=stage.BLOCK, num_kv_heads=1, head_size=576, dtype=torch.uint8, state_content_bytes=row
    )
    index = MLAAttentionSpec(block_size=stage.BLOCK, num_kv_heads=1, head_size=132, dtype=torch.uint8)
    sizes = {"attn": latent.page_size_bytes, "indexer": index.page_size_bytes}
    raw = torch.randint(-128, 127, (LAYERS * BLOCKS * sum(sizes.values()),), dtype=torch.int8)
    caches, offset = {}, 0
    for kind, spec in (("attn", latent), ("indexer", index)):
        names = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS)]
        stride = BLOCKS * spec.page_size_bytes
        placed = KVCacheTensor(raw.numel(), names, stride, spec.page_size_bytes, offset)
        views = create_kv_cache_views(raw, spec, BLOCKS, KVCacheLayout.LBNHC, placed)
        caches |= dict(zip(names, views, strict=True))
        offset += LAYERS * stride
    found = layout_of(caches, BLOCKS)
    for name, cache in caches.items():
        (number,) = found.by_layer[name]
        entry = found.entries[number]
        assert entry.page == sizes[name.rpartition(".")[2]]
        page = ctypes.string_at(entry.address + entry.offset + 2 * entry.stride, entry.page)
        assert sorted(page) == sorted(cache[2].contiguous().view(torch.uint8).flatten().tolist())


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
