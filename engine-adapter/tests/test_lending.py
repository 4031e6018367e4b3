"""An engine lends parts of its pool while it does not use them, and gets them back after borrowers have let go."""

import ctypes
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from engine import LAYERS, SLAB_BYTES, Engine
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


@contextmanager
def doomed(node: Node) -> Iterator[subprocess.Popen[str]]:
    """A lending engine that has just begun to take up its pool."""
    program = pathlib.Path(__file__).with_name("doomed.py")
    command = [sys.executable, str(program), node.socket]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        try:
            assert one.stdin is not None and one.stdout is not None
            assert one.stdout.readline() == "ready\n"
            one.stdin.write("go\n")
            one.stdin.flush()
            yield one
        finally:
            one.kill()


def test_an_engine_killed_at_any_moment_from_taking_up_its_pool_on_leaves_nothing(
    node: Node, engine: Callable[..., Engine]
) -> None:
    node.start_donor("SIM-2", 4, SLAB_BYTES)
    survivor = engine(slabs=1, device="SIM-0")
    assert survivor.store([1, 2, 3])["stored"] == 3

    def left() -> tuple[int, int, int, int]:
        status = node.status()
        total = status["total"]
        return status["sessions"], total["offered"], total["leased"], total["zombie"]

    alone = left()
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    began = time.monotonic()
    with doomed(node) as one:
        assert one.stdout is not None and one.stdout.readline() == "all done once\n"
        life = time.monotonic() - began
        assert left()[0] > alone[0], "the broker knows it while it lives"
    for _ in range(20):
        with doomed(node) as one:
            # The moment decides nothing about what must hold.
            time.sleep(moments.uniform(0, life))
            one.kill()
        eventually("everything of the dead engine to be gone", lambda: left() == alone)
        assert survivor.fetch([1, 2, 3]) == []
