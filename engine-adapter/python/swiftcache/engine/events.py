"""Which blocks are kept, for cache-aware routers: as far as this engine knows.

A block is reported stored once every worker has published it, and removed when a load did not find it. A block that is
revoked or evicted and asked for by nobody is not reported: no engine hears of it. What an event looks like is the
engine's matter: this is when there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MEDIUM = "SWIFTCACHE"
"""What events call the place of the blocks."""


class Events:
    """Events by the number of the store that they are about."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._offered: dict[int, Any] = {}
        self._ready: list[Any] = []

    def offered(self, number: int, event: Callable[[], Any]) -> None:
        """Blocks are on their way; `event` makes what is to be reported when they are kept."""
        if self.enabled:
            self._offered[number] = event()

    def kept(self, number: int) -> None:
        if event := self._offered.pop(number, None):
            self._ready.append(event)

    def gone(self, number: int) -> None:
        """Some of the blocks are not kept: nothing is reported."""
        self._offered.pop(number, None)

    def removed(self, event: Callable[[], Any]) -> None:
        if self.enabled:
            self._ready.append(event())

    def take(self) -> list[Any]:
        ready, self._ready = self._ready, []
        return ready
