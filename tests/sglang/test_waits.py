"""Requests that wait for a disk: who waits, for how long, and that nobody else does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fakes import Cache, Clock, Noted

from swiftcache.engine.keys import Keys
from swiftcache.sglang.hits import Hits
from swiftcache.sglang.waits import ASK_AT_ONCE, ASK_SECONDS, DiskWaits, _wrap

DISK_MS = 100


class Stage:
    """`coming`: what the next lookup of a request says. `asked`: whose prefix was matched."""

    def __init__(self, disk_ms: int = DISK_MS) -> None:
        self.clock, self.coming, self.asked, self.others = Clock(), {}, [], []
        self.waits = DiskWaits(
            lambda name: self.coming.get(name, (0, 0)), disk_ms=disk_ms, together=self._together, clock=self.clock
        )

    def _together(self, numbers: list[int]) -> list[int]:
        other = self.others.pop(0) if self.others else [0] * len(numbers)
        return [max(pair) for pair in zip(numbers, other, strict=True)]

    def held(self, *names: str) -> set[str]:
        queue = [SimpleNamespace(rid=name) for name in names]
        return self.waits.held(queue, lambda request: self.asked.append(request.rid))

    def later(self, ms: float = 1.5 * ASK_SECONDS * 1000) -> None:
        self.clock.now += ms / 1000


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_request_waits_until_its_pages_are_there_and_others_do_not(stage) -> None:
    stage.coming["a"] = (3, 20)
    assert stage.held("a", "b") == {"a"} and stage.asked == ["a", "b"]
    # The one whose turn it was is not asked again, and the other not at every step.
    assert stage.held("a", "b") == {"a"} and stage.asked == ["a", "b"]
    stage.later()
    assert stage.held("a") == {"a"} and stage.asked == ["a", "b", "a"]
    stage.later()
    stage.coming["a"] = (0, 0)
    assert stage.held("a") == set() and stage.held("a") == set() and len(stage.asked) == 4


def test_it_waits_for_so_long_and_not_at_all_for_a_disk_that_takes_longer(stage) -> None:
    stage.coming = {"a": (3, DISK_MS), "late": (3, DISK_MS + 1), "unknown": (3, 0)}
    assert stage.held("a", "late", "unknown") == {"a", "unknown"}
    stage.later(DISK_MS - 1)
    assert stage.held("a", "late", "unknown") == {"a", "unknown"}
    stage.later(5)
    assert stage.held("a", "late", "unknown") == set()
    # It is computed, and not held again.
    stage.later()
    assert stage.held("a") == set()


def test_a_request_that_comes_again_is_new(stage) -> None:
    stage.coming["a"] = (1, 1)
    assert stage.held("a") == {"a"}
    assert stage.held() == set()
    stage.coming["a"] = (0, 0)
    assert stage.held("a") == set() and stage.asked == ["a", "a"]


def test_questions_are_bounded_and_everybody_has_a_turn(stage) -> None:
    names = [f"r{number}" for number in range(ASK_AT_ONCE + 5)]
    stage.coming = dict.fromkeys(names, (1, 1))
    assert stage.held(*names) == set(names)
    stage.asked.clear()
    stage.later()
    stage.held(*names)
    assert len(stage.asked) == ASK_AT_ONCE
    stage.later()
    stage.held(*names)
    assert set(stage.asked) == set(names)


def test_ranks_decide_alike(stage) -> None:
    # Nothing is coming here, and another rank waits.
    stage.others = [[1]]
    assert stage.held("a") == {"a"}
    # It is time here, and not there: nobody asks.
    stage.later()
    stage.others = [[1]]
    asked = len(stage.asked)
    assert stage.held("a") == {"a"} and len(stage.asked) == asked
    assert stage.held("a") == set() and len(stage.asked) == asked + 1


class Request:
    def __init__(self, rid: str) -> None:
        self.rid, self.matched = rid, 0

    def init_next_round_input(self, tree_cache: object, cow_mamba: bool) -> None:
        self.matched += 1


class Linker:
    def __init__(self, waits: object) -> None:
        self.waits = waits

    def ask_anew(self, rid: str) -> None: ...


class Scheduler:
    """Forms a batch of the first request in its queue, and has one that it could not serve come back."""

    def __init__(self, linker: object, names: str, *, fails: bool = False) -> None:
        self.tree_cache = SimpleNamespace(linker=SimpleNamespace(cache_linker=linker))
        self.waiting_queue = [Request(name) for name in names]
        self.formed: list[str] = []
        self.fails = fails

    def form(self, *, running_batch: object) -> object:
        self.formed = [request.rid for request in self.waiting_queue]
        if self.fails:
            raise RuntimeError("a batch that cannot be formed")
        self.waiting_queue = [*self.waiting_queue[1:], Request("z")]
        return running_batch


def queue(scheduler: Scheduler) -> str:
    return "".join(request.rid for request in scheduler.waiting_queue)


def test_who_waits_is_left_out_of_the_batch_and_keeps_its_place() -> None:
    form = _wrap(Scheduler.form, Linker)
    scheduler = Scheduler(Linker(SimpleNamespace(held=lambda queue, look_up: {"b", "d"})), "abcde")
    assert form(scheduler, running_batch=7) == 7
    assert scheduler.formed == ["a", "c", "e"] and queue(scheduler) == "bcdez"
    # Also when SGLang fails: nobody is lost.
    scheduler = Scheduler(scheduler.tree_cache.linker.cache_linker, "abc", fails=True)
    with pytest.raises(RuntimeError, match="cannot be formed"):
        form(scheduler, running_batch=7)
    assert scheduler.formed == ["a", "c"] and queue(scheduler) == "abc"


@pytest.mark.parametrize("linker", [Linker(None), object(), None], ids=["no-waits", "another-linker", "no-linker"])
def test_without_a_disk_to_wait_for_sglang_is_as_it_was(linker) -> None:
    scheduler = Scheduler(linker, "abc")
    _wrap(Scheduler.form, Linker)(scheduler, running_batch=7)
    assert scheduler.formed == ["a", "b", "c"] and all(request.matched == 0 for request in scheduler.waiting_queue)


def test_what_is_coming_is_what_the_last_lookup_said() -> None:
    cache, clock = Cache(), Clock()
    hits = Hits(cache, Keys(), Noted(), patience=0.05, clock=clock)
    cache.coming = (4, 30)
    assert hits.coming("r") == (0, 0)
    hits.lookup("r", ["00" * 32])
    cache.coming = (0, 0)
    # Remembered for a moment, unless it is to be asked anew.
    hits.lookup("r", ["00" * 32])
    assert hits.coming("r") == (4, 30)
    hits.drop("r")
    hits.lookup("r", ["00" * 32])
    assert hits.coming("r") == (0, 0)
