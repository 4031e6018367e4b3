"""Loads blocks from a donor as fast as it can: a cache and a pool, and no engine. `four.py` runs it."""

from __future__ import annotations

import hashlib
import random
import time
from typing import Any

import torch
from ground import Orders, eventually

from swiftcache import Cache, Connection


class Reader:
    """Its pool has room for all blocks twice: they are stored from one half and loaded into the other."""

    def begin(self, task: dict[str, Any]) -> None:
        layers, page, leased = task["layers"], task["page"], task["leased_bytes"]
        self._cuda = task["cuda"]
        # A slab ends with less than a block unused.
        self._count = leased // (layers * page) * 9 // 10
        self._blocks = 2 * self._count
        device = "cuda" if self._cuda else "cpu"
        self._pool = [torch.zeros(self._blocks, page // 8, dtype=torch.int64, device=device) for _ in range(layers)]
        for number, layer in enumerate(self._pool):
            # Every block of every layer has bytes of its own.
            layer[: self._count] = torch.arange(self._count, device=device)[:, None] * layers + number + 1
        self._connection = Connection(task["socket"], name=task["name"])
        self._cache = Cache(
            self._connection,
            namespace=task["name"],
            layer_bytes=[page] * layers,
            max_leased_bytes=leased,
            lease_step_bytes=leased,
            device=task["device"],
            backend="cuda" if self._cuda else "host",
            lookup_ms=60_000,
        )
        places = [(layer.data_ptr(), layer.numel() * 8, 0, page) for layer in self._pool]
        self._cache.register_pool(places, self._blocks, self._pool)
        if not self._cache.wait_open(120):
            raise RuntimeError(self._cache.problem())
        eventually("the leases", lambda: self._cache.stats()["leased_bytes"] >= leased)
        names = (hashlib.md5(f"{task['name']} {number}".encode()).digest() for number in range(self._count))
        self._keys = b"".join(names)
        self._order = list(range(self._count))
        random.Random(0).shuffle(self._order)
        marks = [self._mark()] * layers if self._cuda else []
        stored = self._cache.store(self._keys, list(range(self._count)), marks).finish()
        if stored["stored"] != self._count:
            raise RuntimeError(f"of {self._count} blocks {stored} were stored")

    def _mark(self) -> Any:
        return self._cache.mark(torch.cuda.current_stream().cuda_stream)

    def read(self, seconds: float) -> dict[str, Any]:
        """Loads all blocks, into scattered places, again and again. Their bytes are compared at the end."""
        into = [self._count + place for place in self._order]
        for layer in self._pool:
            layer[self._count :] = 0
        began, loads, wrong = time.perf_counter(), 0, 0
        while (took := time.perf_counter() - began) < seconds or not loads:
            load = self._cache.load(self._keys, into, self._mark() if self._cuda else None)
            wrong += len(load.finish())
            loads += 1
        order = torch.tensor(self._order, device=self._pool[0].device)
        for layer in self._pool:
            wrong += int((layer[self._count :][order] != layer[: self._count]).any(dim=1).sum())
        block = sum(layer[0].numel() * 8 for layer in self._pool)
        return {"bytes_per_second": loads * self._count * block / took, "loads": loads, "wrong": wrong}


if __name__ == "__main__":
    Orders().serve(Reader())
