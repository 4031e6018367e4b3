"""Where the units of a stitched pool lie: which bytes of an engine's KV cache are local, and which in leased slabs."""

from __future__ import annotations

import random

import pytest
from swiftcache.engine.stitch import Grain, Shape, capacity, cost, pieces, stitch

LAYERS = Shape(regions=4, stride=16 << 10)
GRAIN = Grain(unit=256 << 10, granularity=4096)


def test_every_layer_begins_with_as_many_local_blocks_and_ends_with_as_many_units() -> None:
    local = 64 * LAYERS.block
    size = capacity(local, 13, LAYERS, GRAIN) // LAYERS.block * LAYERS.block
    laid_out = stitch(size, local, 13, LAYERS, GRAIN)
    # 13 slabs make 3 rows of 4; 16 blocks of a layer make a unit.
    assert len(laid_out.units) == 12 and laid_out.blocks == 63 + 3 * 16
    assert laid_out.local_blocks == 63
    length = laid_out.blocks * LAYERS.stride
    assert laid_out.units[:3] == tuple(63 * LAYERS.stride + row * GRAIN.unit for row in range(3))
    assert [unit // length for unit in laid_out.units] == [layer for layer in range(4) for _ in range(3)]


@pytest.mark.parametrize("seed", range(300))
def test_a_block_is_local_exactly_when_no_unit_has_a_byte_of_it(seed: int) -> None:
    source = random.Random(seed)
    shape = Shape(source.randint(1, 6), source.choice([768, 4096, 10240, 65536]))
    grain = Grain(unit=source.choice([1, 3, 8, 32]) * (g := source.choice([256, 4096, 65536])), granularity=g)
    local = shape.block * source.randint(4, 60) + grain.granularity * (2 * shape.regions + source.randint(0, 9))
    units = source.randint(shape.regions, 9 * shape.regions)
    most = capacity(local, units, shape, grain)
    # An engine takes whole blocks, and may take fewer.
    for blocks in {most // shape.block, source.randint(3, most // shape.block)}:
        size = blocks * shape.block
        try:
            laid_out = stitch(size, local, units, shape, grain)
        except ValueError as reason:
            assert "no block would be local" in str(reason) and blocks < most // shape.block
            continue
        check(laid_out, size, local, units, shape, grain)


def check(laid_out, size: int, local: int, units: int, shape: Shape, grain: Grain) -> None:
    mapped = -(-size // grain.granularity) * grain.granularity
    ends = [unit + grain.unit for unit in laid_out.units]
    assert all(unit % grain.granularity == 0 and unit > 0 for unit in laid_out.units)
    assert all(end <= start for end, start in zip(ends, [*laid_out.units, mapped][1:], strict=True))
    assert len(laid_out.units) <= units
    assert laid_out.local_bytes == mapped - len(laid_out.units) * grain.unit <= max(local, mapped)
    assert not laid_out.units or laid_out.local_bytes <= local
    remote = set()
    for start, end in zip(laid_out.units, ends, strict=True):
        for block in range(start // shape.stride, -(-end // shape.stride)):
            remote.add(block % laid_out.blocks)
    assert min(remote, default=laid_out.blocks) == laid_out.local_blocks
    # The same in pieces that lie side by side.
    at, found = 0, []
    for length, count in pieces(size, laid_out, grain):
        at += length
        found += [at - (count - number) * grain.unit for number in range(count)]
    assert (at, tuple(found)) == (mapped, laid_out.units)


def test_a_pool_that_fits_into_local_memory_has_no_units() -> None:
    laid_out = stitch(50 * LAYERS.block, 64 * LAYERS.block, 12, LAYERS, GRAIN)
    assert (laid_out.units, laid_out.local_blocks) == ((), 50)


@pytest.mark.parametrize(
    ("local", "units", "named"),
    [
        (64 * LAYERS.block, 3, "Set stream_bytes to 1048576 at least"),
        (0, 4, "--gpu-memory-utilization"),
        (LAYERS.block, 400, "no block would be local"),
    ],
)
def test_what_cannot_be_laid_out_says_what_to_do(local: int, units: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        capacity(local, units, LAYERS, GRAIN)


def test_an_engine_that_takes_more_than_there_is_or_odd_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="only 4 slabs"):
        stitch(200 * LAYERS.block, 64 * LAYERS.block, 4, LAYERS, GRAIN)
    with pytest.raises(ValueError, match="not made of blocks"):
        stitch(200 * LAYERS.block + 1, 64 * LAYERS.block, 4, LAYERS, GRAIN)


def test_what_a_token_reads_from_neighbours() -> None:
    local = 64 * LAYERS.block
    size = capacity(local, 12, LAYERS, GRAIN) // LAYERS.block * LAYERS.block
    laid_out = stitch(size, local, 12, LAYERS, GRAIN)
    assert cost(63 * 32, 32, laid_out, LAYERS) == 0, "whoever fits locally pays nothing"
    assert cost(64 * 32, 32, laid_out, LAYERS) == LAYERS.block
    assert cost(1 << 30, 32, laid_out, LAYERS) == 48 * LAYERS.block
    # A block that the engine has for itself is local, and no request gets it.
    assert cost(63 * 32, 32, laid_out, LAYERS, reserved=1) == LAYERS.block
    assert cost(1 << 30, 32, laid_out, LAYERS, reserved=1) == 48 * LAYERS.block
