"""Loads that vLLM is told are over while their last bytes are still on their way, or before they begin (`claims`), so
that the copy and the forward run side by side.

Such a load has no way to fail but the device's own (`Load.promise`), because vLLM could not take the news: it has
scheduled on top of it. From the promise on the blocks may be used. So:

* The step that vLLM schedules the request in waits for each layer before it reads it, where the step computes several
  tokens of the request. A step that computes one of each may be a replayed full graph, which calls no hooks.
* Any other first step after the promise, of a request that was aborted or is not scheduled yet, waits for the whole
  load before anything is written: its blocks may be somebody else's by then.
* One load is promised at a time, in the order in which they were queued, and only with few bytes to go: other requests
  of the step wait for it too. Where none of them runs, a claim may be larger.
* Nothing is promised before a forward has been seen to wait for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftcache._native import Load

MOST_BYTES = 8 << 30
"""What may be on its way when loads are promised that other requests of the step wait for: 23 ms over the NVLink of an
H200, where the forward of a server's step with new turns takes 26 to 60 (docs/benchmarks.md). It holds three turns of
16,000 tokens of qwen3-8b that come at once. Turns that do not join one step take another, in which all others wait."""
MOST_BYTES_ALONE = 16 << 30
"""What may be claimed where no other request runs: 46 ms. Who comes meanwhile waits as long, and so does a donor that
asks back what is being read. Up to there the steps that an asynchronous load takes are worth sparing."""


class BrokenPromise(RuntimeError):
    """A forward may have read KV that was not there. The engine ends: it must not answer with it."""


class Landing:
    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = frozenset(layers)
        self._waited: set[str] = set()
        self._proven = False
        """Whether a forward has waited for every layer."""
        self._promised: dict[str, Load] = {}
        """By request: those of which the scheduler has not taken note yet."""
        self._read: list[Load] = []
        """What this step's forward reads layer by layer."""
        self._behind: list[Load] = []
        """Those that the engine's stream waits for."""
        self.count = 0
        self.claimed = 0
        """Those of them that were promised before they began."""

    def room(self, alone: bool = False) -> int:
        """Bytes that a load may have to go when it is promised; 0: nothing can be promised now. `alone`: no request
        runs that would wait for it."""
        ahead = [*self._promised.values(), *self._read, *self._behind]
        if not self._proven or not all(other.is_done() for other in ahead):
            return 0
        return MOST_BYTES_ALONE if alone else MOST_BYTES

    def promise(self, request: str, load: Load) -> bool:
        """Whether vLLM may be told that this load is over. Those that were queued before it are over or promised."""
        room = self.room()
        if not room or not load.promise(room):
            return False
        self._promised[request] = load
        self.count += 1
        return True

    def begin(self, load: Load, computes: bool) -> None:
        """A load of a claim has begun, in the step that computes on it. `computes`: several tokens of the request."""
        if self._waited:
            raise BrokenPromise("SwiftCache: vLLM had a load begin behind the forward that needs it. The engine ends")
        if not load.promise(0):
            raise BrokenPromise(
                "SwiftCache: a load could not begin that vLLM was told cannot fail. The engine ends, since it would "
                "compute on KV that is not there. The client's log says what the device reported"
            )
        self.count += 1
        self.claimed += 1
        if computes:
            self._read.append(load)
        else:
            self._end(load)

    @property
    def at_rest(self) -> bool:
        """Whether nothing is on its way, and no forward has to be seen any more."""
        return self._proven and not (self._promised or self._read or self._behind)

    def step(self) -> None:
        """A step begins. Whatever hooks were called outside of steps waited for nothing."""
        self._waited.clear()

    def arrived(self, requests: dict[str, bool]) -> None:
        """The scheduler has taken note of these, and may give their blocks away. True: a forward is about to compute
        several tokens of the request. To be called before anything of this step is written."""
        for request, computes in requests.items():
            load = self._promised.pop(request, None)
            if load is not None and computes:
                self._read.append(load)
            elif load is not None:
                self._end(load)

    def wait_for_layer(self, name: str, wait: Callable[[Load], None]) -> None:
        """The forward is about to read a layer."""
        self._waited.add(name)
        for load in self._read:
            wait(load)

    def forward_over(self) -> None:
        """The step's forward is queued, if it has one."""
        waited, self._waited = self._layers <= self._waited, set()
        if self._read and not waited:
            raise BrokenPromise(
                "SwiftCache: vLLM ran a forward without waiting for every layer of a load that was still on its way. "
                'The engine ends, since it may have read KV that was not there. Set "load": "wait"'
            )
        self._proven = self._proven or waited
        self._behind += self._read
        self._read = []
        behind, self._behind = self._behind, []
        for load in behind:
            if load.is_done():
                self._end(load)
            else:
                self._behind.append(load)

    def forget_capture(self) -> None:
        """Hooks were called while graphs were captured."""
        self._waited.clear()

    def wait(self) -> None:
        """For all of them: the pool is about to go."""
        for load in [*self._promised.values(), *self._read, *self._behind]:
            self._end(load)
        self._promised, self._read, self._behind = {}, [], []

    def _end(self, load: Load) -> None:
        if failed := load.finish():
            raise BrokenPromise(
                f"SwiftCache: the copies of {len(failed)} blocks failed that vLLM was told it has. The engine ends, "
                "since it may have read them. The client's log says what the device reported"
            )
