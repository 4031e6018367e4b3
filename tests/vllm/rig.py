"""What tests do to the stitched pool of a worker, in the worker's process. Twins are made here: engines that are wrong
in one way."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import nullcontext
from typing import Any


def _parts() -> tuple[Any, Any]:
    """The worker's half of the connector, and the stitched pool."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    side = get_kv_transfer_group().worker
    return side, side._stitched


def look(worker: Any) -> dict[str, Any]:
    side, pool = _parts()
    return dict(pool.native.stats()) | {
        "blocks": pool.layout.blocks,
        "local_blocks": pool.layout.local_blocks,
        "laid_out": len(pool.layout.units),
        "homes": list(pool.native.homes()),
        "staged": side._staging.staged_layers,
        "inside": getattr(side, "moved_inside", None),
    }


def do(
    worker: Any,
    poison: bool = False,
    stale: bool = False,
    uncopied: bool = False,
    unguarded: bool = False,
    withdraw: int = 0,
) -> None:
    """
    Args:
        poison: a window is filled with NaNs as soon as a layer has read it.
        stale: nothing is copied into windows.
        uncopied: what a unit held is lost when it moves, as if it had not been copied.
        unguarded: units may move while the engine computes.
        withdraw: a donor, by its process. It is told to take its memory back in the middle of the next forward that
        uses a window, which goes on when the pool knows; unguarded, when a unit has moved. `inside` of `look` is how
        many have."""
    side, pool = _parts()
    staging = side._staging
    for name in ("_fill", "enter", "leave"):
        vars(staging).pop(name, None)
    vars(pool).pop("guarded", None)
    pool._native = getattr(pool._native, "native", pool._native)
    side.moved_inside = None
    if poison:
        leave = staging.leave

        def left() -> None:
            # The other window may have the next layer's blocks already.
            read = staging._home[0].pages if staging._home is not None else None
            leave()
            for window in staging._windows:
                if read is not None and window.data_ptr() == read.data_ptr():
                    window.fill_(float("nan"))

        staging.leave = left
    if stale:
        # Not NaNs: those would stay in the pool, and be read with weight 0.
        for window in staging._windows:
            window.zero_()
        staging._fill = lambda *arguments: None
    if uncopied:
        pool._native = Uncopied(pool)
    if unguarded:
        pool.guarded = nullcontext
    if withdraw:
        staging.enter = Midway(side, pool, withdraw, unguarded).enter


class Uncopied:
    """A pool whose units lose their bytes when they move."""

    def __init__(self, pool: Any) -> None:
        self.native, self._pool = pool._native, pool
        self._homes = self.native.homes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def begin_step(self) -> int:
        moved = self.native.begin_step()
        homes = self.native.homes()
        for unit, (before, now) in enumerate(zip(self._homes, homes, strict=True)):
            if before != now:
                address = self._pool._tensor.data_ptr() + self._pool.layout.units[unit]
                ctypes.memset(address, 0x3C, self._pool.native.unit_bytes)
        self._homes = homes
        return moved


class Midway:
    """In the middle of a forward a donor withdraws."""

    def __init__(self, side: Any, pool: Any, donor: int, waits_for_moves: bool) -> None:
        self._side, self._pool, self._donor, self._waits = side, pool, donor, waits_for_moves
        self._enter = side._staging.enter

    def enter(self, name: str) -> None:
        used = self._side._staging.staged_layers
        self._enter(name)
        if self._side._staging.staged_layers == used or not self._donor:
            return
        before = self._pool.native.stats()["moved_units"]
        os.kill(self._donor, signal.SIGTERM)
        self._donor = 0
        deadline = time.monotonic() + 120
        while not self._done(before):
            assert time.monotonic() < deadline, "the pool did not hear of it"
            time.sleep(0.001)  # lets other threads run
        self._side.moved_inside = self._pool.native.stats()["moved_units"] - before

    def _done(self, before: float) -> bool:
        stats = self._pool.native.stats()
        return stats["moved_units"] > before or (not self._waits and stats["to_vacate"] > 0)
