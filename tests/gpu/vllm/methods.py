"""Where a turn's time to the first token goes in an engine that is a server: what `watched` noted of it, beside what
the client saw."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

FILE = "SWIFTCACHE_BENCH_NOTES"
"""The environment variable that says to `watched` where its notes go."""

ROWS = [
    "first token",
    "until the engine's process has the request",
    "decoded and hashed, by a thread of its own",
    "until it is scheduled",
    "schedule",
    "  of it the lookup",
    "  of it a load's beginning",
    "  of it the step's metadata",
    "queueing the forward",
    "  of it starting loads",
    "  of it having layers wait",
    "  of it starting stores",
    "from there to the token",
    "the forward, on the GPU",
]


def notes(file: Path) -> dict[str, dict[str, Any]]:
    """What was noted of each request, by what it is."""
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        note = json.loads(line)
        # A request that has been preempted is scheduled again: its first token came of the first time.
        found.setdefault(note["request"], {}).setdefault(note["what"], note)
    return found


def complete(noted: dict[str, Any]) -> bool:
    """Whether all that a turn's rows are made of was noted."""
    return {"hashed", "schedule", "forward"} <= noted.keys()


def rows(turn: dict[str, Any], noted: dict[str, Any]) -> dict[str, float]:
    """A turn's `ROWS`, milliseconds."""
    hashed, schedule, forward = noted["hashed"], noted["schedule"], noted["forward"]
    first = turn["began"] + turn["first_ms"] / 1e3
    seconds = [
        first - turn["began"],
        hashed["began"] - turn["began"],
        hashed["took"],
        schedule["began"] - hashed["began"] - hashed["took"],
        schedule["took"],
        schedule["parts"]["lookup"],
        schedule["parts"]["load begins"],
        schedule["parts"]["metadata"],
        forward["took"],
        forward["parts"]["loads start"],
        forward["parts"]["layers wait"],
        forward["parts"]["stores start"],
        first - forward["began"] - forward["took"],
        forward.get("gpu", 0.0),
    ]
    return {name: 1e3 * one for name, one in zip(ROWS, seconds, strict=True)}


def table(rounds: dict[str, dict[str, Any]]) -> str:
    """Medians of the turns of each arm and load. `rounds`: by arm, what the bench measured, each turn with its rows."""
    columns: dict[str, list[dict[str, float]]] = {}
    for arm, loads in rounds.items():
        for load, of in loads.items():
            known = [turn["methods"] for turn in of["turns"] if "methods" in turn]
            if known:
                columns[f"{arm}, {load}"] = known
    if not columns:
        return "nothing was noted of methods"
    lines = [f"| ms | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in ROWS:
        medians = (statistics.median(turn[name] for turn in turns) for turns in columns.values())
        lines.append(f"| {name} | {' | '.join(f'{median:.2f}' for median in medians)} |")
    return "\n".join(lines)
