"""Where this engine knows of tails, for prefixes whose end has none.

Full attention may reach further than any tail: since another request went on there, or because the broker has evicted
the end of what is stored. Which ends before it have tails, the broker is not asked: it answers how many of the first
blocks of a list there are, so that would be a question for every end. What this engine has kept or loaded itself, it
remembers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

ENDS = 65_536
"""As many ends are remembered: 10 MB at most."""
QUESTIONS = 4
"""As many earlier ends a lookup asks for: each is an RPC."""


class Ends:
    """By the hash of the block before an end, which names all tokens up to it."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def add(self, name: bytes) -> None:
        self._known[name] = None
        self._known.move_to_end(name)
        if len(self._known) > ENDS:
            self._known.popitem(last=False)

    def before(self, names: Iterator[tuple[int, bytes]]) -> Iterator[int]:
        """Ends to ask for, of those that are named, in their order."""
        left = QUESTIONS
        for end, name in names:
            if name in self._known:
                yield end
                left -= 1
                if not left:
                    return

    def forget(self, name: bytes) -> None:
        """A tail was not there."""
        self._known.pop(name, None)

    def clear(self) -> None:
        self._known.clear()
