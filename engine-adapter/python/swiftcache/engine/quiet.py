"""Trouble with the cache is a miss and a line in the log: no exception in the engine, and not a line each step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("swiftcache")

PERIOD_SECONDS = 30.0


class Quiet:
    """Logs one warning for each kind of trouble per period, and how many it swallowed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def trouble(self, kind: str, what: object) -> None:
        now = self._clock()
        last, swallowed = self._seen.get(kind, (float("-inf"), 0))
        if now - last < PERIOD_SECONDS:
            self._seen[kind] = (last, swallowed + 1)
            return
        self._seen[kind] = (now, 0)
        more = f" ({swallowed} more since the last such line)" if swallowed else ""
        logger.warning("SwiftCache: %s: %s%s", kind, what, more)

    def attempt(self, kind: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what `call` returns, or None when it raises: nothing of the cache's may stop the engine."""
        try:
            return call(*arguments)
        except Exception as reason:
            self.trouble(kind, reason)
            return None


def log_as_part_of(engine: str) -> None:
    """Gives the log lines of this package the level, format and place of an engine's logger. What operators have set
    for the logger `swiftcache` itself stays as it is."""
    logger.parent = logging.getLogger(engine)
