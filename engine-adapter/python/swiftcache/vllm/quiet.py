"""Trouble with the cache is a miss and a line in the log: no exception in the engine, and not a line each step."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.logger import init_logger

logger = init_logger(__name__)

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
