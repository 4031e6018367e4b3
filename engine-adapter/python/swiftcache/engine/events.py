"""Which blocks can be found in donors' memory, for cache-aware routers.

The broker's index is the truth: it knows what every engine, donor and operator of the node does to a block. It is
followed (`swiftcache._native.IndexWatch`), and what it says of the blocks that this engine has computed or found is
reported. What an event looks like is the engine's matter: this is when there is one, and of what.

A block is reported stored in a medium when every worker's part of it can be found there, and removed when the last copy
of some part there is gone, for whatever reason. Blocks in an engine's own host memory are its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from swiftcache.engine.keys import KEY_BYTES

if TYPE_CHECKING:
    from swiftcache._native import IndexWatch

MEDIUM_HBM = "SWIFTCACHE_HBM"
"""What events call donors' HBM."""
MEDIUM_HOST = "SWIFTCACHE_HOST"
"""The same of donors' host memory."""
MOST = 1 << 18
"""Blocks that are known at a time. The oldest beyond are reported removed: a router then expects less than there is."""


class Change(NamedTuple):
    """`block`: what the engine said of it. None: all blocks are gone."""

    block: Any
    medium: str
    found: bool


CLEARED = Change(None, "", False)


class Events:
    def __init__(self, enabled: bool, most: int = MOST) -> None:
        self.enabled = enabled
        self._most = most
        self._namespaces: tuple[str, ...] = ()
        self._index: IndexWatch | None = None
        self._known: dict[bytes, Any] = {}
        self._ready: list[Change] = []

    def follow(self, namespaces: Sequence[str], watch: Callable[[Sequence[str]], IndexWatch]) -> None:
        """Follows the index of these namespaces from now on: one of each rank, or of several that share theirs."""
        several = tuple(dict.fromkeys(namespaces))
        if not self.enabled or self._namespaces == several:
            return
        self.close()
        self._namespaces = several
        self._index = watch(several)
        self._index.name(b"".join(self._known))

    def offered(self, keys: bytes, block: Callable[[int], Any]) -> None:
        """Blocks are on their way, or were found. `block` makes what is to be reported of the one with a number."""
        if not self.enabled:
            return
        new = []
        for number in range(len(keys) // KEY_BYTES):
            key = keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
            if key not in self._known:
                self._known[key] = block(number)
                new.append(key)
        if new and self._index is not None:
            self._index.name(b"".join(new))
        if len(self._known) > self._most:
            self._forget([key for key, _ in zip(self._known, range(len(self._known) - self._most), strict=False)])

    def _forget(self, keys: list[bytes]) -> None:
        self._ready += self._told(self._index.forget(b"".join(keys))) if self._index is not None else []
        for key in keys:
            del self._known[key]

    def _told(self, changes: list[tuple[bytes, bool, bool]]) -> list[Change]:
        return [
            Change(self._known[key], MEDIUM_HOST if host else MEDIUM_HBM, found)
            for key, host, found in changes
            if key in self._known
        ]

    def reset(self) -> None:
        """What was stored until now is found no more."""
        if not self.enabled:
            return
        if self._index is not None:
            self._index.forget(b"".join(self._known))
        self._known.clear()
        self._ready = [CLEARED]

    def take(self) -> list[Change]:
        """What has become of blocks since the last call, in the order in which it did."""
        ready, self._ready = self._ready, []
        return ready + (self._told(self._index.take()) if self._index is not None else [])

    def close(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
