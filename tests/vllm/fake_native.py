"""A stand-in for `swiftcache._native`: blocks in a dictionary, copies at once. For tests of the connector only."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import ClassVar

from swiftcache._native import DEFAULT_LOOKUP_MS, Loans  # noqa: F401  (they touch nothing: the real ones)

KEY = 16
published: dict[str, dict[bytes, list[bytes]]] = {}
calls: list[tuple] = []
hosts: dict[bytes, set[bytes]] = {}
"""Keys that a borrower keeps in its own host memory."""
lose: list[int] = []
"""Positions of the next load that fail."""
hold_stores = False
hold_loads = False
promises = True


def split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY] for at in range(0, len(keys), KEY)]


coming: list[tuple[int, int]] = []
"""What each of the next lookups hears of a disk: blocks up to which more are on their way, and for how long, ms."""


def on_disk(found: int, asked: int) -> tuple[int, int]:
    upto, milliseconds = coming.pop(0) if coming else (0, 0)
    return max(0, min(upto, asked) - found), milliseconds


class Connection:
    def __init__(self, socket: str, *, name: str, tenant: str = "") -> None:
        self.closed = False

    def count_hits(
        self,
        namespaces: Sequence[str],
        hashes: bytes,
        *,
        deadline_ms: int,
        borrowers: Sequence[bytes] | None = None,
    ) -> int:
        calls.append(("count_hits", tuple(namespaces), len(hashes) // KEY))
        ranks = list(zip(namespaces, borrowers or [b""] * len(namespaces), strict=True))
        count = 0
        for key in split(hashes):
            if not all(key in published.get(name, {}) or key in hosts.get(who, ()) for name, who in ranks):
                break
            count += 1
        return count

    def watch_index(self, namespaces: Sequence[str]) -> IndexWatch:
        return IndexWatch(namespaces)

    def count(
        self,
        namespaces: Sequence[str],
        hashes: bytes,
        *,
        deadline_ms: int,
        borrowers: Sequence[bytes] | None = None,
    ) -> tuple[int, int, int]:
        found = self.count_hits(namespaces, hashes, deadline_ms=deadline_ms, borrowers=borrowers)
        return found, *on_disk(found, len(hashes) // KEY)

    def close(self) -> None:
        self.closed = True


class IndexWatch:
    def __init__(self, namespaces: Sequence[str]) -> None:
        self.namespaces, self.told = namespaces, {}

    def name(self, hashes: bytes) -> None:
        for key in split(hashes):
            self.told.setdefault(key, False)

    def forget(self, hashes: bytes) -> list[tuple[bytes, bool, bool]]:
        return [(key, False, False) for key in split(hashes) if self.told.pop(key, False)]

    def take(self) -> list[tuple[bytes, bool, bool]]:
        now = {key: all(key in published.get(name, {}) for name in self.namespaces) for key in self.told}
        changes = [(key, False, found) for key, found in now.items() if found != self.told[key]]
        self.told = now
        return changes

    def close(self) -> None:
        self.told = {}


class Mark:
    def __init__(self, stream: int) -> None:
        self.stream = stream


class Load:
    def __init__(self, failed: list[int]) -> None:
        self.failed, self.waited, self.held, self.finished = failed, [], hold_loads, False

    def promise(self, most_bytes: int) -> bool:
        return promises and not self.failed

    def wait_layer(self, layer: int) -> list[int]:
        self.waited.append(layer)
        return self.failed

    def gate_layer(self, layer: int, stream: int) -> None:
        self.waited.append(layer)

    def is_done(self) -> bool:
        return not self.held

    def finish(self) -> list[int]:
        self.held, self.finished = False, True
        return self.failed


class Store:
    def __init__(self, blocks: int) -> None:
        self.blocks, self.held, self.finished = blocks, hold_stores, False

    def is_done(self) -> bool:
        return not self.held

    def finish(self) -> dict[str, int]:
        self.held, self.finished = False, True
        return {"stored": self.blocks, "known": 0, "unplaced": 0, "lost": 0}


class Claim:
    there: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    """Those that nobody has let go of."""

    def __init__(self, cache: Cache, keys: bytes) -> None:
        self.cache, self.keys = cache, keys
        self.there.add(self)

    def __len__(self) -> int:
        return len(self.keys) // KEY

    def load(self, blocks: Sequence[int], after: Mark | None = None) -> Load:
        assert 0 < len(blocks) <= len(self)
        return self.cache.load(self.keys[: len(blocks) * KEY], blocks, after)


class Cache:
    def __init__(self, connection: Connection, *, namespace: str, layer_bytes: Sequence[int], **more: object) -> None:
        assert 1 <= len(namespace.encode()) <= 256
        self.namespace, self.layer_bytes, self.more = namespace, list(layer_bytes), more
        self.blocks = published.setdefault(namespace, {})
        self.layers: list[tuple[int, int, int, int]] = []
        self.lent: dict[int, list[tuple[int, int]]] = {}
        self.returned: list[int] = []
        self.closed = False

    def register_pool(
        self,
        layers: Sequence[tuple[int, int, int, int]],
        blocks: int,
        owner: object,
        stream_pool: StreamPool | None = None,
    ) -> None:
        self.stream_pool = stream_pool
        for (_, size, offset, stride), page in zip(layers, self.layer_bytes, strict=True):
            assert offset + (blocks - 1) * stride + page <= size
        self.layers, self.count, self.owner = list(layers), blocks, owner

    def load(self, hashes: bytes, blocks: Sequence[int], after: Mark | None = None) -> Load:
        calls.append(("load", list(blocks), after))
        keys = split(hashes)
        assert len(keys) == len(blocks)
        failed = sorted(
            {i for i, key in enumerate(keys) if key not in self.blocks} | {i for i in lose if i < len(keys)}
        )
        lose.clear()
        for position, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            for number, (address, _, offset, stride) in enumerate(self.layers):
                place = address + offset + block * stride
                if position in failed:
                    ctypes.memset(place, 0x3C, self.layer_bytes[number])
                else:
                    ctypes.memmove(place, self.blocks[key][number], self.layer_bytes[number])
        return Load(failed)

    def claim(self, hashes: bytes, most_bytes: int) -> Claim | None:
        calls.append(("claim", len(hashes) // KEY))
        keys = split(hashes)
        there = next((at for at, key in enumerate(keys) if key not in self.blocks), len(keys))
        if not there or not promises or there * sum(self.layer_bytes) > most_bytes:
            return None
        return Claim(self, hashes[: there * KEY])

    def mark(self, stream: int) -> Mark:
        return Mark(stream)

    def store(self, hashes: bytes, blocks: Sequence[int], marks: Sequence[Mark] = ()) -> Store:
        calls.append(("store", list(blocks), list(marks)))
        keys = split(hashes)
        assert len(keys) == len(blocks)
        assert not marks or len(marks) == len(self.layers)
        for key, block in zip(keys, blocks, strict=True):
            self.blocks.setdefault(
                key,
                [
                    ctypes.string_at(address + offset + block * stride, self.layer_bytes[number])
                    for number, (address, _, offset, stride) in enumerate(self.layers)
                ],
            )
        return Store(len(keys))

    def lend(self, loan: int, ranges: Sequence[tuple[int, int]], after: Mark | None = None) -> None:
        self.lent[loan] = list(ranges)

    def take_back(self, loans: Sequence[int]) -> None:
        self.returned += [loan for loan in loans if self.lent.pop(loan, None)]

    def returned_loans(self) -> list[int]:
        returned, self.returned = self.returned, []
        return returned

    def lend_problem(self) -> str:
        return ""

    def stats(self) -> dict[str, float]:
        return {"stored_blocks": float(len(self.blocks)), "open": 1.0, "connected": 1.0}

    def close(self) -> None:
        self.closed = True


class StreamPool:
    """A stitched pool of which all memory is this process's. Nothing moves; `due` units count as moved at the next
    step."""

    unit_bytes = 4096
    granularity = 256
    device = "SIM-0"
    most = 8
    """Slabs that donors have."""

    def __init__(self, connection: Connection, *, namespace: str, stream_bytes: int, **more: object) -> None:
        assert 1 <= len(namespace.encode()) <= 256
        self.units = min(stream_bytes // self.unit_bytes, self.most)
        if self.units == 0:
            raise RuntimeError("no slab could be leased: start donors")
        self.more, self.namespace = more, namespace
        self.inside, self.due, self.moved = 0, 0, 0
        self.laid_out: list[tuple[int, int]] = []
        self.broken = self.closed = False

    def lay_out(self, tensors: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        assert not self.laid_out and sum(units for _, units in tensors) <= self.units
        self.laid_out = list(tensors)
        sizes = [size - units * self.unit_bytes for size, units in tensors]
        locals = [-(-size // self.granularity) * self.granularity for size in sizes]
        assert all(local > 0 for local in locals)
        self.memory = (ctypes.c_char * (sum(locals) + sum(units for _, units in tensors) * self.unit_bytes))()
        found, at = [], ctypes.addressof(self.memory)
        for (size, units), local in zip(tensors, locals, strict=True):
            found.append((at, size, local))
            at += local + units * self.unit_bytes
        return found

    def begin_step(self) -> int:
        if self.broken:
            raise RuntimeError("a unit is mapped nowhere")
        self.inside += 1
        calls.append(("begin_step", self.inside))
        moved, self.due = (self.due, 0) if self.inside == 1 else (0, self.due)
        self.moved += moved
        return moved

    def end_step(self, stream: int) -> None:
        assert self.inside > 0
        self.inside -= 1
        calls.append(("end_step", stream))

    def stats(self) -> dict[str, float]:
        return {
            "unit_bytes": float(self.unit_bytes),
            "leased_bytes": float(self.units * self.unit_bytes),
            "floor_bytes": float(self.units * self.unit_bytes),
            "on_floor": 1.0,
            "moved_units": float(self.moved),
        }

    def close(self) -> None:
        self.closed = True
