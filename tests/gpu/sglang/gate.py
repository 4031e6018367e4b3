"""Checks SGLang's layer gate with PyTorch alone: SGLang need not be there, the wheel of `make wheel` must.

A pool like SGLang's (K and V of a layer in one allocation, a page after the other) is filled, stored on a donor,
poisoned, and loaded again. Loads begin late: behind work that keeps a stream of their own busy for a second. Meanwhile
a forward reads layer after layer on two streams in turns, as soon as the gate lets it. Every byte that it read must be
what was stored.

The control does the same without asking the gate. It must read poison: otherwise loads were not late, and the run shows
nothing. And the gate must have noticed that the forward did not ask.

    gate.py --programs target/release [--rounds 20]
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "torch_engine"))

from machine import Machine, eventually, options, started

from swiftcache import Cache, Connection
from swiftcache.engine.layout import Layout, layout_of
from swiftcache.engine.quiet import Quiet
from swiftcache.sglang.gate import LayerGate
from swiftcache.sglang.layout import gates

PAGE, HEADS, WIDTH, LAYERS = 64, 8, 128, 24
SEQUENCE = 24
"""Pages that are stored, and loaded into as many others."""
BLOCKS = 3 * SEQUENCE
POISON = float("nan")
LATE = 1_500_000_000
"""Cycles: about a second."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        print(f"FAILED: {what}")
        sys.exit(1)


class Stage:
    """An engine's pool, its cache, and its streams."""

    def __init__(self, machine: Machine, connection: Connection, leased: int) -> None:
        self.cuda = machine.cuda
        device = "cuda:0" if self.cuda else "cpu"
        shape = (2, BLOCKS * PAGE, HEADS, WIDTH)
        self.pool = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(LAYERS)]
        self.layout: Layout = layout_of({str(number): list(kv) for number, kv in enumerate(self.pool)}, BLOCKS)
        self.streams = [torch.cuda.Stream() for _ in range(2)] if self.cuda else [None, None]
        self.before = torch.cuda.Stream() if self.cuda else None
        self.cache = Cache(
            connection,
            namespace="the gate's check",
            layer_bytes=[entry.page for entry in self.layout.entries],
            max_leased_bytes=leased,
            lease_step_bytes=leased,
            device=machine.devices[0],
            backend="cuda" if self.cuda else "host",
        )
        self.cache.register_pool([entry.place() for entry in self.layout.entries], BLOCKS, self.pool)
        if not self.cache.wait_open(120) or self.cache.problem():
            raise RuntimeError(f"the cache is not open: {self.cache.problem()}")
        eventually("the leases", lambda: self.cache.stats()["leases"])
        self.gate = LayerGate(gates(self.layout), self._computing, Quiet())

    def _computing(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.cuda else 0

    def on(self, number: int) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.streams[number % 2]) if self.cuda else contextlib.nullcontext()

    def pages(self, blocks: range, layer: int) -> torch.Tensor:
        return self.pool[layer][:, blocks.start * PAGE : blocks.stop * PAGE]

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def late(self) -> object:
        """A mark after which copies may start, a second from now."""
        if not self.cuda:
            return None
        with torch.cuda.stream(self.before):
            torch.cuda._sleep(LATE)
        return self.cache.mark(self.before.cuda_stream)


def keys(round_number: int) -> bytes:
    return b"".join(f"{round_number:08d}{page:08d}".encode() for page in range(SEQUENCE))


def stored(stage: Stage, round_number: int) -> list[torch.Tensor]:
    """Computes pages of random bytes, stores them, and returns what they are."""
    source, want = range(SEQUENCE), []
    for layer in range(LAYERS):
        stage.pages(source, layer).normal_()
        want.append(stage.pages(source, layer).clone())
    stage.settle()
    outcome = stage.cache.store(keys(round_number), list(source)).finish()
    expect(outcome["stored"] == SEQUENCE, f"all pages are stored: {outcome}")
    return want


def forward(stage: Stage, round_number: int, *, asks: bool) -> tuple[list[torch.Tensor], bool]:
    """Loads the pages into poisoned ones, and reads them as a forward would. Returns what it read, and the gate's
    word."""
    target = range(SEQUENCE, 2 * SEQUENCE)
    for layer in range(LAYERS):
        stage.pages(target, layer).fill_(POISON)
    read = [torch.empty_like(stage.pages(target, layer)) for layer in range(LAYERS)]
    stage.settle()
    hit = stage.cache.lookup(keys(round_number))
    expect(len(hit) == hit.own_blocks == SEQUENCE, f"all pages are found: {len(hit)}, {hit.own_blocks} own")
    load = hit.load(list(target), stage.late())
    expect(load.missing() == [], "no page is missing")
    index = stage.gate.begin([load], layer_wise=True)
    stage.gate.set_consumer(index)
    for layer in range(LAYERS):
        with stage.on(layer):
            if asks:
                # As SGLang does: once for K, once for V.
                stage.gate.wait_until(layer)
                stage.gate.wait_until(layer)
            read[layer].copy_(stage.pages(target, layer), non_blocking=True)
    if stage.cuda:
        expect(not load.is_done(), "copies are late; a slower machine needs a larger LATE")
    stage.gate.set_consumer(-1)
    right = stage.gate.finish(index)
    stage.settle()
    return read, right


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with started(arguments) as machine:
        block = 2 * LAYERS * PAGE * HEADS * WIDTH * 2
        slab = (SEQUENCE + 2) * block
        machine.start_donor(machine.devices[-1], rounds + 2, slab)
        with contextlib.closing(Connection(machine.socket, name="the gate's check")) as connection:
            stage = Stage(machine, connection, (rounds + 2) * slab)
            # The first pass loads and compiles what later passes use.
            stored(stage, 0)
            forward(stage, 0, asks=True)
            for number in range(1, rounds + 1):
                want = stored(stage, number)
                read, right = forward(stage, number, asks=True)
                wrong = [layer for layer in range(LAYERS) if not torch.equal(read[layer], want[layer])]
                expect(not wrong, f"round {number}: layers {wrong} were read before they were there")
                expect(right, f"round {number}: the gate says that all was waited for")
            print(f"{rounds} rounds: {LAYERS} layers, read on two streams, each right when the gate let it be read")
            expect(stage.gate.proven, "the gate has seen forwards that wait")

            want = stored(stage, rounds + 1)
            read, right = forward(stage, rounds + 1, asks=False)
            expect(not right and not stage.gate.proven, "a forward that does not ask is noticed")
            early = [layer for layer in range(LAYERS) if not torch.equal(read[layer], want[layer])]
            if machine.cuda:
                expect(bool(early), "the control reads poison: without that, this run shows nothing")
                print(
                    f"control: without the gate {len(early)} of {LAYERS} layers were read too early, and it was noticed"
                )
            else:
                print("control: a forward that does not ask was noticed; no GPU, so nothing is late")
            stage.cache.close()
    print(f"gates hold: {machine.name}, {machine.way}")


if __name__ == "__main__":
    main()
