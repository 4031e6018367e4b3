"""What a router makes of an engine's KV events: the set of blocks that it believes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Known = set[tuple[str, str]]


class Replay:
    """Blocks by medium and the name that SwiftCache has for them, in hexadecimal."""

    def __init__(self, key: Callable[[bytes, int | None], bytes]) -> None:
        """`key`: what SwiftCache calls a block of vLLM's, of a group."""
        self._key = key
        self.kinds: list[str] = []
        self.known: Known = set()
        self.deaf: Known = set()
        """The same for a router that is told of no removal."""
        self.wrong: list[str] = []

    def hear(self, events: Iterable[Any]) -> None:
        for event in events:
            kind, medium = type(event).__name__, getattr(event, "medium", None)
            if kind == "AllBlocksCleared":
                self.known, self.deaf = set(), set()
            elif not str(medium).startswith("SWIFTCACHE"):
                # vLLM's own.
                continue
            else:
                self._take(
                    kind, event, {(medium, self._key(name, event.group_idx).hex()) for name in event.block_hashes}
                )
            self.kinds.append(kind)

    def _take(self, kind: str, event: Any, blocks: Known) -> None:
        if len(blocks) != len(event.block_hashes):
            self.wrong.append(f"{kind} names a block twice")
        if kind == "BlockRemoved":
            if not blocks <= self.known:
                self.wrong.append("a block is removed that was not there")
            self.known -= blocks
            return
        if blocks & self.known:
            self.wrong.append("a block is stored that was there")
        counts = (len(event.token_ids), len(event.extra_keys))
        if counts != (len(blocks) * event.block_size, len(blocks)):
            self.wrong.append(f"{len(blocks)} blocks of {event.block_size} have {counts} tokens and extra keys")
        self.known |= blocks
        self.deaf |= blocks
