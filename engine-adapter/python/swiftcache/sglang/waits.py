"""Requests that wait for pages on their way from a disk, while SGLang goes on with all others.

A linker's lookup can only say what there is now, and SGLang schedules a request in the step that looks it up. So while
a request waits it is taken out of the queue for the time in which SGLang forms a batch, and put back after that:
aborts, time limits, priorities and metrics see it as any other. It waits at most `disk_ms`, and not at all when the
disk is expected to take longer. Beside `weights` this is the one place where SGLang's own code is wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ASK_SECONDS = 0.002
"""How often it is asked whether pages are there."""
ASK_AT_ONCE = 16
"""Of how many requests at a time: each takes a question to the broker."""
_WRAPPED = "_swiftcache_wrapped"


@dataclass
class _Waiting:
    since: float


class DiskWaits:
    def __init__(
        self,
        coming: Callable[[str], tuple[int, int]],
        *,
        disk_ms: int,
        together: Callable[[list[int]], list[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`coming`: pages that the last lookup of a request said are on their way, and within how many milliseconds.
        `together`: the largest of each of these numbers over the ranks that must decide alike. They have the same
        queue, and take the same steps."""
        self._coming, self._most_ms, self._together, self._clock = coming, disk_ms, together, clock
        self._seen: dict[str, _Waiting | None] = {}
        """Requests in the queue: those that wait, the one that was asked longest ago first, and None for those that do
        not any more."""
        self._asked = float("-inf")

    def held(self, queue: Sequence[Any], look_up: Callable[[Any], None]) -> set[str]:
        """The requests that are to stay in the queue in this step. `look_up` has SGLang match one's prefix."""
        by_name = {request.rid: request for request in queue}
        self._seen = {name: its for name, its in self._seen.items() if name in by_name}
        new = [name for name in by_name if name not in self._seen]
        waiting = [name for name, its in self._seen.items() if its is not None]
        if not waiting:
            self._asked = self._clock()
        elif not self._is_time():
            waiting = []
        asked = [*new, *waiting[:ASK_AT_ONCE]]
        if asked:
            for name in asked:
                look_up(by_name[name])
            now = self._clock()
            verdicts = self._together([int(self._waits(name, now)) for name in asked])
            for name, waits in zip(asked, verdicts, strict=True):
                before = self._seen.pop(name, None)
                self._seen[name] = (before or _Waiting(now)) if waits else None
        return {name for name, its in self._seen.items() if its is not None}

    def _is_time(self) -> bool:
        """Whether they are asked for in this step. Clocks of ranks differ, and all ask or none."""
        now = self._clock()
        late = self._together([int(now - self._asked < ASK_SECONDS)]) == [1]
        if not late:
            self._asked = now
        return not late

    def _waits(self, name: str, now: float) -> bool:
        pages, within_ms = self._coming(name)
        its = self._seen.get(name)
        # What a disk is expected to take counts once: after that it is there or late.
        after_ms = (now - its.since) * 1000 if its is not None else max(within_ms, 1)
        return pages > 0 and after_ms <= self._most_ms


def serve(linker_type: type) -> bool:
    """Has requests wait in the schedulers of this process whose linker is of this type and has `waits`. False when this
    SGLang does not have what that takes."""
    with contextlib.suppress(ImportError):
        from sglang.srt.managers.scheduler import Scheduler

        form = getattr(Scheduler, "_get_new_batch_prefill_raw", None)
        if form is None:
            return False
        if not hasattr(form, _WRAPPED):
            wrapped = _wrap(form, linker_type)
            setattr(wrapped, _WRAPPED, True)
            Scheduler._get_new_batch_prefill_raw = wrapped
        return True
    return False


def _wrap(form: Callable[..., Any], linker_type: type) -> Callable[..., Any]:
    @functools.wraps(form)
    def formed(self: Any, *arguments: Any, **more: Any) -> Any:
        linker = getattr(getattr(self.tree_cache, "linker", None), "cache_linker", None)
        waits = linker.waits if isinstance(linker, linker_type) else None
        if waits is None or not self.waiting_queue:
            return form(self, *arguments, **more)
        held = waits.held(self.waiting_queue, lambda request: _match(self, linker, request))
        if not held:
            return form(self, *arguments, **more)
        order = {request.rid: at for at, request in enumerate(self.waiting_queue)}
        kept = [request for request in self.waiting_queue if request.rid in held]
        self.waiting_queue = [request for request in self.waiting_queue if request.rid not in held]
        try:
            return form(self, *arguments, **more)
        finally:
            back = kept + self.waiting_queue
            # As they came. Policies that want another order sort at each step.
            self.waiting_queue = sorted(back, key=lambda request: order.get(request.rid, len(order)))

    return formed


def _match(scheduler: Any, linker: Any, request: Any) -> None:
    linker.ask_anew(request.rid)
    # As SGLang does for a request that arrives when it prefetches from its own storage.
    request.init_next_round_input(scheduler.tree_cache, cow_mamba=False)
