"""A stitched pool through Python: bytes stay while slabs come and go, and it works together with a cache."""

import ctypes
import random
import subprocess
from collections.abc import Iterator

import pytest
from engine import LAYERS, SLAB_BYTES, hashes, pattern
from node import Node, eventually
from swiftcache import Cache, Connection
from swiftcache._native import StreamPool

UNITS = 4


@pytest.fixture
def donor(node: Node) -> subprocess.Popen[bytes]:
    """The donor of a pool's slabs."""
    return node.start_donor("SIM-1", UNITS, SLAB_BYTES)


@pytest.fixture
def pool(node: Node, donor: subprocess.Popen[bytes]) -> Iterator[StreamPool]:
    """A pool of four units, not laid out."""
    connection = Connection(node.socket, name="a stitched engine")
    pool = StreamPool(
        connection,
        namespace="model/stream",
        stream_bytes=UNITS * SLAB_BYTES,
        unit_bytes=SLAB_BYTES,
        patience_s=120,
    )
    # It keeps its session.
    connection.close()
    yield pool
    pool.close()


def laid_out(pool: StreamPool) -> tuple[int, int]:
    """Lays one tensor out, with all units. Returns its address and size."""
    size = pool.granularity + pool.units * pool.unit_bytes
    [(address, size_again, local)] = pool.lay_out([(size, pool.units)])
    assert (size_again, local) == (size, pool.granularity)
    return address, size


def test_bytes_stay_while_a_donor_takes_its_memory_back(
    node: Node, donor: subprocess.Popen[bytes], pool: StreamPool
) -> None:
    assert (pool.units, pool.unit_bytes) == (UNITS, SLAB_BYTES)
    assert pool.device == "SIM-0"
    address, size = laid_out(pool)
    assert pool.homes() == bytes(UNITS)
    assert pool.begin_step() == 0
    assert ctypes.string_at(address, size) == bytes(size), "it is zero at first"
    data = random.Random(1).randbytes(size)
    ctypes.memmove(address, data, size)
    pool.end_step(0)
    node.withdraw(donor)
    moved, generation = 0, pool.generation()

    def on_floor() -> bool:
        nonlocal moved
        moved += pool.begin_step()
        assert ctypes.string_at(address, size) == data
        pool.end_step(0)
        return pool.homes() == b"\x02" * UNITS

    eventually("units on the floor", on_floor)
    assert pool.generation() > generation
    stats = pool.stats()
    assert (stats["on_floor"], stats["host_units"], stats["connected"]) == (UNITS, UNITS, 1)
    assert stats["moved_units"] >= max(moved, UNITS)
    pool.begin_step()
    assert ctypes.string_at(address, size) == data
    pool.end_step(0)


def test_what_does_not_fit_is_named(pool: StreamPool) -> None:
    with pytest.raises(RuntimeError, match="not laid out"):
        pool.begin_step()
    unit, granule = pool.unit_bytes, pool.granularity
    for tensors in ([], [(unit, 1)], [(granule + 5 * unit, 5)], [(granule, 0), (2 * unit, 2)]):
        with pytest.raises(ValueError, match="^tensors: "):
            pool.lay_out(tensors)
    laid_out(pool)
    with pytest.raises(ValueError, match="^tensors: are laid out already"):
        pool.lay_out([(granule + unit, 1)])
    with pytest.raises(RuntimeError, match="not begun"):
        pool.end_step(0)
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.begin_step()
    assert pool.homes() == b""


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"stream_bytes": -1}, "^stream_bytes: "),
        ({"stream_bytes": 1}, "^stream_bytes: "),
        ({"unit_bytes": 100}, "^unit_bytes: "),
        ({"spare_units": -1}, "^spare_units: "),
        ({"namespace": ""}, "^namespace: "),
        ({"device": "two words"}, "^device: "),
        ({"backend": "rocm"}, "^backend: "),
        ({"step_ms": -1.0}, "^step_ms: "),
        ({"step_ms": float("nan")}, "^step_ms: "),
        ({"patience_s": float("nan")}, "^patience_s: "),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_named(node: Node, bad: dict[str, object], error: str) -> None:
    good = {"namespace": "model/stream", "stream_bytes": 4 * SLAB_BYTES, "unit_bytes": SLAB_BYTES, "patience_s": 120}
    connection = Connection(node.socket, name="a stitched engine")
    with pytest.raises(ValueError, match=error):
        StreamPool(connection, **{**good, **bad})
    connection.close()


def test_nothing_to_lease_and_no_broker_say_so(node: Node) -> None:
    settings = {"namespace": "model/stream", "stream_bytes": SLAB_BYTES, "patience_s": 0.2}
    connection = Connection(node.socket, name="a stitched engine")
    assert connection.wait_connected(120)
    with pytest.raises(RuntimeError, match="nothing is on offer"):
        StreamPool(connection, **settings)
    node.kill_broker()
    eventually("the loss", lambda: not connection.is_connected())
    with pytest.raises(RuntimeError, match="is swiftcache-broker running"):
        StreamPool(connection, **settings)
    connection.close()


def test_a_cache_loads_into_a_stitched_pool_and_stores_from_it(
    node: Node, donor: subprocess.Popen[bytes], pool: StreamPool
) -> None:
    """The engine's pool is stitched. Its blocks lie in local memory and in units, and units move between operations."""
    address, size = laid_out(pool)
    blocks = 32
    stride = (size - 64) // blocks // 8 * 8
    places = [(address, size, sum(LAYERS[:layer]), stride) for layer in range(len(LAYERS))]
    node.start_donor("SIM-0", 4, SLAB_BYTES)
    connection = Connection(node.socket, name="its cache")
    cache = Cache(
        connection, namespace="model", layer_bytes=LAYERS, max_leased_bytes=2 * SLAB_BYTES, lease_step_bytes=SLAB_BYTES
    )
    cache.register_pool(places, blocks, pool, stream_pool=pool)
    assert cache.wait_open(120), cache.problem()
    eventually("a lease", lambda: cache.stats()["leases"])

    def at(layer: int, block: int) -> int:
        return address + places[layer][2] + block * stride

    sequence = list(range(12))
    pool.begin_step()
    for block, n in enumerate(sequence):
        for layer in range(len(LAYERS)):
            ctypes.memmove(at(layer, block), pattern(n, layer), LAYERS[layer])
    pool.end_step(0)
    stored = cache.store(hashes(sequence), sequence)
    assert stored.finish()["stored"] == len(sequence)
    node.withdraw(donor)
    eventually("the donor to have its memory", lambda: donor.poll() is not None)
    target = [blocks - 1 - block for block in range(len(sequence))]
    assert cache.load(hashes(sequence), target).finish() == []
    pool.begin_step()
    for n, block in zip(sequence, target, strict=True):
        for layer in range(len(LAYERS)):
            assert ctypes.string_at(at(layer, block), LAYERS[layer]) == pattern(n, layer)
    pool.end_step(0)
    with pytest.raises(ValueError, match="^ranges: nothing of a stitched pool"):
        cache.lend(1, [(address, 65536)])
    cache.close()
    connection.close()
    assert pool.stats()["failed_moves"] == 0
