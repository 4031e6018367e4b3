"""Who computes meanwhile: calls that wait let other Python threads run, and calls that an engine makes while it schedules
and steps do not. A thread that gives the GIL up beside one that computes gets it back after Python's switch interval,
which is as long as a decode step."""

import gc
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from engine import HALF, LAYERS, SLAB_BYTES, Engine, hashes
from node import Node, eventually
from swiftcache import Connection
from test_hit import upper

Make = Callable[..., Engine]

TIMES = 40


def others_ran(calls: Iterable[Callable[[], object]]) -> bool:
    """Whether a thread that wants to compute did so during these calls. It never takes the GIL, and gets it only from
    somebody who gives it up. What the calls return lives on until the answer is known."""
    turns, returned = 0, []
    ready, begin = threading.Event(), threading.Event()

    def compute() -> None:
        nonlocal turns
        ready.set()
        begin.wait()
        turns += 1

    other = threading.Thread(target=compute)
    interval = sys.getswitchinterval()
    # So long that nobody is interrupted: whoever runs goes on until it waits.
    sys.setswitchinterval(600)
    # What other tests have left may give the GIL up when it is collected.
    gc.disable()
    try:
        other.start()
        ready.wait()
        begin.set()
        for call in calls:
            returned.append(call())
        return turns > 0
    finally:
        gc.enable()
        sys.setswitchinterval(interval)
        other.join()


@pytest.fixture
def stored(node: Node, engine: Make) -> Engine:
    """An engine that has stored three blocks."""
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    one = engine()
    one.store([1, 2, 3])
    return one


def test_an_engine_that_schedules_and_steps_is_not_interrupted(stored: Engine) -> None:
    cache, keys, blocks = stored.cache, hashes([1, 2, 3]), list(upper(3))

    def claim() -> Any:
        claimed = cache.claim(keys, 1 << 30)
        assert claimed is not None
        return claimed

    claims = [claim() for _ in range(TIMES)]
    assert not others_ran([claim] * TIMES)
    assert not others_ran([lambda: cache.mark(0)] * TIMES)
    loads: list[Any] = []
    assert not others_ran([lambda one=one: loads.append(one.load(blocks)) for one in claims])
    assert not others_ran([load.is_done for load in loads])
    for load in loads:
        eventually("a load", load.is_done)
    assert not others_ran([lambda load=load: load.promise(0) for load in loads])
    assert not others_ran([load.finish for load in loads])
    hits: list[Any] = []
    assert not others_ran([lambda: hits.append(cache.lookup(keys, ask=False))] * TIMES)
    assert not others_ran([lambda hit=hit: loads.append(hit.load(blocks)) for hit in hits])
    marks, stores = [cache.mark(0) for _ in LAYERS], []
    assert not others_ran([lambda: stores.append(cache.store(keys, blocks, marks))] * TIMES)
    assert not others_ran([store.is_done for store in stores])
    assert not others_ran([cache.stats] * TIMES)
    assert not others_ran([cache.returned_loans] * TIMES)


def test_others_run_while_somebody_waits(stored: Engine, connection: Connection) -> None:
    """The twin: what asks the broker, or waits for it or for copies, lets them. One that is not awake by then misses its
    turn, so it is tried again."""
    cache, keys = stored.cache, hashes([1, 2, 3])
    stores: list[Any] = []

    def finish() -> None:
        stores.append(cache.store(hashes([len(stores) + 10]), [0], [cache.mark(0) for _ in LAYERS]))
        stores[-1].finish()

    def store_anew() -> bool:
        """The broker is to forget other blocks first, once the cache is full of those that it knows."""
        new = hashes(range(HALF * (len(stores) + 1), HALF * (len(stores) + 2)))
        marks = [cache.mark(0) for _ in LAYERS]
        ran = others_ran([lambda: stores.append(cache.store(new, range(HALF), marks))])
        stores[-1].finish()
        return ran

    eventually("a turn", lambda: others_ran([lambda: connection.count(["model"], keys, deadline_ms=60_000)]))
    eventually("a turn", lambda: others_ran([lambda: cache.lookup(hashes([99]), ask=True)]))
    eventually("a turn", lambda: others_ran([finish]))
    eventually("a turn", store_anew)
    eventually("a turn", lambda: others_ran([lambda: stored.fetch([1, 2, 3])]))
