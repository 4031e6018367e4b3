"""Arguments that cannot work are refused, and the error names the argument."""

import ctypes
from collections.abc import Callable

import pytest
import swiftcache
from engine import BLOCKS, LAYERS, SLAB_BYTES, Engine, Pool, hashes
from node import Node, eventually
from swiftcache import Cache, Connection

GOOD = {"namespace": "model", "layer_bytes": LAYERS, "max_leased_bytes": SLAB_BYTES}


@pytest.mark.parametrize(
    "bad",
    [
        {"namespace": ""},
        {"namespace": "n" * 257},
        {"layer_bytes": []},
        {"layer_bytes": [1, 0]},
        {"layer_bytes": [1, -1]},
        {"layer_bytes": [1 << 63, 1 << 63]},
        {"max_leased_bytes": -1},
        {"max_leased_bytes": 1 << 64},
        {"lease_step_bytes": 0},
        {"lease_step_bytes": -1},
        {"host_tier_bytes": -1},
        {"device": "two words"},
        {"backend": "rocm"},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_named(connection: Connection, bad: dict[str, object]) -> None:
    [name] = bad
    with pytest.raises(ValueError, match=f"^{name}: "):
        Cache(connection, **{**GOOD, **bad})


def test_a_closed_connection_opens_no_cache(connection: Connection) -> None:
    connection.close()
    with pytest.raises(ValueError, match="^connection: is closed"):
        Cache(connection, **GOOD)


@pytest.mark.parametrize("opened", [False, True])
def test_a_pool_that_does_not_fit_is_named(bare_node: Node, cache: Callable[..., Cache], opened: bool) -> None:
    one = cache()
    if opened:
        bare_node.start_broker()
        assert one.wait_open(60), one.problem()
    pool = Pool()
    good = pool.layers()
    first = good[0]

    def refused(name: str, layers: object, blocks: int = BLOCKS) -> None:
        with pytest.raises(ValueError, match=f"^{name}"):
            one.register_pool(layers, blocks, pool)

    refused("layers: has 3", good[:3])
    refused("layers.block_stride", [(*first[:3], LAYERS[0] - 1), *good[1:]])
    refused("layers.memory: 64 blocks of layer 0", [(first[0], first[1] - 32 - 1, *first[2:]), *good[1:]])
    refused("layers.memory", good, BLOCKS + 1)
    refused("layers.memory", [(*first[:2], 1 << 63, 1 << 63), *good[1:]])
    refused(r"layers\[0\]: has no address", [(0, *first[1:]), *good[1:]])
    refused("blocks", good, 0)
    refused("blocks", good, -1)
    refused("layers", [(-1, *first[1:]), *good[1:]])
    # Memory that is not mapped. An open cache refuses it at once; a closed one reports it in `problem` when it opens.
    unmapped = [(4096, *first[1:]), *good[1:]]
    if opened:
        refused(r"layers\[0\]: adopting memory failed on SIM-0: only 0 of its", unmapped)
    else:
        one.register_pool(unmapped, BLOCKS, pool)
        bare_node.start_broker()
        assert one.wait_open(60)
        assert one.problem().startswith("layers[0]: adopting memory failed")
        assert one.load(hashes([1]), [0]).finish() == [0]
        assert one.store(hashes([1]), [0]).finish()["unplaced"] == 1
    one.register_pool(good, BLOCKS, pool)
    assert one.problem() == ""


def test_memory_that_may_not_be_written_is_refused(node: Node, cache: Callable[..., Cache]) -> None:
    one = cache()
    assert one.wait_open(60), one.problem()
    pool = Pool()
    code = ctypes.cast(ctypes.pythonapi.Py_IncRef, ctypes.c_void_p).value
    layers = [(code, 64 + BLOCKS * stride, 64, stride) for stride in pool.strides]
    with pytest.raises(ValueError, match=r"^layers\[0\]"):
        one.register_pool(layers, BLOCKS, pool)


def test_a_device_that_is_not_there_is_a_miss_with_a_reason(node: Node, cache: Callable[..., Cache]) -> None:
    one = Engine(cache(device="SIM-7", host_tier_bytes=SLAB_BYTES))
    eventually("the reason", lambda: "SIM-7" in one.cache.problem())
    assert not one.cache.is_open()
    assert one.store([1])["unplaced"] == 1


def test_sequences_are_checked(node: Node, cache: Callable[..., Cache]) -> None:
    one = Engine(cache())
    assert one.cache.wait_open(60), one.cache.problem()
    for call in (one.cache.load, one.cache.store):
        for arguments, name in [
            ((b"17 bytes, not 16.", [0]), "hashes"),
            ((hashes([1, 2]), [0]), "blocks: has 1 entries for 2 hashes"),
            ((hashes([1]), [-1]), "blocks"),
            ((hashes([1]), [1 << 32]), "blocks"),
        ]:
            with pytest.raises(ValueError, match=f"^{name}"):
                call(*arguments)
        with pytest.raises(TypeError, match="argument 'blocks'"):
            call(hashes([1]), ["one"])
    with pytest.raises(ValueError, match="^marks: has 1 entries for 4 layers"):
        one.cache.store(hashes([1]), [0], [one.cache.mark(0)])
    with pytest.raises(ValueError, match="^stream"):
        one.cache.mark(-1)
    load = one.cache.load(hashes([1]), [0])
    for layer in (-1, len(LAYERS)):
        with pytest.raises(ValueError, match="^layer"):
            load.wait_layer(layer)
        with pytest.raises(ValueError, match="^layer"):
            load.gate_layer(layer, 0)
    # A block outside the pool cannot be loaded or stored.
    assert one.cache.load(hashes([1]), [BLOCKS]).finish() == [0]
    assert one.cache.store(hashes([1]), [BLOCKS]).finish()["unplaced"] == 1


def test_the_stubs_name_what_there_is() -> None:
    """`_native.pyi` is written by hand, so this checks that it has the same public names as the module."""
    import ast
    import pathlib

    from swiftcache import _native

    text = pathlib.Path(swiftcache.__file__).with_name("_native.pyi").read_text()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    exported = {name for name, value in vars(_native).items() if isinstance(value, type)}
    assert exported == set(classes)
    for name, node in classes.items():
        methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
        said = {method for method in methods if not method.startswith("_")}
        assert said == {method for method in vars(getattr(_native, name)) if not method.startswith("_")}
