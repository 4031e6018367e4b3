"""Write-back: pages on their way out of the pool, on a thread of their own.

SGLang keeps a page locked until the result of its offload is taken, and takes results in the order of the offloads. So
one ends as soon as its bytes have been read, well or not; that others can find them comes later, and nobody waits for
it.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swiftcache._native import Store
    from swiftcache.engine.quiet import Quiet

TICK_SECONDS = 1.0
"""How often `tick` is called at least."""
_NAPS = (0.0002, 0.005)
"""The shortest and the longest pause between two looks at a copy, seconds."""


@dataclass(frozen=True)
class Job:
    keys: bytes
    pages: int
    slots: Any
    """The token slots of its pages, a tensor."""
    mark: Any
    """The point of the engine's stream at which they are computed; None: nobody could say, and nothing is stored."""
    ready: Sequence[Any]
    """Events after which `slots` can be read."""


class Offloads:
    def __init__(
        self,
        start: Callable[[Job], Store],
        quiet: Quiet,
        *,
        most_pages: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`start` begins to store a job. `most_pages`: how many may be locked for it; more are not stored. `tick` is
        called on the thread now and then."""
        self._start, self._quiet, self._tick, self._most = start, quiet, tick, most_pages
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._results: deque[bool] = deque()
        self._lock = threading.Lock()
        self._pages = 0
        """Of all jobs that are not over."""
        self.dropped_pages = 0
        """Pages that were not stored because too many were locked already."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="swiftcache-offload")
        self._thread.start()

    def add(self, job: Job) -> None:
        with self._lock:
            full = self._pages + job.pages > self._most and self._pages > 0
            if full:
                self.dropped_pages += job.pages
            self._pages += job.pages
        # Results come in order, that of a job which is given up too.
        self._jobs.put(Job(b"", job.pages, None, None, ()) if full else job)

    @property
    def done(self) -> int:
        """Results that can be taken."""
        return len(self._results)

    def take(self) -> bool:
        """The oldest result: whether the pages were placed, as far as is known."""
        return self._results.popleft()

    def drain(self) -> None:
        """Waits until nothing is on its way. The results are forgotten."""
        self._jobs.join()
        self._results.clear()

    def close(self) -> None:
        self.drain()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One batch of jobs; False after the last. What it holds goes when it returns: others find the pages of a store
        once nobody holds it, and the next job may be long in coming."""
        try:
            jobs = [self._jobs.get(timeout=TICK_SECONDS)]
        except queue.Empty:
            self._quiet.attempt("the counters could not be read", self._tick)
            return True
        while jobs[-1] is not None:
            try:
                jobs.append(self._jobs.get_nowait())
            except queue.Empty:
                break
        stores = [(job, self._begin(job)) for job in jobs if job is not None]
        for job, store in stores:
            placed = store is not None and self._quiet.attempt("a store did not end", _placed, store) is True
            with self._lock:
                self._pages -= job.pages
            self._results.append(placed)
            self._jobs.task_done()
        self._quiet.attempt("the counters could not be read", self._tick)
        if jobs[-1] is None:
            self._jobs.task_done()
            return False
        return True

    def _begin(self, job: Job) -> Store | None:
        if job.mark is None:
            return None
        return self._quiet.attempt("a store could not start", self._start, job)


def _placed(store: Store) -> bool:
    nap, longest = _NAPS
    pause = threading.Event()
    while not store.is_done():
        pause.wait(nap)
        nap = min(longest, nap * 2)
    return store.unplaced() == 0
