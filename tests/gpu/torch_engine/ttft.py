"""Measures the time to the first token of a conversation's next turn on this machine's GPUs, for each place where the
prefix of the turn can be.

The model is a PyTorch decoder with the shapes of a real model and random weights. It runs eagerly on one GPU, with its
KV in a paged pool. A turn begins when the GPU is idle. It is timed from the request, lookup included, to the hidden
state of the last token. Arms:

  computed     the prefix is computed again, in chunks of 8,192 tokens
  host memory  it is loaded from pinned host memory over PCIe, layer by layer while the turn computes
  donor        it is loaded in the same way from another process's HBM: on a second GPU if one is in reach, else on this
               one
  resident     it is already in the engine's own pool: no cache can be faster

In every run, the loaded bytes are compared with the computed ones, bit by bit.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from engine import Engine
from machine import Machine, options, started
from model import BLOCK_TOKENS, SHAPES, Model

from swiftcache import Connection


def milliseconds(engine: Engine, turn: Callable[[], object]) -> float:
    engine.synchronize()
    began = time.perf_counter()
    turn()
    engine.synchronize()
    return (time.perf_counter() - began) * 1e3


class Arm:
    """An engine that keeps its prefixes in one place."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine
        self.calls: list[float] = []
        """Milliseconds of the lookup and of queueing the copies. The turn's first kernel is queued after them."""

    def keep(self, prefix: int) -> torch.Tensor:
        """Computes a prefix and stores it. Returns its KV."""
        home = self.engine.blocks(0, prefix)
        outcome = self.engine.prefill_and_store(prefix, home).finish()
        if outcome["stored"] + outcome["known"] != prefix:
            sys.exit(f"{self.name}: {outcome} of {prefix} blocks")
        return self.engine.model.kv(home)

    def turn(self, prefix: int, tokens: torch.Tensor, right: torch.Tensor) -> float:
        model, blocks = self.engine.model, prefix + len(tokens) // BLOCK_TOKENS
        own = self.engine.blocks(blocks, blocks)
        table, away = self.engine.table(own), own[:prefix]
        for layer in model.pool:
            layer.index_fill_(1, table[:prefix], -1)
        loads = []

        def loaded() -> torch.Tensor:
            began = time.perf_counter()
            loads.append(self.engine.load(prefix, away))
            self.calls.append((time.perf_counter() - began) * 1e3)
            return self.engine.next_turn(tokens, table, loads[0])

        took = milliseconds(self.engine, loaded)
        if loads[0].finish() or not torch.equal(model.kv(away), right):
            sys.exit(f"{self.name}: wrong or missing bytes")
        return took


def computed(engine: Engine, prefix: int, tokens: torch.Tensor) -> float:
    blocks = prefix + len(tokens) // BLOCK_TOKENS
    table = engine.table(engine.blocks(0, blocks))
    everything = torch.cat([engine.model.tokens(prefix, prefix * BLOCK_TOKENS), tokens])
    return milliseconds(engine, lambda: engine.model.prefill_in_chunks(everything, table))


def resident(engine: Engine, prefix: int, tokens: torch.Tensor) -> float:
    table = engine.table(engine.blocks(0, prefix + len(tokens) // BLOCK_TOKENS))
    return milliseconds(engine, lambda: engine.next_turn(tokens, table, None))


def measure(arguments: argparse.Namespace, machine: Machine) -> list[dict[str, object]]:
    device = torch.device(arguments.device)
    shape = SHAPES[arguments.shape]
    longest = max(arguments.tokens) // BLOCK_TOKENS + arguments.turn // BLOCK_TOKENS
    model = Model(shape, -(-2 * longest // 3) * 3, device)
    needed = sum(arguments.tokens) // BLOCK_TOKENS * sum(model.layer_bytes())
    slab = max(64 * sum(model.layer_bytes()), 1 << 20)
    slabs = needed // slab + 2
    machine.start_donor(machine.devices[-1], slabs, slab)
    connection = Connection(machine.socket, name="a PyTorch engine")
    places = {
        f"donor ({machine.way})": {"leased_bytes": slabs * slab},
        "host memory": {"leased_bytes": 0, "host_bytes": slabs * slab},
    }
    arms = [
        Arm(name, Engine(model, connection, machine.devices[0], namespace=name, **place))
        for name, place in places.items()
    ]
    rows = []
    for count in arguments.tokens:
        prefix = count // BLOCK_TOKENS
        tokens = model.tokens(7, arguments.turn)
        right = [arm.keep(prefix) for arm in arms]
        times: dict[str, list[float]] = {}
        # The first round warms up. The arms take turns, so that a slow moment of the machine slows all of them.
        for round_ in range(arguments.rounds + 1):
            took = {arm.name: arm.turn(prefix, tokens, kv) for arm, kv in zip(arms, right, strict=True)}
            took["computed"] = computed(arms[0].engine, prefix, tokens)
            took["resident"] = resident(arms[0].engine, prefix, tokens)
            print(f"{count} tokens, round {round_} of {arguments.rounds}", file=sys.stderr)
            if round_:
                for name, one in took.items():
                    times.setdefault(name, []).append(one)
        medians = {name: statistics.median(some) for name, some in times.items()}
        spread = {name: [min(some), max(some)] for name, some in times.items()}
        calls = {arm.name: statistics.median(arm.calls[-arguments.rounds :]) for arm in arms}
        rows.append(
            {
                "prefix_tokens": count,
                "turn_tokens": arguments.turn,
                "ttft_ms": medians,
                "range_ms": spread,
                "load_call_ms": calls,
            }
        )
    for arm in arms:
        arm.engine.cache.close()
    connection.close()
    return rows


def table(rows: list[dict[str, object]]) -> str:
    names = list(rows[0]["ttft_ms"])
    lines = ["| prefix | " + " | ".join(names) + " |", "| ---: |" + " ---: |" * len(names)]
    for row in rows:
        medians = row["ttft_ms"]
        cells = [f"{medians[name]:.1f} ms" for name in names]
        lines.append(f"| {row['prefix_tokens']} tokens | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768], help="prefixes, tokens")
    parser.add_argument("--turn", type=int, default=256, help="tokens of the next turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    for count in (*arguments.tokens, arguments.turn):
        if count <= 0 or count % BLOCK_TOKENS:
            parser.error(f"{count} tokens: takes a multiple of the block size, {BLOCK_TOKENS} tokens")
    with started(arguments) as machine:
        rows = measure(arguments, machine)
    print(
        f"{arguments.shape}, {arguments.turn} tokens of next turn, {machine.name}, medians of {arguments.rounds} rounds"
    )
    print(table(rows))
    if arguments.json:
        report = {"device": machine.name, "shape": arguments.shape, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


main()
