"""Prefixes that the scheduler claims at its own worker, where both are one process.

Between a lookup and its load the memory may be asked back, so vLLM has to hear how a load ended before it may compute on
it: the load is asynchronous, and costs a step without tokens and another round of the scheduler. A claim is a lookup
after which the blocks stay until they are loaded. Nothing but the device can fail that load, so vLLM is told that it is
synchronous. It schedules the request at once, and the forward waits for each layer (`landing`).

A claim lasts for one step: what is not scheduled in it is claimed anew in the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from swiftcache._native import Claim
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
        claim: Callable[[bytes, int], Claim | None],
        may_begin: Callable[[Mapping[tuple[int, int], int]], bool],
    ) -> None:
        """`claim`: claims the first ones of some blocks, in so many bytes at most. `may_begin`: whether a load may begin
        in the step that is being scheduled, with the updates of weights that the scheduler knows of."""
        self._landing, self._block_bytes = landing, block_bytes
        self._claim, self._may_begin = claim, may_begin
        self._claims: dict[str, Claim] = {}
        _here[borrower_id] = self

    def claim(self, request: str, keys: bytes, weights: Mapping[tuple[int, int], int]) -> int:
        """Claims the first ones of these blocks for a request, in place of what it has claimed. Returns how many: 0 where
        the load has to be asynchronous, or nothing is there."""
        self._claims.pop(request, None)
        claimed = sum(len(claim) for claim in self._claims.values()) * self._block_bytes
        room = self._landing.room() - claimed
        if room <= 0 or not keys or not self._may_begin(weights):
            return 0
        claim = self._claim(keys, room)
        if claim is None:
            return 0
        self._claims[request] = claim
        return len(claim)

    def blocks(self, request: str) -> int:
        """How many blocks a request has claimed."""
        return len(self._claims.get(request, ()))

    def keep(self, requests: Collection[str]) -> None:
        """Lets go of what others have claimed."""
        for request in [one for one in self._claims if one not in requests]:
            del self._claims[request]

    def take(self, request: str) -> Claim | None:
        """What a request has claimed, to load it."""
        return self._claims.pop(request, None)
