"""Lookups: asked anew only when it is worth it, and what they found held for a moment only."""

from __future__ import annotations

import gc
import weakref

import pytest
from fakes import Cache, Clock, Noted

from swiftcache.engine.keys import Keys
from swiftcache.sglang.hits import HELD_REQUESTS, HELD_SECONDS, REST_SECONDS, Hits


def pages(*numbers: int) -> list[str]:
    return [f"{number:064x}"[::-1] for number in numbers]


class Stage:
    def __init__(self) -> None:
        self.cache, self.keys, self.clock, self.quiet = Cache(), Keys(), Clock(), Noted()
        self.hits = Hits(self.cache, self.keys, self.quiet, patience=0.05, clock=self.clock)

    def store(self, of: list[str]) -> None:
        packed = self.keys.of(map(bytes.fromhex, of))
        self.cache.known.update(packed[at : at + 16] for at in range(0, len(packed), 16))


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_lookup_is_answered_from_memory_for_a_moment(stage) -> None:
    stage.store(pages(1, 2))
    assert stage.hits.lookup("r", pages(1, 2, 3)) == (2, True)
    assert stage.hits.lookup("r", pages(1, 2, 3)) == (2, False)
    # Another request, other pages, or a while later: looked up anew.
    assert stage.hits.lookup("s", pages(1, 2, 3)) == (2, True)
    assert stage.hits.lookup("r", pages(1, 2)) == (2, True)
    stage.clock.now += HELD_SECONDS
    assert stage.hits.lookup("r", pages(1, 2)) == (2, True)
    assert len(stage.cache.asked) == 4


def test_what_was_found_is_what_is_loaded(stage) -> None:
    stage.store(pages(1, 2, 3))
    stage.hits.lookup("r", pages(1, 2, 3, 4))
    # Another rank has found less.
    assert len(stage.hits.take("r", pages(1, 2))) == 3
    assert len(stage.cache.asked) == 1
    # It is taken once. Pages that were not looked up are looked up now.
    assert len(stage.hits.take("r", pages(1, 2))) == 2
    stage.hits.lookup("r", pages(1, 2, 3, 4))
    assert len(stage.hits.take("r", pages(9))) == 0
    assert len(stage.cache.asked) == 4


def test_a_hit_is_let_go_of_when_nobody_loads_it(stage) -> None:
    stage.store(pages(1))
    stage.hits.lookup("r", pages(1))
    held = weakref.ref(stage.hits._held["r"].hit)
    stage.hits.let_go()
    assert held() is not None
    stage.clock.now += HELD_SECONDS
    stage.hits.let_go()
    gc.collect()
    assert held() is None and len(stage.hits) == 0


def test_hits_are_bounded(stage) -> None:
    for number in range(HELD_REQUESTS + 10):
        stage.hits.lookup(str(number), pages(number))
    assert len(stage.hits) == HELD_REQUESTS
    assert stage.hits.lookup(str(HELD_REQUESTS), pages(HELD_REQUESTS)) == (0, False)
    assert stage.hits.lookup("0", pages(0)) == (0, True)


def test_a_broker_that_answers_late_is_not_asked_for_a_moment(stage) -> None:
    def late() -> None:
        stage.clock.now += 0.06

    stage.cache.takes = late
    for number in range(5):
        stage.hits.lookup(str(number), pages(number))
    assert stage.cache.asked == [True, False, False, False, False], "the engine waited once"
    assert stage.quiet.kinds == ["the broker answers late, and is not asked for a moment"]
    stage.clock.now += REST_SECONDS
    stage.cache.takes = lambda: None
    for number in range(5, 8):
        stage.hits.lookup(str(number), pages(number))
    assert stage.cache.asked[5:] == [True, True, True]


def test_after_a_reset_of_the_keys_nothing_old_is_found(stage) -> None:
    stage.store(pages(1))
    assert stage.hits.lookup("r", pages(1)) == (1, True)
    stage.keys.reset()
    stage.hits.forget()
    assert stage.hits.lookup("r", pages(1)) == (0, True)
    stage.store(pages(1))
    assert stage.hits.lookup("s", pages(1)) == (1, True)
