"""Whether others are worth a question, where the engine's own worker has nearly all of a prompt.

What it lacks is mostly what the user has just said, which nobody has, and the question takes a millisecond or two of
the time to the first token. It is worth that where requests of one conversation go to several engines. So it is asked
as long as it helps now and then.
"""

from __future__ import annotations

FEW_TOKENS = 512
"""Where more than so many are missing, the question is always asked: computing them takes ten times as long as asking,
and more (qwen3-8b on an H200: 21 ms beside 1.5; docs/benchmarks.md)."""
IN_VAIN = 8
"""After so many questions without more found there are few."""
EVERY = 16
"""Then one in so many is asked."""


class Others:
    def __init__(self) -> None:
        self._in_vain = 0
        """Questions since others last had more."""
        self._unasked = 0

    def worth_asking(self, missing: int) -> bool:
        """Whether to ask for so many tokens."""
        if not missing:
            return False
        if missing > FEW_TOKENS or self._in_vain < IN_VAIN:
            return True
        self._unasked = (self._unasked + 1) % EVERY
        return self._unasked == 0

    def answered(self, missing: int, more: bool) -> None:
        """Whether others had more, of so many tokens."""
        if more:
            self._in_vain = 0
        elif missing <= FEW_TOKENS:
            self._in_vain += 1
