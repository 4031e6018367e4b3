"""`Cache.lookup`: what it finds stays there until it is loaded, or is reported as missing."""

import contextlib
import gc
from collections.abc import Callable

import pytest
from engine import BLOCKS, HALF, LAYERS, SLAB_BYTES, Engine, hashes
from node import Node, eventually
from swiftcache import Cache, Connection, Hit

Make = Callable[..., Engine]
SLAB_BLOCKS = SLAB_BYTES // sum(LAYERS)


def upper(count: int) -> list[int]:
    return list(range(HALF, HALF + count))


def holds(one: Engine, sequence: list[int]) -> bool:
    return all(one.pool.holds(n, layer, HALF + at) for at, n in enumerate(sequence) for layer in range(len(LAYERS)))


def test_a_hit_loads_what_it_found(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store([1, 2, 3])
    hit = one.cache.lookup(hashes([1, 2, 3, 99]))
    assert isinstance(hit, Hit) and (len(hit), hit.own_blocks) == (3, 3)
    for count in (3, 2, 0):
        load = hit.load(upper(count), one.cache.mark(0))
        assert load.missing() == []
        assert load.finish() == load.missing() == []
        assert holds(one, [1, 2, 3][:count])


def test_bad_arguments_are_named(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store([1])
    hit = one.cache.lookup(hashes([1]))
    with pytest.raises(ValueError, match="blocks: has 2 entries for 1 blocks that were found"):
        hit.load([HALF, HALF + 1])
    with pytest.raises(ValueError, match="hashes: is 15 bytes"):
        one.cache.lookup(bytes(15))
    # A block that the pool does not have is missing, like one that is gone.
    assert hit.load([BLOCKS]).missing() == [0]


def test_before_it_is_open_nothing_is_found(bare_node: Node, cache: Callable[..., Cache]) -> None:
    one = cache()
    hit = one.lookup(hashes([1, 2]))
    assert (len(hit), hit.own_blocks) == (0, 0)
    assert hit.load([]).finish() == []


def test_what_others_wrote_is_found_by_asking_only(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine(device="SIM-2", lookup_ms=60_000)
    assert one.store([1])["stored"] == 1
    # Another session: to a broker, those of one session are one borrower's.
    with contextlib.closing(Connection(node.socket, name="another engine")) as connection:
        other = Engine(
            Cache(connection, namespace="model", layer_bytes=LAYERS, max_leased_bytes=SLAB_BYTES, device="SIM-0")
        )
        eventually("a lease", lambda: other.cache.stats()["leases"])
        shares_with(one, other)
        other.cache.close()


def shares_with(one: Engine, other: Engine) -> None:
    assert other.store([1, 2, 3])["stored"] == 2, "block 1 is there already"
    assert len(one.cache.lookup(hashes([1, 2, 3]), ask=False)) == 1

    def found() -> Hit | None:
        hit = one.cache.lookup(hashes([1, 2, 3]))
        return hit if len(hit) == 3 else None

    hit = eventually("the other one's blocks", found)
    assert hit.own_blocks == 1
    assert hit.load(upper(3)).finish() == []
    assert holds(one, [1, 2, 3])


@pytest.mark.parametrize("held", [True, False], ids=["held", "twin-let-go"])
def test_what_is_held_is_not_evicted(node: Node, engine: Make, held: bool) -> None:
    node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine(slabs=2)
    first = list(range(1, 9))
    one.store(first)
    hit = one.cache.lookup(hashes(first), ask=False)
    if not held:
        del hit
        gc.collect()
    for begin in range(100, 100 + 8 * SLAB_BLOCKS, 16):
        one.store(list(range(begin, begin + 16)))
    assert one.cache.stats()["evicted_blocks"] > 0
    assert (len(one.cache.lookup(hashes(first), ask=False)) == 8) == held
    if held:
        assert hit.load(upper(8)).finish() == [] and holds(one, first)


def test_what_a_donor_took_back_is_missing_at_once(node: Node, engine: Make) -> None:
    donor = node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    one.store([1, 2, 3])
    hit = one.cache.lookup(hashes([1, 2, 3]))
    assert hit.load(upper(3)).missing() == [], "the twin: with the donor there nothing is missing"
    node.withdraw(donor)
    donor.wait(120)
    load = hit.load(upper(3))
    assert load.missing() == load.finish() == [0, 1, 2]


def test_only_a_load_that_nobody_can_take_back_may_be_relied_on_before_it_is_over(node: Node, engine: Make) -> None:
    donor = node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    one.store([1, 2, 3])
    hit = one.cache.lookup(hashes([1, 2, 3]))
    load = hit.load(upper(3))
    with pytest.raises(ValueError, match="most_bytes"):
        load.promise(-1)
    assert load.promise(1 << 30) and load.finish() == [] and holds(one, [1, 2, 3])
    assert load.promise(0), "all of it is there"
    # The scheduler's own call finds it, too, and what it asks for must be there whole.
    assert one.cache.load(hashes([1, 2, 3]), upper(3)).promise(1 << 30)
    assert not one.cache.load(hashes([1, 2, 99]), upper(3)).promise(1 << 30)
    node.withdraw(donor)
    donor.wait(120)
    assert not hit.load(upper(3)).promise(1 << 30), "its blocks are gone"


def test_what_others_wrote_may_not_be_relied_on_before_it_is_there(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine(device="SIM-2", lookup_ms=60_000)
    with contextlib.closing(Connection(node.socket, name="another engine")) as connection:
        other = Engine(
            Cache(connection, namespace="model", layer_bytes=LAYERS, max_leased_bytes=SLAB_BYTES, device="SIM-0")
        )
        eventually("a lease", lambda: other.cache.stats()["leases"])
        other.store([1])
        hit = eventually("the other one's block", lambda: one.cache.lookup(hashes([1])) or None)
        load = hit.load(upper(1))
        assert not load.promise(1 << 30) and load.finish() == []
        other.cache.close()


def test_a_store_says_at_once_what_has_no_room(node: Node, engine: Make) -> None:
    donor = node.start_donor("SIM-1", 1, SLAB_BYTES)
    one = engine(slabs=1)
    for block, n in enumerate([1, 2]):
        one.pool.compute(n, block)
    store = one.cache.store(hashes([1, 2]), [0, 1])
    assert store.unplaced() == 0 and store.finish()["stored"] == 2
    node.withdraw(donor)
    donor.wait(120)
    eventually("the loss to be noticed", lambda: not one.cache.stats()["leases"])
    store = one.cache.store(hashes([1, 2]), [0, 1])
    assert store.unplaced() == 2 and store.finish()["unplaced"] == 2


def test_a_hit_may_outlive_its_cache(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 2, SLAB_BYTES)
    one = engine()
    one.store([1, 2])
    hit = one.cache.lookup(hashes([1, 2]))
    one.cache.close()
    assert hit.load(upper(2)).finish() == [0, 1]
