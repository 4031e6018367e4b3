"""Loans of the engine's own blocks, from the scheduler's taking them out of the engine's pool to its putting them back.

What state a loan is in is the client's knowledge (`swiftcache._native.Loans` in the scheduler, the cache in a worker).
Here is which blocks it is of: the scheduler's half takes them out and puts them back, the workers' halves lend the
bytes of them, each its rank's part. Blocks go back to the engine when every worker has said that nobody else can touch
its part any more, and not before.
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


class Loans:
    """The scheduler's half."""

    def __init__(
        self,
        terms: Terms,
        pool: BlockPool,
        *,
        workers: int,
        drain_ms: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`drain_ms`: how long borrowers may take to move away from what is asked back."""
        from swiftcache import _native

        self._terms, self._pool, self._clock = terms, pool, clock
        self._policy = Policy(terms)
        self._loans = _native.Loans(workers=workers, drain_ms=drain_ms)
        self._runs: dict[int, int] = {}
        """The run of blocks that each loan is of."""
        self._began = False
        self._refused = False
        self._longest_ms = 0.0

    @property
    def free(self) -> int:
        """Blocks that the engine can give to requests now."""
        return self._pool.free

    def out(self) -> tuple[list[int], list[int]]:
        """Loans that are out and not asked back, and those that are on their way back."""
        return self._loans.out()

    def step(self, wanted: Callable[[], int], pressed: bool, stats: Tally) -> Orders:
        """What the workers are to lend and take back in this step. `wanted` says how many blocks requests lack;
        `pressed`: a request lost its blocks to another one."""
        self._began = True
        orders = Orders()
        if not self._runs and (self._refused or self._policy.needs_no_look(self._pool.free)):
            return orders
        now = self._clock()
        runs = self._terms.runs
        lent, returning = self._loans.out()
        decision = self._policy.decide(
            self._view(now, wanted(), pressed, lent, returning), lambda run: self._pool.are_free(runs[run])
        )
        for run in decision.lend:
            blocks = runs[run]
            self._pool.take(blocks)
            number = self._loans.lend()
            self._runs[number] = run
            orders.lend.append(LendJob(number, blocks.start, blocks.stop))
        stats.add("lends", len(decision.lend))
        chosen = [number for number in lent if self._runs[number] in decision.take_back]
        orders.take_back = self._loans.ask_back(chosen, now)
        if orders.lend or orders.take_back:
            self._show(stats)
        return orders

    def _view(self, now: float, wanted: int, pressed: bool, lent: list[int], returning: list[int]) -> View:
        runs = self._terms.runs
        out = set(self._runs.values())
        at_home = [] if self._refused else [run for run in range(len(runs)) if run not in out]
        # Those next to the engine's own blocks first: what is lent stays the tail.
        first = sorted((self._runs[number] for number in lent), reverse=True)
        return View(now, self._pool.free, wanted, pressed, at_home, first, self._blocks(returning))

    def _blocks(self, loans: Iterable[int]) -> int:
        return sum(len(self._terms.runs[self._runs[number]]) for number in loans)

    def heard(self, back: Mapping[int, int], refused: str, stats: Tally) -> None:
        """Takes note of what workers report: loans that are back in how many of them, and why one can lend nothing."""
        if refused and not self._refused:
            self._refused = True
            logger.warning("SwiftCache: this engine lends nothing: %s", refused)
        if not back:
            return
        now = self._clock()
        for number, took in self._loans.came_back(back, now):
            self._ended(number, took, now, stats)

    def _ended(self, number: int, took: float | None, now: float, stats: Tally) -> None:
        self._pool.put_back(self._terms.runs[self._runs.pop(number)])
        stats.add("give_backs", 1)
        if took is None:
            self._policy.pause(now + PAUSE_SECONDS)
        else:
            stats.add("give_back_ms", took * 1e3)
            stats.add("late_give_backs", took > self._loans.patience)
            self._longest_ms = max(self._longest_ms, took * 1e3)
        self._show(stats)

    def _show(self, stats: Tally) -> None:
        lent, returning = map(self._blocks, self._loans.out())
        gauges = {"lent_blocks": lent, "returning_blocks": returning}
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
        return bool(self._runs) and self._loans.is_awaited(self._clock())


class WorkerLoans:
    """A worker's half."""

    def __init__(self, quiet: Quiet) -> None:
        self._quiet = quiet
        self.lends = False
        """Most engines never do, and need not ask each step."""

    def lend(
        self, jobs: list[LendJob], cache: Cache | None, layout: Layout | None, mark: Callable[[], Mark | None]
    ) -> tuple[list[int], str]:
        """Returns the loans that are back already, since they cannot be lent, and why if it is for good."""
        back, refused = [], ""
        self.lends = True
        for job in jobs:
            try:
                assert cache is not None and layout is not None, "the pool is not registered"
                cache.lend(job.loan, ranges_of(layout, job.first, job.last), mark())
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
        if cache is None:
            return []
        returned = cache.returned_loans()
        if returned and (problem := cache.lend_problem()):
            self._quiet.trouble("blocks could not be lent", problem)
        return returned
