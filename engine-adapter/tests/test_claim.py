"""`Cache.claim`: what it finds is loaded once, whatever becomes of it meanwhile."""

from collections.abc import Callable

import pytest
from engine import SLAB_BYTES, Engine, hashes
from node import Node, eventually
from test_hit import holds, upper

Make = Callable[..., Engine]


def test_a_claim_loads_what_it_found_and_once(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store([1, 2, 3])
    claim = one.cache.claim(hashes([1, 2, 3, 99]), 1 << 30)
    assert claim is not None and len(claim) == 3
    with pytest.raises(ValueError, match="blocks: has 4 entries for 3 blocks that were found"):
        claim.load(upper(4))
    load = claim.load(upper(3), one.cache.mark(0))
    assert load.promise(0) and load.finish() == []
    assert holds(one, [1, 2, 3])
    assert claim.load(upper(2)).finish() == [0, 1], "it was loaded"


def test_a_claim_is_loaded_or_missing_when_its_cache_closes_meanwhile(node: Node, engine: Make) -> None:
    """Copies are queued by another thread, which may come to it when the cache is closed."""
    node.start_donor("SIM-1", 16, SLAB_BYTES)
    other = engine(namespace="other")
    other.store([1, 2, 3])
    for number in range(10):
        one = engine(namespace=f"{number}")
        one.store([1, 2, 3])
        claim = one.cache.claim(hashes([1, 2, 3]), 1 << 30)
        assert claim is not None
        load = claim.load(upper(3), one.cache.mark(0))
        del claim
        one.cache.close()
        assert load.is_done()
        failed = load.finish()
        assert failed in ([], [0, 1, 2]) and load.missing() == failed
        assert failed or holds(one, [1, 2, 3])
        assert load.promise(0) == (failed == [])
    # The twin: what is left alone is there.
    claim = other.cache.claim(hashes([1, 2, 3]), 1 << 30)
    assert claim is not None and claim.load(upper(3)).finish() == [] and holds(other, [1, 2, 3])


def test_a_load_that_nobody_waits_for_ends_by_itself(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store([1, 2, 3])
    for _ in range(10):
        claim = one.cache.claim(hashes([1, 2, 3]), 1 << 30)
        assert claim is not None
        claim.load(upper(3))
    eventually("the bytes", lambda: holds(one, [1, 2, 3]))


def test_nothing_is_claimed_that_is_not_there_or_too_much(node: Node, engine: Make) -> None:
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store([1])
    assert one.cache.claim(hashes([99, 1]), 1 << 30) is None
    assert one.cache.claim(hashes([1]), 1) is None
    # What is not claimed for long enough to be loaded holds nothing back: the cache closes.
    claim = one.cache.claim(hashes([1]), 1 << 30)
    assert claim is not None
    del claim
    one.cache.close()
    assert one.cache.claim(hashes([1]), 1 << 30) is None
