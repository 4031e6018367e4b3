"""Loans of the engine's own blocks, from the scheduler's taking them out of the engine's pool to its putting them back.

The scheduler's half decides and keeps the blocks; the workers' halves lend the bytes of them, each its rank's part.
Blocks go back to the engine when every worker has said that nobody else can touch its part any more, and not before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from swiftcache.engine.layout import Layout, ranges_of
from swiftcache.engine.lending import LOOK_SECONDS, Policy, Terms, View
from swiftcache.engine.metrics import Tally
from swiftcache.engine.quiet import Quiet, logger

if TYPE_CHECKING:
    from swiftcache._native import Cache, Mark

MARGIN_SECONDS = 1.0
"""What giving back takes beyond the time that borrowers have to move away: copies under way, and a few messages."""
PAUSE_SECONDS = 30.0
"""What came back unasked is not lent again before that: an operator's drain, or memory that cannot be exported."""


class BlockPool(Protocol):
    """The engine's pool, as far as blocks are taken out of it and put back."""

    @property
    def free(self) -> int:
        """Blocks that the engine can give to requests now."""

    def are_free(self, blocks: Iterable[int]) -> bool:
        """Whether nobody uses or reads any of them."""

    def take(self, blocks: Sequence[int]) -> None:
        """Takes free blocks."""

    def put_back(self, blocks: Iterable[int]) -> None:
        """Puts blocks back that were taken."""


@dataclass(slots=True)
class LendJob:
    """The blocks from `first` up to `last` are out of the engine's pool until the loan is back."""

    loan: int
    first: int
    last: int


@dataclass(slots=True)
class Orders:
    """What the workers are to do, before the engine's next kernels run."""

    lend: list[LendJob] = field(default_factory=list)
    take_back: list[int] = field(default_factory=list)
    """Loans."""


@dataclass(slots=True)
class Loan:
    run: int
    asked_back: float | None = None
    back: int = 0
    """Workers that have their part back."""


class Loans:
    """The scheduler's half."""

    def __init__(
        self,
        terms: Terms,
        pool: BlockPool,
        *,
        workers: int,
        drain_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bound = drain_seconds + MARGIN_SECONDS
        self._terms, self._pool, self._workers, self._clock = terms, pool, workers, clock
        self._policy = Policy(terms)
        self._loans: dict[int, Loan] = {}
        self._next = 0
        self._incomplete: set[int] = set()
        """Loans of which some worker's part came back unasked: the others' is no use without it."""
        self._began = False
        self._refused = False
        self._longest_ms = 0.0

    def step(self, wanted: Callable[[], int], pressed: bool, stats: Tally) -> Orders:
        """What the workers are to lend and take back in this step. `wanted` says how many blocks requests lack;
        `pressed`: a request lost its blocks to another one."""
        self._began = True
        orders = Orders()
        if not self._loans and (self._refused or self._policy.needs_no_look(self._pool.free)):
            return orders
        now = self._clock()
        runs = self._terms.runs
        decision = self._policy.decide(self._view(now, wanted(), pressed), lambda run: self._pool.are_free(runs[run]))
        if decision.lend:
            for run in decision.lend:
                blocks = self._terms.runs[run]
                self._pool.take(blocks)
                self._loans[self._next] = Loan(run)
                orders.lend.append(LendJob(self._next, blocks.start, blocks.stop))
                self._next += 1
            stats.add("lends", len(decision.lend))
            self._show(stats)
        asked = [
            number
            for number, loan in self._loans.items()
            if loan.asked_back is None and (loan.run in decision.take_back or number in self._incomplete)
        ]
        self._incomplete.clear()
        for number in asked:
            self._loans[number].asked_back = now
        if asked:
            orders.take_back.extend(asked)
            self._show(stats)
        return orders

    def _view(self, now: float, wanted: int, pressed: bool) -> View:
        runs = self._terms.runs
        out = {loan.run for loan in self._loans.values()}
        at_home = [] if self._refused else [run for run in range(len(runs)) if run not in out]
        # Those next to the engine's own blocks first: what is lent stays the tail.
        lent = sorted((loan.run for loan in self._loans.values() if loan.asked_back is None), reverse=True)
        returning = sum(len(runs[loan.run]) for loan in self._loans.values() if loan.asked_back is not None)
        return View(now, self._pool.free, wanted, pressed, at_home, lent, returning)

    def heard(self, back: Mapping[int, int], refused: str, stats: Tally) -> None:
        """Takes note of what workers report: loans that are back in how many of them, and why one can lend nothing."""
        if refused and not self._refused:
            self._refused = True
            logger.warning("SwiftCache: this engine lends nothing: %s", refused)
        for number, workers in back.items():
            loan = self._loans.get(number)
            if loan is None:
                continue
            loan.back += workers
            if loan.back >= self._workers:
                del self._loans[number]
                self._ended(loan, stats)
            elif loan.asked_back is None:
                self._incomplete.add(number)

    def _ended(self, loan: Loan, stats: Tally) -> None:
        now = self._clock()
        self._pool.put_back(self._terms.runs[loan.run])
        stats.add("give_backs", 1)
        if loan.asked_back is None:
            self._policy.pause(now + PAUSE_SECONDS)
        else:
            took = now - loan.asked_back
            stats.add("give_back_ms", took * 1e3)
            stats.add("late_give_backs", took > self.bound)
            self._longest_ms = max(self._longest_ms, took * 1e3)
        self._show(stats)

    def _show(self, stats: Tally) -> None:
        blocks = {True: 0, False: 0}
        for loan in self._loans.values():
            blocks[loan.asked_back is None] += len(self._terms.runs[loan.run])
        gauges = {"lent_blocks": blocks[True], "returning_blocks": blocks[False]}
        stats.show("scheduler", gauges | {"give_back_max_ms": self._longest_ms})

    def wants_steps(self) -> bool:
        """Whether an engine without timers should go on stepping without requests: to lend soon, or until blocks are
        back. This ends, however long blocks stay away."""
        if not self._began:
            return True
        due = self._policy.due
        soon = due is not None and due - self._clock() <= max(self._terms.after, LOOK_SECONDS)
        return (soon and not self._refused) or self.frees_pending()

    def frees_pending(self) -> bool:
        """Whether a request should wait for blocks on their way back rather than take another one's."""
        now = self._clock()
        asked = (loan.asked_back for loan in self._loans.values())
        return any(at is not None and now - at <= self.bound for at in asked)


class WorkerLoans:
    """A worker's half."""

    def __init__(self, quiet: Quiet) -> None:
        self._quiet = quiet
        self._out: set[int] = set()

    def lend(
        self, jobs: list[LendJob], cache: Cache | None, layout: Layout | None, mark: Callable[[], Mark | None]
    ) -> tuple[list[int], str]:
        """Returns the loans that are back already, since they cannot be lent, and why if it is for good."""
        back, refused = [], ""
        for job in jobs:
            try:
                assert cache is not None and layout is not None, "the pool is not registered"
                cache.lend(job.loan, ranges_of(layout, job.first, job.last), mark())
                self._out.add(job.loan)
            except Exception as reason:
                back.append(job.loan)
                if isinstance(reason, NotImplementedError):
                    refused = str(reason)
                else:
                    self._quiet.trouble("blocks could not be lent", reason)
        return back, refused

    def take_back(self, loans: list[int], cache: Cache | None) -> None:
        if loans and cache is not None:
            cache.take_back(loans)

    def returned(self, cache: Cache | None) -> list[int]:
        """Loans that are back since this was last asked."""
        if not self._out or cache is None:
            return []
        returned = cache.returned_loans()
        self._out.difference_update(returned)
        if returned and (problem := cache.lend_problem()):
            self._quiet.trouble("blocks could not be lent", problem)
        return returned
