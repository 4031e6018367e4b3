"""The stitched pool of this worker process.

The worker opens it when vLLM asks how much memory there is for the KV cache, and the connector has vLLM take it when
vLLM allocates the KV cache. Between the two is one process, in which they find it here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from swiftcache.engine.quiet import logger
from swiftcache.engine.stitch import Grain, Shape, Stitch, capacity, cost, pieces, stitch

if TYPE_CHECKING:
    from swiftcache._native import Connection, StreamPool
    from swiftcache.engine.settings import Settings

PATIENCE_SECONDS = 60.0
"""How long leases may take when the engine starts."""


class StitchedPool:
    def __init__(self, settings: Settings, *, name: str, namespace: str) -> None:
        """`name` and `namespace`: for people, in status and quotas."""
        self._settings, self._name, self._namespace = settings, name, namespace
        self._connection: Connection | None = None
        self._native: StreamPool | None = None
        self._shape: Shape | None = None
        self._grain: Grain | None = None
        self._local = 0
        self._window = 0
        self._tensor: torch.Tensor | None = None
        self.layout: Stitch | None = None
        self.device: torch.device | None = None

    # Before vLLM knows how large its KV cache is.

    def open(self, local: int, shape: Shape, *, page: int, device: torch.device) -> int:
        """Leases. `local`: bytes of this worker's own memory for the KV cache; `page`: bytes of a layer's block.
        Returns how many bytes vLLM can have, leased ones too. Raises ValueError for settings that cannot work,
        RuntimeError when the leases or the host memory behind them cannot be had."""
        from swiftcache import _native

        settings, self.device, self._shape = self._settings, device, shape
        self._window = settings.stream_window_bytes // page * page
        self._local = local - 2 * self._window
        if self._window == 0 or self._local <= 0:
            raise ValueError(
                f"stream_window_bytes is {settings.stream_window_bytes}, and two such windows do not fit beside "
                f"{local} bytes of local KV cache whose layers have blocks of {page} bytes. Choose another size"
            )
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
        self._connection = _native.Connection(settings.socket, name=self._name, tenant=settings.tenant)
        self._native = _native.StreamPool(
            self._connection,
            namespace=self._namespace,
            stream_bytes=settings.stream_bytes,
            spare_units=settings.stream_spare_units,
            device=settings.device or gpu,
            backend="host" if settings.backend == "auto" and gpu is None else settings.backend,
            step_ms=float(settings.stream_step_ms),
            patience_s=PATIENCE_SECONDS,
        )
        self._grain = Grain(self._native.unit_bytes, self._native.granularity)
        self._local -= settings.stream_spare_units * self._grain.unit
        try:
            return capacity(self._local, self._native.units, shape, self._grain)
        except ValueError:
            self.close()
            raise

    @property
    def native(self) -> StreamPool:
        assert self._native is not None, "the stitched pool is not open"
        return self._native

    # When vLLM allocates it.

    def allocation(self, size: int) -> TorchFunctionMode:
        """A context in which vLLM's KV cache of `size` bytes is this pool."""
        return Allocation(size, self._take)

    def _take(self, size: int) -> torch.Tensor:
        assert self._shape is not None and self._grain is not None and self.device is not None
        if self._tensor is not None:
            raise RuntimeError("SwiftCache: vLLM allocates its KV cache twice, which a stitched pool does not serve")
        self.layout = stitch(size, self._local, self.native.units, self._shape, self._grain)
        laid_out = self.native.lay_out(pieces(size, self.layout, self._grain))
        for (address, length, _), (following, _, _) in pairwise(laid_out):
            assert address + length == following, "the pool's pieces do not lie side by side"
        self._tensor = as_tensor(laid_out[0][0], size, self.device, self.native)
        return self._tensor

    def windows(self, pages: torch.Tensor) -> list[torch.Tensor]:
        """Two local windows for pages like these of a layer, as many as the setting has room for."""
        shape, strides = list(pages.shape), list(pages.stride())
        elements = 1
        for length in shape[1:]:
            elements *= length
        shape[0] = min(shape[0], self._window // (elements * pages.element_size()))
        strides[0] = elements
        return [torch.empty_strided(shape, strides, dtype=pages.dtype, device=pages.device) for _ in range(2)]

    def say(self, *, block_tokens: int, longest: int, speed: float) -> None:
        """Tells people what they have. `longest`: tokens of the longest context that the engine accepts; `speed`: at
        which leased blocks are read, bytes a second."""
        assert self.layout is not None and self._shape is not None
        stats, layout = self.native.stats(), self.layout
        # One block is vLLM's placeholder.
        fit, local = (layout.blocks - 1) * block_tokens, max(0, layout.local_blocks - 1) * block_tokens
        tokens = min(longest, fit)
        remote = cost(tokens, block_tokens, layout, self._shape, reserved=1)
        logger.info(
            "SwiftCache: stitched pool: %d tokens fit, %.1f times the %d that are local; at %d tokens a new token "
            "reads %d bytes of neighbours' memory, %s; %d bytes are leased, and as many of host memory (%d) are held "
            "for what is taken back",
            fit,
            fit / max(1, local),
            local,
            tokens,
            remote,
            f"about {remote / speed * 1e3:.2f} ms at the {speed / 1e9:.0f} GB/s that were measured now",
            stats.get("leased_bytes", 0),
            stats.get("floor_bytes", 0),
        )

    def totals(self) -> dict[str, float]:
        """Counters and gauges, by their names in `engine.metrics`."""
        stats = self.native.stats()
        return {
            "stitched_moves": stats.get("moved_units", 0.0),
            "stitched_leased_bytes": stats.get("leased_bytes", 0.0),
            "stitched_floor_bytes": stats.get("on_floor", 0.0) * stats.get("unit_bytes", 0.0),
        }

    # Steps.

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Nothing moves inside, nor before what is queued inside is over."""
        if self._native is None:
            yield
            return
        self._native.begin_step()
        try:
            yield
        finally:
            self._native.end_step(self._stream())

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device is not None and self.device.type == "cuda" else 0

    def close(self) -> None:
        """The engine touches it no more."""
        if self._native is not None:
            self._native.close()
        if self._connection is not None:
            self._connection.close()
        self._native = self._connection = self._tensor = None


class Allocation(TorchFunctionMode):
    """Answers the one `torch.zeros` of the KV cache."""

    def __init__(self, size: int, take: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._size, self._take_bytes, self._taken = size, take, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and args == (self._size,) and kwargs.get("dtype") is torch.int8:
            self._taken = True
            return self._take_bytes(self._size)
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)
        if kind is None and not self._taken:
            raise RuntimeError(
                f"this vLLM did not allocate its KV cache as one tensor of {self._size} bytes; SwiftCache's stitched "
                "pool knows vLLM 0.32 and 0.33. Drop stream_bytes and --worker-cls"
            )


class _Range:
    """Addresses, as PyTorch takes them on CUDA. Keeps the pool."""

    def __init__(self, address: int, size: int, pool: object) -> None:
        self._pool = pool
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|i1",
            "data": (address, False),
            "version": 3,
        }


def as_tensor(address: int, size: int, device: torch.device, owner: object) -> torch.Tensor:
    """Bytes at an address, which `owner` keeps mapped."""
    if device.type == "cuda":
        return torch.as_tensor(_Range(address, size, owner), device=device)
    buffer = (ctypes.c_int8 * size).from_address(address)
    buffer._owner = owner
    return torch.frombuffer(buffer, dtype=torch.int8)


_current: StitchedPool | None = None


def stitched_pool(settings: Settings) -> StitchedPool | None:
    """What vLLM's KV cache of this process is to lie in, None for vLLM's own memory. Raises ValueError when the
    settings want a stitched pool and the worker is one that has none."""
    if settings.stream_bytes and _current is None:
        raise ValueError(
            "stream_bytes needs --worker-cls swiftcache.vllm.StreamWorker, with SwiftCacheConnector as the only "
            "connector: vLLM's own worker does not say that there is more memory than its own"
        )
    return _current if settings.stream_bytes else None


def use(pool: StitchedPool | None) -> None:
    global _current
    _current = pool
