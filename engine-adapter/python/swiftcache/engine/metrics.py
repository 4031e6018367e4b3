"""Counters and gauges of an engine, and what they mean. Adapters publish them through the engine's own hooks.

Counters add up over steps and workers; of gauges the last value of each worker counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTERS = {
    "lookups": "Requests that were looked up on donors.",
    "lookup_tokens": "Tokens of the blocks that were looked up.",
    "promised_tokens": "Tokens that were to be loaded instead of computed.",
    "layer_wise_ends": "Asynchronous loads whose last layers came while the forward that needed them ran.",
    "claimed_loads": "Those of them that could not fail from the lookup on, and were part of the step that found them.",
    "failed_loads": "Loads of which a block was gone or lost; it was computed.",
    "hit_donor_blocks": "Blocks loaded that this engine wrote to a donor, over all workers.",
    "hit_shared_blocks": "Blocks loaded that another engine wrote, over all workers.",
    "hit_host_blocks": "Blocks loaded from the host tier, over all workers.",
    "failed_blocks": "Blocks that were found and then not loaded: revoked, evicted, or a copy failed.",
    "late_blocks": "Blocks thrown away because their copy ended after their pin.",
    "failed_operations": "Loads, stores and moves whose copies failed.",
    "stored_blocks": "Blocks written to a donor or the host tier.",
    "known_blocks": "Blocks that were offered and kept already.",
    "unplaced_blocks": "Blocks that there was no room for.",
    "evicted_blocks": "Blocks that made room for others.",
    "promoted_blocks": "Blocks that only the host tier had, stored on donors again.",
    "dropped_blocks": "Blocks lost to a revocation.",
    "moved_to_donor_blocks": "Blocks saved from a revocation, to another donor.",
    "moved_to_host_blocks": "Blocks saved from a revocation, to the host tier.",
    "revocations": "Slabs that donors took back.",
    "refused_leases": "Requests for a lease that were granted nothing.",
    "loaded_bytes": "Bytes loaded.",
    "stored_bytes": "Bytes stored.",
    "lends": "Runs of this engine's own blocks that it lent.",
    "give_backs": "Runs that came back.",
    "late_give_backs": "Runs that came back later than borrowers should take.",
    "give_back_ms": "Milliseconds between asking for runs and having them back.",
    "stitched_moves": "Parts of stitched pools that moved: their slab was asked back, or room came back.",
}
GAUGES = {
    "leased_bytes": "HBM leased from donors now.",
    "host_leased_bytes": "Host memory leased from donors now.",
    "leases": "Leases held now.",
    "routes_down": "Ways to a GPU's memory, or to host memory, on which copies fail: nothing is found or stored there.",
    "donor_blocks": "Blocks on donors now.",
    "host_blocks": "Blocks in the host tier now.",
    "connected": "Workers that are connected to the broker.",
    "open": "Workers whose cache is open.",
    "lent_blocks": "This engine's own blocks that are lent now.",
    "returning_blocks": "Blocks that are asked back and not back yet.",
    "give_back_max_ms": "The longest that a run took to come back, milliseconds.",
    "lent_bytes": "HBM of this engine on offer to others now.",
    "stranded_bytes": "HBM that was lent when the broker lost its records: out of use until the engine restarts.",
    "stitched_leased_bytes": "HBM leased for stitched pools now.",
    "stitched_floor_bytes": "Bytes of stitched pools that are in host memory now.",
}
LINKS = ("same_device", "nvlink", "pcie", "host")


class Tally:
    """What was counted since the last time, and the gauges of each worker. `data` is plain, so that it can cross
    processes in whatever form the engine's own statistics do."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = data or {}
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {"counters": {}, "gauges": {}}

    def add(self, name: str, value: float) -> None:
        if value:
            counters = self.data["counters"]
            counters[name] = counters.get(name, 0) + value

    def show(self, worker: str, gauges: Mapping[str, float]) -> None:
        self.data["gauges"][worker] = dict(gauges)

    def aggregate(self, other: Any) -> Any:
        """Adds another one's counts and takes over its gauges. Returns itself."""
        for name, value in other.data["counters"].items():
            self.add(name, value)
        self.data["gauges"].update(other.data["gauges"])
        return self

    def gauges(self) -> dict[str, float]:
        """Summed over workers."""
        return {name: sum(of.get(name, 0) for of in self.data["gauges"].values()) for name in GAUGES}

    def reduce(self) -> dict[str, int | float]:
        counters = self.data["counters"]
        shown = {name: counters[name] for name in COUNTERS if counters.get(name)}
        return {**shown, **({name: value for name, value in self.gauges().items()} if self.data["gauges"] else {})}

    def is_empty(self) -> bool:
        return not self.data["counters"] and not self.data["gauges"]


class Meter:
    """Turns a cache's running totals into what was added since it was last asked."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._before: dict[str, float] = {}

    def read(self, totals: Mapping[str, float], tally: Tally) -> None:
        totals = dict(totals)
        for what in ("loaded", "stored"):
            totals[f"{what}_bytes"] = sum(totals.get(f"{what}_{link}_bytes", 0) for link in LINKS)
        for name in COUNTERS:
            total, before = totals.get(name, 0), self._before.get(name, 0)
            tally.add(name, total - before if total >= before else total)
        tally.show(self._worker, {name: totals.get(name, 0) for name in GAUGES})
        self._before = totals
