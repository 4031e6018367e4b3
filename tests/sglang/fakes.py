"""Stand-ins for the native module's objects, for tests without an engine."""

from __future__ import annotations

from typing import Any

from swiftcache.engine.quiet import Quiet

KEY = 16


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Noted(Quiet):
    """Keeps what would be logged."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def trouble(self, kind: str, what: object) -> None:
        self.kinds.append(kind)


class Load:
    def __init__(self, failed: list[int] | None = None, *, breaks: bool = False) -> None:
        self.failed, self.breaks = failed or [], breaks
        self.gated: list[tuple[int, int]] = []
        self.over = self.finished = False

    def gate_layer(self, layer: int, stream: int) -> None:
        if self.breaks:
            raise RuntimeError("a gate that breaks")
        self.gated.append((layer, stream))

    def is_done(self) -> bool:
        return self.over

    def missing(self) -> list[int]:
        return self.failed

    def finish(self) -> list[int]:
        self.finished = True
        return self.failed


class Hit:
    def __init__(self, blocks: int, own: int | None = None, coming: tuple[int, int] = (0, 0)) -> None:
        self.blocks, self.own_blocks, self.coming = blocks, blocks if own is None else own, coming

    def __len__(self) -> int:
        return self.blocks


class Cache:
    """Finds the keys in `known`, up to the first that is not there."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.asked: list[bool] = []
        self.takes: Any = lambda: None
        """Called by each lookup that asks."""
        self.coming = (0, 0)
        """What a lookup says of a disk."""

    def lookup(self, hashes: bytes, *, ask: bool = True) -> Hit:
        self.asked.append(ask)
        if ask:
            self.takes()
        keys = [hashes[at : at + KEY] for at in range(0, len(hashes), KEY)]
        found = next((at for at, key in enumerate(keys) if key not in self.known), len(keys))
        return Hit(found, coming=self.coming)


class Store:
    def __init__(self, *, unplaced: int = 0) -> None:
        self.read, self._unplaced = True, unplaced

    def is_done(self) -> bool:
        return self.read

    def unplaced(self) -> int:
        return self._unplaced
