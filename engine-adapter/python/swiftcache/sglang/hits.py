"""What lookups found, held in place from a lookup to its load.

SGLang looks a waiting request up at every step, and loads it at one of them. A hit is kept for a moment, so that most
of these questions cost nothing, and no longer: what it holds makes no room for others.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftcache._native import Cache, Hit
    from swiftcache.engine.keys import Keys
    from swiftcache.engine.quiet import Quiet

HELD_SECONDS = 0.2
"""How long a hit is kept."""
HELD_REQUESTS = 1024
"""Of how many requests."""
REST_SECONDS = 1.0
"""For how long a broker that answers late is not asked. Own blocks are found meanwhile."""


@dataclass
class _Held:
    keys: Sequence[str]
    hit: Hit
    until: float


class Hits:
    def __init__(
        self,
        cache: Cache,
        keys: Keys,
        quiet: Quiet,
        *,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience`: how long the broker may take, seconds: SGLang's scheduler waits meanwhile."""
        self._cache, self._keys, self._quiet, self._clock = cache, keys, quiet, clock
        self._patience = patience
        self._asks_again = float("-inf")
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def lookup(self, request: str, keys: Sequence[str]) -> tuple[int, bool]:
        """How many of the first pages can be loaded, and whether that was looked up now."""
        self.let_go()
        held = self._held.get(request)
        if held is not None and held.keys == keys:
            return len(held.hit), False
        hit = self._find(keys)
        self._held.pop(request, None)
        self._held[request] = _Held(keys, hit, self._clock() + HELD_SECONDS)
        if len(self._held) > HELD_REQUESTS:
            self._held.popitem(last=False)
        return len(hit), True

    def take(self, request: str, keys: Sequence[str]) -> Hit:
        """The hit for a load of these pages: what the last lookup of the request found, or found now."""
        held = self._held.pop(request, None)
        if held is not None and len(held.hit) >= len(keys) and held.keys[: len(keys)] == keys:
            return held.hit
        return self._find(keys)

    def coming(self, request: str) -> tuple[int, int]:
        """Pages behind what the last lookup of the request found that are on their way from a disk, and within how many
        milliseconds."""
        held = self._held.get(request)
        return held.hit.coming if held is not None else (0, 0)

    def drop(self, request: str) -> None:
        """The next lookup of the request is asked anew."""
        self._held.pop(request, None)

    def let_go(self) -> None:
        """Lets go of what has been kept for long enough."""
        now = self._clock()
        while self._held:
            request = next(iter(self._held))
            if self._held[request].until > now:
                return
            del self._held[request]

    def forget(self) -> None:
        self._held.clear()

    def __len__(self) -> int:
        return len(self._held)

    def _find(self, keys: Sequence[str]) -> Hit:
        hashes = self._keys.of(map(bytes.fromhex, keys))
        began = self._clock()
        asks = began >= self._asks_again
        hit = self._cache.lookup(hashes, ask=asks)
        now = self._clock()
        if asks and now - began >= self._patience:
            # Each request's lookup would stop the engine for as long.
            self._asks_again = now + REST_SECONDS
            self._quiet.trouble("the broker answers late, and is not asked for a moment", f"{now - began:.3f} s")
        return hit
