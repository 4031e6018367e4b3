"""Write-back: results in the order of the offloads, whatever became of each; no page is locked longer than needed."""

from __future__ import annotations

import threading
import weakref

import pytest
from fakes import Noted, Store
from node import eventually

from swiftcache.sglang.offloads import Job, Offloads


def job(name: str, pages: int = 1, mark: object = "computed") -> Job:
    return Job(name.encode(), pages, None, mark, ())


class Stage:
    def __init__(self, most_pages: int = 100) -> None:
        self.stores: dict[str, Store] = {}
        self.started: list[str] = []
        self.quiet, self.gate = Noted(), threading.Event()
        self.gate.set()
        self.offloads = Offloads(self.start, self.quiet, most_pages=most_pages)

    def start(self, job: Job) -> Store:
        self.gate.wait()
        name = job.keys.decode()
        self.started.append(name)
        if name == "breaks":
            raise RuntimeError("no")
        return self.stores.get(name, Store())

    def results(self, count: int) -> list[bool]:
        eventually("the results", lambda: self.offloads.done == count)
        return [self.offloads.take() for _ in range(count)]


@pytest.fixture
def stage():
    one = Stage()
    yield one
    one.gate.set()
    one.offloads.close()


def test_results_come_in_order(stage) -> None:
    stage.stores = {"full": Store(unplaced=1)}
    for name in ("a", "full", "breaks", "b"):
        stage.offloads.add(job(name))
    assert stage.results(4) == [True, False, False, True]
    assert stage.quiet.kinds == ["a store could not start"]


def test_what_nobody_can_say_is_computed_is_not_stored(stage) -> None:
    stage.offloads.add(job("a", mark=None))
    assert stage.results(1) == [False] and stage.started == []


def test_a_page_is_held_until_it_has_been_read(stage) -> None:
    store = stage.stores["slow"] = Store()
    store.read = False
    stage.offloads.add(job("slow"))
    stage.offloads.add(job("next"))
    eventually("both to start", lambda: "slow" in stage.started)
    assert stage.offloads.done == 0
    store.read = True
    assert stage.results(2) == [True, True]


def test_a_store_that_is_over_is_let_go_of_though_no_other_comes(stage) -> None:
    """Others find its pages from then on."""
    held = weakref.ref(stage.stores.setdefault("last", Store()))
    stage.offloads.add(job("last"))
    assert stage.results(1) == [True]
    # The twin: somebody holds it.
    assert held() is not None
    stage.stores.clear()
    eventually("it to be let go of", lambda: held() is None)


def test_no_more_pages_are_locked_than_may_be() -> None:
    stage = Stage(most_pages=10)
    stage.gate.clear()
    for name, pages in (("a", 6), ("b", 4), ("c", 1), ("d", 20)):
        stage.offloads.add(job(name, pages))
    assert stage.offloads.dropped_pages == 21
    stage.gate.set()
    assert stage.results(4) == [True, True, False, False] and stage.started == ["a", "b"]
    # One that is larger than all of it goes when nothing else does.
    stage.offloads.add(job("d", 20))
    assert stage.results(1) == [True]
    stage.offloads.close()


def test_draining_waits_and_forgets(stage) -> None:
    stage.gate.clear()
    for name in "abc":
        stage.offloads.add(job(name))
    drained = threading.Thread(target=stage.offloads.drain)
    drained.start()
    assert drained.is_alive()
    stage.gate.set()
    drained.join(120)
    assert stage.started == ["a", "b", "c"] and stage.offloads.done == 0


def test_the_counters_are_read_also_when_nothing_happens() -> None:
    ticks = threading.Semaphore(0)
    offloads = Offloads(lambda _: Store(), Noted(), most_pages=1, tick=ticks.release)
    assert ticks.acquire(timeout=120) and ticks.acquire(timeout=120)
    offloads.close()
