"""Measures how much slower a donor's neighbour is while a borrower reads KV from the HBM of the neighbour's GPU.

The neighbour is a separate process on the donor's GPU. Half of its rounds run alone, half while the borrower loads
prefixes without a pause. Its work is either matrix products, which bound prefill, or passes over memory, which bound
decode. With two GPUs that reach each other, the borrower computes on the other GPU. With one GPU, the borrower shares
the neighbour's GPU, which no deployment does.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import threading
import time

import torch
from engine import Engine
from machine import Machine, options, started
from model import SHAPES, Model

from swiftcache import Connection

PREFIX = 1024
"""Blocks of the prefix that is loaded again and again: 16,384 tokens."""
WORK = ("matrix products", "passes over memory")
KERNELS = 600
"""Kernels of one round. They take about a second at most."""


def neighbour(device: torch.device) -> None:
    """Runs in the other process: for each line of input, runs one round of that work and prints its milliseconds."""
    side = 8192 if device.type == "cuda" else 64
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    into = torch.empty_like(left)
    memory = torch.zeros((1 << 30) if device.type == "cuda" else (1 << 12), dtype=torch.int8, device=device)
    kernels = {"matrix products": lambda: torch.mm(left, right, out=into), "passes over memory": lambda: memory.add_(1)}
    for line in sys.stdin:
        work = line.strip()
        began = time.perf_counter()
        for _ in range(KERNELS):
            kernels[work]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print((time.perf_counter() - began) * 1e3, flush=True)


class CopyLoad:
    """Makes the borrower load prefixes in a thread, as long as this context is open."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.loaded, self._over = engine, 0, threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        blocks = self.engine.blocks(PREFIX, PREFIX)
        # One at least: where others keep the processors busy, a round may be over before this thread begins.
        while not self.loaded or not self._over.is_set():
            if self.engine.load(1, blocks).finish():
                raise RuntimeError("blocks failed to load")
            self.loaded += PREFIX * sum(self.engine.model.layer_bytes())

    def __enter__(self) -> "CopyLoad":
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._over.set()
        self._thread.join()


def measure(arguments: argparse.Namespace, machine: Machine) -> list[dict[str, object]]:
    device = torch.device(arguments.device)
    model = Model(SHAPES[arguments.shape], 3 * PREFIX, device)
    slab = max(64 * sum(model.layer_bytes()), 1 << 20)
    slabs = PREFIX * sum(model.layer_bytes()) // slab + 2
    machine.start_donor(machine.devices[-1], slabs, slab)
    connection = Connection(machine.socket, name="a PyTorch engine")
    engine = Engine(model, connection, machine.devices[0], leased_bytes=slabs * slab)
    stored = engine.prefill_and_store(1, engine.blocks(0, PREFIX)).finish()
    if stored["stored"] != PREFIX:
        raise RuntimeError(f"stored {stored}")
    command = [sys.executable, __file__, "--neighbour", machine.last]
    rows = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def round_of(work: str) -> float:
            process.stdin.write(f"{work}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        for work in WORK:
            round_of(work)
            alone, beside, rates = [], [], []
            for _ in range(arguments.rounds):
                alone.append(round_of(work))
                with CopyLoad(engine) as load:
                    beside.append(round_of(work))
                rates.append(load.loaded / beside[-1] / 1e6)
            ratios = [one / other for one, other in zip(beside, alone, strict=True)]
            rows.append(
                {
                    "work": work,
                    "alone_ms": statistics.median(alone),
                    "beside_ms": statistics.median(beside),
                    "slowdown": statistics.median(ratios),
                    "slowdown_range": [min(ratios), max(ratios)],
                    "read_gb_per_s": statistics.median(rates),
                }
            )
        process.stdin.close()
    engine.cache.close()
    connection.close()
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file too")
    parser.add_argument("--neighbour", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.neighbour:
        return neighbour(torch.device(arguments.neighbour))
    with started(arguments) as machine:
        rows = measure(arguments, machine)
    print(f"{machine.name}; the neighbour's memory is read from: {machine.way}; medians of {arguments.rounds} rounds")
    print("| the neighbour's work | its time, relative to alone | read from its HBM meanwhile |")
    print("| --- | ---: | ---: |")
    for row in rows:
        low, high = row["slowdown_range"]
        print(f"| {row['work']} | {row['slowdown']:.3f} ({low:.3f} to {high:.3f}) | {row['read_gb_per_s']:.0f} GB/s |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"reader": machine.way, "rows": rows}, indent=2) + "\n")


main()
