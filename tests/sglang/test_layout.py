"""Pools made by SGLang's own code, read back as opaque pages."""

from __future__ import annotations

import ctypes

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from swiftcache.sglang.layout import gates, layout_of

LAYERS = 3


def mha(size: int = 96, page: int = 16, **more) -> MHATokenToKVPool:
    shape = {"head_num": 2, "head_dim": 8, "layer_num": LAYERS, "dtype": torch.float32}
    return MHATokenToKVPool(size, page, device="cpu", enable_memory_saver=False, **shape | more)


def mla(size: int = 96, page: int = 16) -> MLATokenToKVPool:
    shape = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "layer_num": LAYERS, "dtype": torch.bfloat16}
    return MLATokenToKVPool(size, page, device="cpu", enable_memory_saver=False, **shape)


POOLS = {
    "fused": lambda page: mha(page=page),
    "k-and-v-of-other-sizes": lambda page: mha(page=page, v_head_dim=4),
    "bfloat16": lambda page: mha(page=page, dtype=torch.bfloat16),
    "fp8": lambda page: mha(page=page, dtype=torch.float8_e4m3fn),
    "no-whole-number-of-pages": lambda page: mha(size=96 + 7, page=page),
    "mla": lambda page: mla(page=page),
}


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("name", POOLS)
def test_a_block_is_the_page_of_its_slots(name: str, page: int) -> None:
    pool = POOLS[name](page)
    buffers = list(zip(pool.k_buffer, pool.v_buffer, strict=True)) if name != "mla" else [(b,) for b in pool.kv_buffer]
    for layer in buffers:
        for buffer in layer:
            buffer.view(torch.uint8).random_(0, 256)
    found = layout_of(pool, page)
    assert found.blocks == (pool.size + page) // page
    assert len(found.entries) == sum(map(len, buffers))
    for number, layer in enumerate(buffers):
        for entry, buffer in zip((found.entries[at] for at in found.by_layer[str(number)]), layer, strict=True):
            for block in range(found.blocks):
                held = ctypes.string_at(entry.address + entry.offset + block * entry.stride, entry.page)
                slots = buffer[block * page : (block + 1) * page]
                assert held == bytes(slots.contiguous().view(torch.uint8).flatten().tolist())
    last = max(found.entries, key=lambda entry: entry.offset)
    assert last.offset + (found.blocks - 1) * last.stride + last.page <= last.bytes


def test_a_layer_is_there_when_its_last_part_is() -> None:
    assert gates(layout_of(mha(), 16)) == [1, 3, 5]
    assert gates(layout_of(mla(), 16)) == [0, 1, 2]
