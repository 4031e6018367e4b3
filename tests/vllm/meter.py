"""How long a step spends in a connector: the time of its hooks, both sides', added up.

A difference of two engines' step times is lost in a busy machine's noise; this is not. It leaves out what vLLM itself
does for a connector, and what a connector's own threads take from the machine.
"""

from __future__ import annotations

import inspect
import time
from typing import Any


class Meter:
    def __init__(self) -> None:
        self.by_hook: dict[str, float] = {}
        """Seconds in each hook."""
        self._inside = False

    @property
    def seconds(self) -> float:
        """In all of them."""
        return sum(self.by_hook.values())

    def around(self, connector: Any) -> None:
        """Counts every hook of this connector from now on."""
        for name in dir(type(connector)):
            if not name.startswith("_") and inspect.isfunction(_defined(connector, name)):
                setattr(connector, name, self._counted(name, getattr(connector, name)))

    def _counted(self, name: str, hook: Any) -> Any:
        self.by_hook.setdefault(name, 0.0)

        def counted(*arguments: Any, **named: Any) -> Any:
            # A hook that calls another one is counted once.
            if self._inside:
                return hook(*arguments, **named)
            self._inside = True
            began = time.perf_counter()
            try:
                return hook(*arguments, **named)
            finally:
                self.by_hook[name] += time.perf_counter() - began
                self._inside = False

        return counted


def _defined(connector: Any, name: str) -> Any:
    return next(vars(kind)[name] for kind in type(connector).__mro__ if name in vars(kind))
