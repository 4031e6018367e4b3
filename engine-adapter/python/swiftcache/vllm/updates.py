"""What changes in a running engine's worker, and no hook of a connector says: its weights, which files a LoRA adapter
was loaded from, and, before vLLM 0.33, that its pool goes to sleep.

KV of old weights must not be found under new ones, here or in another engine. So a worker counts the updates of its
weights. The scheduler, which names blocks, hears of each with the next report and makes other names from then on. What
it ordered before it knew is not carried out (`StepMetadata.weights`).

vLLM names an adapter by its name and path. Adapters that are written to one path in turn have the same name, so the
scheduler adds what it saw of the files (`Adapters`). The worker sees them when they are loaded, and if that was
something else, nothing is kept or loaded (`StoreJob.adapter`).

vLLM 0.32 takes a sleeping engine's pool away without a word. Copies under way would then read or write what is not
mapped.

vLLM has no hooks for these, so here are the functions of vLLM that SwiftCache wraps.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from swiftcache.engine.fingerprint import adapter as files_of
from swiftcache.vllm.metadata import Adapter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class Listener(Protocol):
    def weights_changed(self) -> None: ...

    def adapter_loaded(self, number: int, files: bytes) -> None:
        """`files` is empty when they changed while they were read."""

    def sleeps(self) -> None: ...

    def wakes(self) -> None: ...


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_WRAPPED = "_swiftcache_wrapped"
CALLS = ("reload_weights", "update_weights", "finish_weight_update", "reset_weights")
"""vLLM's own ways to other weights, methods of its workers."""


def watch(listener: Listener, config: VllmConfig) -> bool:
    """Has `listener` called after every attempt to update weights, and for every adapter that is loaded, in this
    process. False when this vLLM does not have what that takes."""
    try:
        from vllm.lora.worker_manager import WorkerLoRAManager
        from vllm.model_executor.model_loader.utils import get_model_cls
        from vllm.v1.worker.gpu_worker import Worker

        # Trainers' own worker extensions call the model.
        doors = [(Worker, name) for name in CALLS] + [(get_model_cls(config.model_config), "load_weights")]
        found = [(_update, owner, name, getattr(owner, name)) for owner, name in doors]
        found.append((_load_adapter, WorkerLoRAManager, "_load_adapter", WorkerLoRAManager._load_adapter))
        if not hasattr(KVConnectorBase_V1, "unregister_kv_caches"):
            found += [(_sleep, Worker, "sleep", Worker.sleep), (_wake_up, Worker, "wake_up", Worker.wake_up)]
    except (ImportError, AttributeError):
        return False
    for wrap, owner, name, call in found:
        if not hasattr(call, _WRAPPED):
            wrapped = functools.wraps(call)(wrap(call))
            setattr(wrapped, _WRAPPED, True)
            setattr(owner, name, wrapped)
    _listeners.add(listener)
    return True


def _update(call: Callable[..., Any]) -> Callable[..., Any]:
    def updating(*arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        finally:
            # Also after a failure: some of the weights may be new.
            for listener in list(_listeners):
                listener.weights_changed()

    return updating


def _load_adapter(call: Callable[..., Any]) -> Callable[..., Any]:
    def loading(self: Any, request: Any) -> Any:
        before = files_of(request.lora_path)
        loaded = call(self, request)
        files = files_of(request.lora_path)
        # Without any before, they were fetched on the way.
        files = files if before in (b"", files) else b""
        for listener in list(_listeners):
            listener.adapter_loaded(request.lora_int_id, files)
        return loaded

    return loading


def _sleep(call: Callable[..., Any]) -> Callable[..., Any]:
    def sleeping(*arguments: Any, **named: Any) -> Any:
        for listener in list(_listeners):
            listener.sleeps()
        return call(*arguments, **named)

    return sleeping


def _wake_up(call: Callable[..., Any]) -> Callable[..., Any]:
    def waking(self: Any, tags: list[str] | None = None) -> Any:
        result = call(self, tags)
        if tags is None or "kv_cache" in tags:
            for listener in list(_listeners):
                listener.wakes()
        return result

    return waking


class Adapters:
    """What the scheduler has seen of each adapter's files when it saw the adapter first. vLLM has a new number for an
    adapter that is loaded anew."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str, str], bytes] = {}
        self._last: dict[tuple[str, str], bytes] = {}

    def of(self, request: Request) -> Adapter | None:
        """The adapter of a request; None for the model itself."""
        lora = request.lora_request
        if lora is None:
            return None
        key = (lora.lora_int_id, lora.lora_name, lora.lora_path)
        files = self._seen.get(key)
        if not files:
            files = self._seen[key] = files_of(lora.lora_path)
        # vLLM loads such an adapter again at any time.
        return Adapter(lora.lora_int_id, b"" if getattr(lora, "load_inplace", False) else files)

    def is_another(self, request: Request, adapter: Adapter) -> bool:
        """Whether vLLM takes it for one that it had before, of which the files were others."""
        lora = request.lora_request
        name = (lora.lora_name, lora.lora_path)
        if not adapter.files:
            return False
        before, self._last[name] = self._last.get(name, adapter.files), adapter.files
        return before != adapter.files
