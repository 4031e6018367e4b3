"""When an engine lends part of its KV pool, and when it asks for it back. Pure decisions, and a memory of them.

The pool's last blocks are cut into runs. A run is lent as a whole when all of it is free and the engine has been
quiet for a while, that is, when what remains free would still be enough for all its requests, and a run and the
reserve more. Runs are asked back as soon as what is free is not enough for its requests and the reserve: before
the engine has to wait or preempt, if it can be foreseen. Between the two lies a run, so that no engine lends and asks
back in turns.

However long a borrower takes, no request waits for ever: what is never lent holds the longest request that the
engine accepts. A pool whose lent part does not come back is a smaller pool.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

RUNS = 8
"""Into how many runs the lent part is cut: fewer make larger slabs, more follow the engine's needs more closely."""

LOOK_SECONDS = 1.0
"""How soon a quiet engine whose last blocks are in use looks at them again."""
LOOKS = 3
"""How often it does so for their sake alone; after that it takes a request to have it look."""


@dataclass(frozen=True)
class Terms:
    runs: tuple[range, ...]
    """The blocks of each run, the pool's last ones first."""
    reserve: int
    """Blocks that are to be free beyond what requests need."""
    after: float
    """For how long the engine must be quiet, seconds."""

    @property
    def run(self) -> int:
        return max((len(run) for run in self.runs), default=0)


def terms(share: float, reserve: float, after: float, *, blocks: int, kept: int) -> Terms:
    """Cuts up the tail of a pool of `blocks` blocks, of which `kept` are never lent. Raises ValueError when nothing is
    left to lend."""
    most = min(int(share * blocks), blocks - kept)
    if most < 1:
        raise ValueError(
            f"lend {share} is refused: of the {blocks} blocks of this engine's KV pool {kept} must stay for its "
            "longest request, and nothing is left to lend; give the engine a larger pool, or have it accept shorter "
            "requests only"
        )
    size = max(1, most // RUNS)
    count = most // size
    runs = tuple(range(blocks - (number + 1) * size, blocks - number * size) for number in range(min(count, RUNS)))
    return Terms(runs, int(reserve * blocks), after)


@dataclass(frozen=True)
class View:
    """What the engine looks like after a step has been scheduled."""

    now: float
    free: int
    """Blocks that the engine can still give to requests."""
    wanted: int
    """Blocks that its requests will need besides those that they have."""
    pressed: bool
    """A request lost its blocks to another one."""
    at_home: Collection[int]
    """Runs that are not lent."""
    lent: Sequence[int]
    """Runs that are lent and not asked back, the first to be asked back first."""
    returning: int
    """Blocks that have been asked back already."""


@dataclass(frozen=True)
class Decision:
    lend: tuple[int, ...] = ()
    take_back: tuple[int, ...] = ()


class Policy:
    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._quiet_since: float | None = None
        self._not_before = float("-inf")
        self._in_vain = 0
        self.due: float | None = None
        """When something is to be lent if the engine stays as it is; None if nothing is."""

    def needs_no_look(self, free: int) -> bool:
        """Whether an engine that lends nothing now, and has this much free, lends nothing next, whatever it wants."""
        if free - self._terms.reserve >= 2 * self._terms.run:
            return False
        self._unquiet()
        return True

    def decide(self, view: View, is_free: Callable[[int], bool]) -> Decision:
        """`is_free` says of a run whether all of it is, and is asked seldom: it looks at every block."""
        terms = self._terms
        short = view.wanted + terms.reserve - view.free
        if view.pressed or short > 0:
            self._unquiet()
            return Decision(take_back=self._take_back(view, short))
        spare = -short
        if not view.at_home or spare < 2 * terms.run:
            self._unquiet()
            return Decision()
        if self._quiet_since is None:
            self._quiet_since = view.now
        due = max(self._quiet_since + terms.after, self._not_before)
        self.due = due if self._in_vain < LOOKS else None
        if view.now < due:
            return Decision()
        lend = self._spare(view, spare, is_free)
        self._in_vain = 0 if lend else self._in_vain + 1
        if lend:
            self.due = None
        else:
            self._not_before = view.now + LOOK_SECONDS
            self.due = self._not_before if self._in_vain < LOOKS else None
        return Decision(lend=lend)

    def pause(self, until: float) -> None:
        """Lends nothing before then: what was lent came back unasked."""
        self._not_before = until

    def _unquiet(self) -> None:
        self._quiet_since = self.due = None
        self._in_vain = 0

    def _spare(self, view: View, spare: int, is_free: Callable[[int], bool]) -> tuple[int, ...]:
        """Runs that can be lent with a run to spare."""
        chosen = []
        for number in sorted(view.at_home):
            size = len(self._terms.runs[number])
            if spare - size < self._terms.run:
                break
            if is_free(number):
                spare -= size
                chosen.append(number)
        return tuple(chosen)

    def _take_back(self, view: View, short: int) -> tuple[int, ...]:
        """Enough to be quiet again. All of it when requests lose their blocks already."""
        lacking = short + self._terms.run - view.returning
        chosen = []
        for number in view.lent:
            if lacking <= 0 and not view.pressed:
                break
            lacking -= len(self._terms.runs[number])
            chosen.append(number)
        return tuple(chosen)
