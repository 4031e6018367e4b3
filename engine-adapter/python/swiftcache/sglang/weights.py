"""Weight updates of a running engine.

SGLang has its caches flushed after an update, unless it is asked not to. Then it serves old KV on new weights, as was
asked for; what must not happen is that other engines, which still have the old weights, are given KV of the new ones.
No hook of a linker says that weights have changed, so SGLang's own code is wrapped here, as it is in `waits` only.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_WRAPPED = "_swiftcache_wrapped"


def watch(listener: Any) -> bool:
    """Has `listener.weights_changed()` called after every attempt to update weights in this process. False when this
    SGLang does not have what that takes."""
    with contextlib.suppress(ImportError):
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Updater

        observe = getattr(Updater, "_observe_weight_load", None)
        if observe is None:
            return False
        if not hasattr(observe, _WRAPPED):
            wrapped = _wrap(observe)
            setattr(wrapped, _WRAPPED, True)
            Updater._observe_weight_load = wrapped
        _listeners.add(listener)
        return True
    return False


def _wrap(observe: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    @functools.wraps(observe)
    def observed(self: Any, source: str) -> Iterator[None]:
        try:
            with observe(self, source):
                yield
        finally:
            # Also after a failure: some of the weights may be new.
            for listener in list(_listeners):
                listener.weights_changed()

    return observed
