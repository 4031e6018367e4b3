"""An engine whose KV bytes are a function of block and layer, so that every byte that it gets back can be checked."""

import ctypes
import random
from collections.abc import Iterable, Sequence

from swiftcache import Cache

# Bytes of a block in each layer.
LAYERS = (4096, 2048, 8192, 2048)
BLOCK_BYTES = sum(LAYERS)
SLAB_BYTES = 16 * BLOCK_BYTES
# Sequences are computed in the lower half of the pool, and loaded into the upper half.
BLOCKS = 64
HALF = BLOCKS // 2


def hashes(sequence: Iterable[int]) -> bytes:
    return b"".join(n.to_bytes(16, "little") for n in sequence)


def pattern(n: int, layer: int) -> bytes:
    return random.Random(f"{n}/{layer}").randbytes(LAYERS[layer])


class Pool:
    """A pool that has one storage for each layer, with gaps, or one storage for all layers, in block-major order."""

    def __init__(self, block_major: bool = False) -> None:
        if block_major:
            storage = (ctypes.c_ubyte * (BLOCKS * BLOCK_BYTES))()
            self.storages = [storage] * len(LAYERS)
            self.offsets = [sum(LAYERS[:layer]) for layer in range(len(LAYERS))]
            self.strides = [BLOCK_BYTES] * len(LAYERS)
        else:
            self.offsets = [64] * len(LAYERS)
            self.strides = [size + 32 for size in LAYERS]
            self.storages = [(ctypes.c_ubyte * (64 + BLOCKS * stride))() for stride in self.strides]

    def layers(self) -> list[tuple[int, int, int, int]]:
        """The layers' places for `Cache.register_pool`."""
        placed = zip(self.storages, self.offsets, self.strides, strict=True)
        return [
            (ctypes.addressof(storage), ctypes.sizeof(storage), offset, stride)
            for storage, offset, stride in placed
        ]

    def _at(self, layer: int, block: int) -> int:
        return self.offsets[layer] + block * self.strides[layer]

    def write(self, layer: int, block: int, data: bytes) -> None:
        at = ctypes.addressof(self.storages[layer]) + self._at(layer, block)
        ctypes.memmove(at, data, len(data))

    def read(self, layer: int, block: int) -> bytes:
        at = ctypes.addressof(self.storages[layer]) + self._at(layer, block)
        return ctypes.string_at(at, LAYERS[layer])

    def compute(self, n: int, block: int) -> None:
        """Writes block `n` into the pool, as computing it would."""
        for layer in range(len(LAYERS)):
            self.write(layer, block, pattern(n, layer))

    def holds(self, n: int, layer: int, block: int) -> bool:
        return self.read(layer, block) == pattern(n, layer)


class Engine:
    """A pool and its cache."""

    def __init__(self, cache: Cache, pool: Pool | None = None) -> None:
        self.cache = cache
        self.pool = pool or Pool()
        cache.register_pool(self.pool.layers(), BLOCKS, self.pool)

    def store(self, sequence: Sequence[int]) -> dict[str, int]:
        """Computes a sequence, and stores it."""
        for block, n in enumerate(sequence):
            self.pool.compute(n, block)
        return self.store_computed(sequence)

    def store_computed(self, sequence: Sequence[int]) -> dict[str, int]:
        marks = [self.cache.mark(0) for _ in LAYERS]
        return self.cache.store(hashes(sequence), range(len(sequence)), marks).finish()

    def fetch(self, sequence: Sequence[int]) -> list[int]:
        """Loads a sequence into the upper half, and returns the positions that failed. Checks every byte of the other
        positions: in each layer when the layer has arrived, and again at the end."""
        blocks = [HALF + position for position in range(len(sequence))]
        for block in blocks:
            # Old bytes in the block must not look like loaded bytes.
            self.pool.compute(-1, block)
        load = self.cache.load(hashes(sequence), blocks)
        for layer in range(len(LAYERS)):
            failed = load.wait_layer(layer)
            self._check(sequence, blocks, failed, [layer])
        failed = load.finish()
        assert load.finish() == failed and load.is_done()
        self._check(sequence, blocks, failed, range(len(LAYERS)))
        return failed

    def _check(
        self, sequence: Sequence[int], blocks: list[int], failed: list[int], layers: Iterable[int]
    ) -> None:
        for position, (n, block) in enumerate(zip(sequence, blocks, strict=True)):
            if position not in failed:
                for layer in layers:
                    assert self.pool.holds(n, layer, block), f"wrong bytes: block {n}, layer {layer}"
