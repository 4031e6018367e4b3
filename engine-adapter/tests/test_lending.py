"""An engine lends parts of its pool while it does not use them, and gets them back after borrowers have let go."""

import ctypes
from collections.abc import Callable

import pytest
from engine import LAYERS, Engine
from node import Node, eventually
from swiftcache import Cache, Connection

Make = Callable[..., Cache]

LAYER = 2
"""The layer whose whole storage is lent."""


def storage(lender: Engine) -> tuple[int, int]:
    whole = lender.pool.storages[LAYER]
    return ctypes.addressof(whole), ctypes.sizeof(whole)


def used(lender: Engine) -> int:
    """How many bytes in the middle of the storage are not zero. Its ends may share a page with other data."""
    address, size = storage(lender)
    return sum(1 for byte in ctypes.string_at(address + 4096, size - 2 * 4096) if byte)


@pytest.fixture
def lender(node: Node, cache: Make) -> Engine:
    one = Engine(cache("lender's model", slabs=0, device="SIM-1", lend_drain_ms=2000))
    assert one.cache.wait_open(60), one.cache.problem()
    for block in range(10):
        one.pool.compute(block, block)
    return one


def test_others_keep_blocks_in_it_and_it_comes_back_empty(lender: Engine, bare_node: Node) -> None:
    assert used(lender) > 0
    for loan in (7, 8):
        lend_once(lender, bare_node, loan)


def lend_once(lender: Engine, node: Node, loan: int) -> None:
    lender.cache.lend(loan, [storage(lender)])
    eventually("the offer", lambda: lender.cache.stats()["lent_bytes"])
    assert used(lender) == 0, "the lender's own KV is still there, and others could read it"
    connection = Connection(node.socket, name="a borrower")
    borrower = Engine(
        Cache(
            connection,
            namespace="model",
            layer_bytes=LAYERS,
            max_leased_bytes=storage(lender)[1],
            lease_step_bytes=storage(lender)[1],
            device="SIM-0",
        )
    )
    assert borrower.cache.wait_open(60), borrower.cache.problem()
    eventually("a lease", lambda: borrower.cache.stats()["leases"])
    assert borrower.store([1, 2, 3])["stored"] == 3 and borrower.fetch([1, 2, 3]) == []
    assert used(lender) > 0, "the borrower's blocks are not in the lender's pool"
    assert lender.cache.returned_loans() == []
    lender.cache.take_back([loan])
    eventually("the loan", lambda: lender.cache.returned_loans() == [loan])
    assert used(lender) == 0
    assert borrower.fetch([1, 2, 3]) == [0, 1, 2]
    assert lender.cache.stats()["lent_bytes"] == lender.cache.stats()["returning_bytes"] == 0
    borrower.cache.close()
    connection.close()


def test_without_a_broker_a_loan_waits_and_is_back_when_it_is_asked_back(
    bare_node: Node, cache: Make
) -> None:
    lender = Engine(cache(slabs=0, device="SIM-1", lend_drain_ms=60_000))
    address, size = storage(lender)
    lender.cache.lend(1, [(address, size // 2)])
    lender.cache.lend(2, [(address + size // 2, size // 2)])
    lender.cache.take_back([1])
    assert lender.cache.returned_loans() == [1] and lender.cache.returned_loans() == []
    bare_node.start_broker()
    eventually("the offer", lambda: lender.cache.stats()["lent_bytes"])
    lender.cache.close()
    assert lender.cache.returned_loans() == [2], "closing the cache did not take the loan back"


def test_what_cannot_be_lent_is_back_at_once_and_says_why(lender: Engine) -> None:
    address, _ = storage(lender)
    lender.cache.lend(1, [(address, 4096)])
    eventually("the loan", lambda: lender.cache.returned_loans() == [1])
    assert lender.cache.lend_problem() != ""


def test_wrong_arguments_are_named(lender: Engine) -> None:
    address, size = storage(lender)
    for ranges in ([(address, size + 1)], [(address - 1, 1)], [(address, 0)], [(0, 1 << 20)]):
        with pytest.raises(ValueError, match=r"ranges\[0\]"):
            lender.cache.lend(1, ranges)
    with pytest.raises(ValueError, match=r"ranges\[1\]"):
        lender.cache.lend(1, [(address, size), (address, 1 << 40)])
    with pytest.raises(ValueError, match="loan"):
        lender.cache.lend(-1, [(address, size)])
    lender.cache.take_back([77])
    assert lender.cache.returned_loans() == []


def test_no_byte_is_lent_twice(lender: Engine) -> None:
    address, size = storage(lender)
    lender.cache.lend(1, [(address, size // 2)])
    with pytest.raises(ValueError, match=r"ranges\[1\].*lent already"):
        lender.cache.lend(2, [(address + size // 2, 1 << 17), (address + size // 4, size // 2)])
    with pytest.raises(ValueError, match=r"ranges\[1\].*lent already"):
        lender.cache.lend(2, [(address + size // 2, 1 << 17), (address + size // 2 + 4096, 1 << 17)])
    with pytest.raises(ValueError, match="loan"):
        lender.cache.lend(1, [(address + size // 2, size // 2)])
    lender.cache.take_back([1])
    eventually("the loan", lambda: lender.cache.returned_loans() == [1])
    lender.cache.lend(1, [(address, size)])
