"""When an engine lends and takes back, and the way of a loan between its scheduler and its workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import swiftcache
from swiftcache.engine.lending import LOOK_SECONDS, LOOKS, Decision, Policy, View, terms
from swiftcache.engine.loans import PAUSE_SECONDS, Loans, Orders
from swiftcache.engine.metrics import Tally

BLOCKS = 101
PATIENCE = 1.5
"""Borrowers have half a second, and the margin is one."""


def agreed(**changed):
    """8 runs of 5 blocks; 10 stay free; lent after 2 seconds."""
    return terms(**({"share": 0.4, "reserve": 0.1, "after": 2.0, "blocks": BLOCKS, "kept": 21} | changed))


def view(now: float = 0.0, **changed) -> View:
    base = {"free": 100, "wanted": 0, "pressed": False, "at_home": range(8), "lent": (), "returning": 0}
    return View(now=now, **(base | changed))


def all_free(run: int) -> bool:
    return True


def test_the_tail_is_cut_into_runs_and_the_longest_request_keeps_its_blocks() -> None:
    runs = agreed().runs
    assert [len(run) for run in runs] == [5] * 8 and runs[0] == range(96, 101) and runs[-1] == range(61, 66)
    assert sum(map(len, agreed(kept=91).runs)) <= 10
    assert sum(map(len, agreed(kept=98).runs)) == 3
    with pytest.raises(ValueError, match=r"lend 0\.4 is refused: of the 101 blocks .* 101 must stay for its longest"):
        agreed(kept=101)


def test_it_lends_when_it_has_been_quiet_for_long_enough() -> None:
    policy = Policy(agreed())
    assert policy.decide(view(0.0), all_free) == Decision() and policy.due == 2.0
    assert policy.decide(view(1.9), all_free) == Decision()
    assert policy.decide(view(2.0), all_free) == Decision(lend=tuple(range(8)))
    assert policy.due is None


def test_needing_blocks_in_between_begins_the_quiet_anew() -> None:
    policy = Policy(agreed())
    policy.decide(view(0.0), all_free)
    policy.decide(view(1.0, wanted=95), all_free)
    assert policy.due is None
    assert policy.decide(view(2.0), all_free) == Decision() and policy.due == 4.0


def test_it_lends_no_more_than_leaves_a_run_and_the_reserve() -> None:
    policy = Policy(agreed(after=0.0))
    # 30 are free, of which 4 are wanted and 10 reserved.
    assert policy.decide(view(free=30, wanted=4), all_free) == Decision(lend=(0, 1))
    assert policy.decide(view(free=30, wanted=4, at_home=[3]), all_free) == Decision(lend=(3,))
    assert policy.decide(view(free=19), all_free) == Decision()


def test_runs_in_use_are_looked_at_now_and_then_and_not_for_ever() -> None:
    policy, looks = Policy(agreed(after=0.0)), []

    def in_use(run: int) -> bool:
        looks.append(run)
        return run == 7 and len(looks) > 8 * (LOOKS + 1)

    for step in range(10 * (LOOKS + 1)):
        now = step / 10 * LOOK_SECONDS
        assert policy.decide(view(now), in_use) == Decision()
        assert (policy.due is None) == (step >= 10 * (LOOKS - 1)), "nobody steps for its sake any more"
    assert len(looks) == 8 * (LOOKS + 1)
    # A free one among them is lent.
    assert policy.decide(view(now + LOOK_SECONDS), in_use) == Decision(lend=(7,))


def test_an_engine_with_little_left_is_not_looked_at() -> None:
    policy = Policy(agreed())
    policy.decide(view(0.0), all_free)
    assert not policy.needs_no_look(20) and policy.due == 2.0
    assert policy.needs_no_look(19) and policy.due is None, "and is not quiet"


def test_it_asks_back_what_it_lacks_before_requests_wait() -> None:
    policy = Policy(agreed(after=0.0))
    lent = (7, 6, 5, 4)
    assert policy.decide(view(free=30, wanted=20, at_home=(), lent=lent), all_free) == Decision()
    assert policy.decide(view(free=30, wanted=21, at_home=(), lent=lent), all_free) == Decision(take_back=(7, 6))
    # What is on its way is not asked for twice.
    assert policy.decide(view(free=30, wanted=21, at_home=(), lent=(5, 4), returning=10), all_free) == Decision()
    assert policy.decide(view(pressed=True, at_home=(), lent=lent), all_free) == Decision(take_back=lent)


def test_what_was_just_taken_back_is_not_lent_at_once() -> None:
    """Hysteresis: no need makes it lend and ask back in turns."""
    for wanted in range(0, 100):
        policy, lent, free = Policy(agreed(after=0.0)), [], 100
        changes = 0
        for _ in range(20):
            at_home = [run for run in range(8) if run not in lent]
            seen = view(free=free, wanted=wanted, at_home=at_home, lent=sorted(lent)[::-1])
            decision = policy.decide(seen, all_free)
            lent = [run for run in lent if run not in decision.take_back] + list(decision.lend)
            free = 100 - 5 * len(lent)
            changes += bool(decision.lend or decision.take_back)
        assert changes <= 2, f"{changes} changes while {wanted} are wanted"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Pool:
    """An engine's pool of which nobody uses a block. The first is never given to anybody."""

    def __init__(self) -> None:
        self.taken: set[int] = set()

    @property
    def free(self) -> int:
        return BLOCKS - 1 - len(self.taken)

    def are_free(self, blocks: Iterable[int]) -> bool:
        return self.taken.isdisjoint(blocks)

    def take(self, blocks: Sequence[int]) -> None:
        assert self.are_free(blocks)
        self.taken.update(blocks)

    def put_back(self, blocks: Iterable[int]) -> None:
        assert self.taken.issuperset(blocks)
        self.taken.difference_update(blocks)


class Bench:
    """A scheduler's half over such a pool."""

    def __init__(self, workers: int = 2, **changed) -> None:
        self.pool, self.clock, self.stats = Pool(), Clock(), Tally()
        self.loans = Loans(agreed(**changed), self.pool, workers=workers, drain_ms=500, clock=self.clock)

    def step(self, wanted: int = 0, pressed: bool = False) -> Orders:
        return self.loans.step(lambda: wanted, pressed, self.stats)

    def hear(self, *back: int, refused: str = "") -> None:
        self.loans.heard(dict.fromkeys(back, 1), refused, self.stats)

    @property
    def free(self) -> int:
        return self.pool.free


def test_blocks_are_back_when_every_worker_says_so() -> None:
    bench = Bench(after=0.0)
    lend = bench.step().lend
    assert [(job.first, job.last) for job in lend][:2] == [(96, 101), (91, 96)] and len(lend) == 8
    assert bench.free == 60
    asked = bench.step(wanted=55).take_back
    assert asked and bench.step(wanted=55).take_back == [], "asked once"
    bench.hear(*asked)
    assert bench.free == 60, "the other worker's part may be written to"
    bench.clock.now = 0.25
    bench.hear(*asked)
    assert bench.free == 60 + 5 * len(asked)
    assert bench.stats.data["counters"] == {
        "lends": 8,
        "give_backs": len(asked),
        "give_back_ms": 250.0 * len(asked),
    }
    assert bench.stats.gauges()["lent_blocks"] == 40 - 5 * len(asked)
    assert bench.stats.gauges()["returning_blocks"] == 0
    # Again, under other numbers: a late word about the old loan is about nothing.
    again = bench.step().lend
    assert again and not {job.loan for job in again} & {job.loan for job in lend}
    free = bench.free
    bench.hear(*asked)
    bench.hear(*asked)
    assert bench.free == free


def test_an_idle_engine_is_stepped_until_it_has_lent_and_no_longer() -> None:
    bench = Bench()
    assert bench.loans.wants_steps(), "it never was busy"
    assert bench.step().lend == [] and bench.loans.wants_steps()
    bench.clock.now = 2.0
    assert bench.step().lend and not bench.loans.wants_steps()


def test_requests_wait_for_blocks_on_their_way_and_not_for_ever() -> None:
    bench = Bench(after=0.0)
    bench.step()
    assert not bench.loans.frees_pending()
    asked = bench.step(pressed=True).take_back
    assert len(asked) == 8 and bench.loans.frees_pending() and bench.loans.wants_steps()
    bench.clock.now = PATIENCE
    assert bench.loans.frees_pending()
    # A borrower that does not let go: from now on the pool is a smaller one.
    bench.clock.now += 0.001
    assert not bench.loans.frees_pending() and not bench.loans.wants_steps()
    bench.hear(*asked)
    bench.hear(*asked)
    assert bench.free == 100 and bench.stats.data["counters"]["late_give_backs"] == 8


def test_what_comes_back_unasked_is_not_lent_at_once() -> None:
    bench = Bench(after=0.0)
    first = bench.step().lend[0].loan
    bench.hear(first)
    assert bench.step().take_back == [first], "one worker's part is no use without the other's"
    bench.hear(first)
    bench.hear(first + 1)
    bench.hear(first + 1)
    assert bench.free == 70 and bench.step().lend == []
    assert not bench.loans.wants_steps(), "nobody steps an idle engine for half a minute"
    bench.clock.now = PAUSE_SECONDS
    assert len(bench.step().lend) == 2


def test_a_refusal_ends_lending_and_blocks_come_back() -> None:
    bench = Bench(workers=1, after=0.0)
    loans = [job.loan for job in bench.step().lend]
    bench.hear(*loans, refused="no such layout")
    bench.clock.now = PAUSE_SECONDS
    assert bench.free == 100 and bench.step().lend == [] and not bench.loans.wants_steps()


def test_what_loans_are_told_is_checked() -> None:
    for wrong in ({"workers": 0, "drain_ms": 1}, {"workers": 2, "drain_ms": -1}):
        with pytest.raises(ValueError, match="workers|drain_ms"):
            swiftcache.Loans(**wrong)
    loans = swiftcache.Loans(workers=2, drain_ms=500)
    assert loans.patience == PATIENCE
    with pytest.raises(ValueError, match="now"):
        loans.ask_back([], -1.0)
    assert loans.ask_back([7], 0.0) == [] and loans.came_back({7: 2}, 0.0) == [], "there is none"
    assert loans.out() == ([], [])
