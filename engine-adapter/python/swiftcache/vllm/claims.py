"""Prefixes that the scheduler claims at its own worker, where both are one process.

Between a lookup and its load the memory may be asked back, so vLLM has to hear how a load ended before it may compute
on it: the load is asynchronous, and costs a step without tokens and another round of the scheduler. A claim is a lookup
after which the blocks stay until they are loaded. Nothing but the device can fail that load, so vLLM is told that it is
synchronous. It schedules the request at once, and the forward waits for each layer (`landing`).

A claim lasts for one step: what is not scheduled in it is claimed anew in the next one. Its copies begin as soon as the
request has its blocks, where nothing else is on its way there: vLLM takes milliseconds from there to the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from swiftcache._native import Claim, Load, Mark
    from swiftcache.vllm.landing import Landing

_here: WeakValueDictionary[bytes, Claims] = WeakValueDictionary()
"""Of the workers of this process, by the identifiers of their caches."""


def of(borrower_id: bytes) -> Claims | None:
    """Those of a worker, if it is in this process and has a pool at present."""
    return _here.get(borrower_id)


class Claims:
    def __init__(
        self,
        borrower_id: bytes,
        landing: Landing,
        *,
        block_bytes: int,
        may_claim: Callable[[Mapping[tuple[int, int], int]], bool],
        claim: Callable[[bytes, int], Claim | None],
        begin: Callable[[Claim, list[int]], Load | None],
    ) -> None:
        """
        Args:
            may_claim: whether a load may be part of the step that is being scheduled, with the updates of weights that
                the scheduler knows of.
            claim: claims the first ones of some blocks, if they have no more than so many bytes.
            begin: has the load of a claim into blocks of the pool begin, if it may before the step does.
        """
        self._landing, self._block_bytes = landing, block_bytes
        self._may_claim, self._claim, self._begin = may_claim, claim, begin
        self._claims: dict[str, Claim] = {}
        self._begun: dict[str, tuple[Load, int]] = {}
        """With how many blocks."""
        _here[borrower_id] = self

    def claim(
        self, request: str, keys: bytes, weights: Mapping[tuple[int, int], int], *, alone: bool, least: int
    ) -> int:
        """Claims the first ones of these blocks for a request, in place of what it has claimed. Returns how many: 0
        where the load has to be asynchronous, or nothing is there.

        Args:
            alone: no other request runs.
            least: where there is no room for so many, none is looked for.
        """
        self._claims.pop(request, None)
        claimed = sum(map(len, self._claims.values())) + sum(blocks for _, blocks in self._begun.values())
        room = self._landing.room(alone) - claimed * self._block_bytes
        if not keys or room < least * self._block_bytes or not self._may_claim(weights):
            return 0
        claim = self._claim(keys, room)
        if claim is None:
            return 0
        self._claims[request] = claim
        return len(claim)

    def blocks(self, request: str) -> int:
        """How many blocks a request has claimed."""
        return len(self._claims.get(request, ()))

    def begin(self, request: str, blocks: list[int]) -> None:
        """A request has got its blocks of the pool, and is part of this step."""
        if load := self._begin(self._claims[request], blocks):
            self._begun[request] = load, len(self._claims.pop(request))

    def keep(self, requests: Collection[str]) -> list[str]:
        """Lets go of what others have claimed. Returns those that have not got their blocks."""
        waiting = [one for one in self._claims if one not in requests]
        for request in waiting:
            del self._claims[request]
        for request in [one for one in self._begun if one not in requests]:
            self._begun.pop(request)[0].finish()
        return waiting

    def load(self, request: str, blocks: list[int], after: Mark | None) -> Load | None:
        """The load of what a request has claimed. No copy starts before `after`, unless it has begun already."""
        load, _ = self._begun.pop(request, (None, 0))
        if load is None and (claim := self._claims.pop(request, None)) is not None:
            load = claim.load(blocks, after)
        return load
