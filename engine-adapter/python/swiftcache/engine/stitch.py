"""Which bytes of a stitched pool are local, and which lie in leased slabs. Pure arithmetic.

A stitched pool is one range of addresses that an engine takes for its KV cache. A *unit* is a piece of it whose bytes
lie in a slab of a neighbour, and which keeps its address. All else is the engine's own memory.

An engine lays its pool out in *regions*: one for each layer, with all blocks side by side, or a single one where each
block holds all layers. A block is local when all its bytes are, in every region. So each region ends with as many units
as every other one, and its first blocks are local: a row of units is one unit in each region."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """How an engine lays out a pool of any size."""

    regions: int
    """Layers, or 1 where a block holds all layers."""
    stride: int
    """Bytes from one block to the next within a region."""

    @property
    def block(self) -> int:
        """Bytes of a block, over all layers."""
        return self.regions * self.stride


@dataclass(frozen=True)
class Grain:
    unit: int
    """Bytes of a unit: of a slab of the donors."""
    granularity: int
    """Units start and end at multiples of this, bytes."""


@dataclass(frozen=True)
class Stitch:
    bytes: int
    units: tuple[int, ...]
    """Where each unit starts, ascending, bytes."""
    blocks: int
    local_blocks: int
    """The first blocks, of which every byte is local."""
    local_bytes: int
    """What the pool takes of the engine's own memory."""


def capacity(local: int, units: int, shape: Shape, grain: Grain) -> int:
    """The largest pool for so much local memory and so many units, bytes. Raises ValueError, saying what to give more
    of, when the units do not make a row, or when no block would be local."""
    rows = units // shape.regions
    if rows == 0:
        raise ValueError(
            f"{units} leased slabs of {grain.unit} bytes are less than one for each of the {shape.regions} layers: "
            f"every layer must have as many. Set stream_bytes to {shape.regions * grain.unit} at least, or have donors "
            "lend smaller slabs (`swiftcache donate --slab`)"
        )
    # What rounding the end of the pool up to the granularity may add.
    total = local - grain.granularity + rows * shape.regions * grain.unit
    blocks = total // shape.block
    _local_blocks(blocks, _places(blocks, rows, shape, grain), shape, local)
    return total


def stitch(size: int, local: int, units: int, shape: Shape, grain: Grain) -> Stitch:
    """Lays out a pool of `size` bytes, with as much local memory as there is. An engine may take fewer bytes than
    `capacity` said, but no more. Raises ValueError when it cannot be."""
    blocks, odd = divmod(size, shape.block)
    if odd:
        raise ValueError(f"the engine's KV cache of {size} bytes is not made of blocks of {shape.block} bytes")
    mapped = -(-size // grain.granularity) * grain.granularity
    row = shape.regions * grain.unit
    rows = max(0, -(-(mapped - local) // row))
    if rows * shape.regions > units:
        raise ValueError(
            f"the engine took {size} bytes for its KV cache, of which {mapped - local} must be leased, but only "
            f"{units} slabs of {grain.unit} bytes are"
        )
    places = _places(blocks, rows, shape, grain)
    first = _local_blocks(blocks, places, shape, local)
    return Stitch(size, tuple(sorted(places)), blocks, first, mapped - rows * row)


def pieces(size: int, layout: Stitch, grain: Grain) -> list[tuple[int, int]]:
    """The pool as pieces that lie side by side: the bytes of each, and how many units are at its end."""
    mapped = -(-size // grain.granularity) * grain.granularity
    found, at, count = [], 0, 0
    for unit, following in zip(layout.units, (*layout.units, mapped)[1:], strict=True):
        count += 1
        if following != (end := unit + grain.unit):
            found.append((end - at, count))
            at, count = end, 0
    if count or at < mapped:
        found.append((mapped - at, count))
    return found


def _places(blocks: int, rows: int, shape: Shape, grain: Grain) -> list[int]:
    """Where the units start: behind one another at the end of each region, as far as the granularity lets them."""
    places = []
    for region in range(shape.regions):
        end = (region + 1) * blocks * shape.stride // grain.granularity * grain.granularity
        places += [end - (row + 1) * grain.unit for row in range(rows)]
    return places


def _local_blocks(blocks: int, places: list[int], shape: Shape, local: int) -> int:
    """How many of the first blocks have no byte in a unit."""
    if not places:
        return blocks
    length = blocks * shape.stride
    rows = len(places) // shape.regions
    starts = [min(places[region * rows : (region + 1) * rows]) for region in range(shape.regions)]
    first = min((start - region * length) // shape.stride for region, start in enumerate(starts))
    # One block is vLLM's placeholder, and a pool begins with local memory.
    if first < 2:
        raise ValueError(
            f"{local} bytes of local memory are too few for a stitched pool of blocks of {shape.block} bytes: no block "
            "would be local. Give the engine more local KV cache (--kv-cache-memory-bytes, --gpu-memory-utilization)"
        )
    return first


def cost(tokens: int, block_tokens: int, layout: Stitch, shape: Shape, reserved: int = 0) -> int:
    """Bytes that a token reads from neighbours when the context has so many tokens and fills local memory first, of
    which the engine has `reserved` blocks for itself."""
    blocks = min(-(-tokens // block_tokens), layout.blocks - reserved)
    return max(0, blocks - (layout.local_blocks - reserved)) * shape.block
