"""What lending costs the lender, on real vLLM: an engine that lends part of its own KV pool, and one that borrows it.

The lender answers the same kind of turns alone, while the borrower reads prefixes from its HBM without a pause, and
alone again, several times in turn. Then come bursts that need the lent memory: one that takes it back while the
borrower reads on, and one right afterwards, when all of it is the lender's own. Times to the first token and per token
are compared. The result is a table and lender.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import shapes
from bench import quantile
from ground import ENGINE_ENVIRONMENT, HERE, V2, GiB, Ground, Orders, Told, eventually, log_file
from talk import Arm, Conversations, in_turn

Turns = list[dict[str, Any]]


class Size:
    """How much of everything."""

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        self.shape = "tiny" if cpu else "qwen3-8b"
        self.pool, self.borrower_pool = (8 << 20, 64 << 20) if cpu else (48 * GiB, 12 * GiB)
        self.borrower_talks = (4, 200, 400) if cpu else (7, 15_000, 25_000)
        self.lender_talks = (4, 60, 120) if cpu else (8, 4000, 8000)
        self.burst = (8, 300) if cpu else (28, 8000)
        self.new, self.answer = (32, 8) if cpu else (256, 64)
        self.rounds = 1 if cpu else 4
        self.times = 2 if cpu else 3


class Child:
    """An engine that talks."""

    async def start(self, task: dict[str, Any]) -> None:
        self._task, self._number = task, 0
        self._arm = Arm(task["options"], task["connector"])
        self._talks = Conversations("lender", *task["talks"], task["vocabulary"])
        self._over = asyncio.Event()
        self._going: asyncio.Task[Turns] | None = None

    async def learn(self) -> None:
        """Has the engine compute all histories."""
        await in_turn(self._arm.ask, self._talks.histories, 4, 1)

    async def talk(self, rounds: int, clients: int) -> Turns:
        done: Turns = []
        for _ in range(rounds):
            # The history stays as it is, so that all phases ask for equally much.
            prompts = [history + self._made(self._task["new"]) for history in self._talks.histories]
            done += await in_turn(self._arm.ask, prompts, clients, self._task["answer"])
        return done

    async def burst(self, count: int, length: int, clients: int) -> Turns:
        """Prompts that nobody has seen."""
        return await in_turn(self._arm.ask, [self._made(length) for _ in range(count)], clients, self._task["answer"])

    async def begin(self, clients: int) -> None:
        """Talks until `end`."""

        async def on() -> Turns:
            done: Turns = []
            while not self._over.is_set():
                done += await self.talk(1, clients)
            return done

        self._over.clear()
        self._going = asyncio.ensure_future(on())

    async def end(self) -> Turns:
        assert self._going is not None
        self._over.set()
        return await self._going

    def _made(self, length: int) -> list[int]:
        self._number += 1
        source = random.Random(f"{self._task['talks']} {self._number}")
        return [source.randrange(self._task["vocabulary"]) for _ in range(length)]


class Trial:
    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.size, self.args = Size(args.cpu), args
        self.ground = Ground(directory, args.programs, cpu=args.cpu)
        self.ground.start_broker()
        self._model = shapes.make(self.size.shape, args.report)

    def _engine(self, name: str, own: int, pool: int, talks: tuple[int, int, int], settings: dict[str, Any]) -> Told:
        """`own`: which of the devices is the engine's. It sees all."""
        size, devices = self.size, self.ground.devices
        own %= len(devices)
        options: dict[str, Any] = {
            "model": str(self._model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 1024 if size.cpu else shapes.LIMIT,
            "max_num_batched_tokens": 8192,
            "kv_cache_memory_bytes": pool,
            "gpu_memory_utilization": 0.9 if len(devices) > 1 else 0.45,
        }
        environment = V2 | {"CUDA_VISIBLE_DEVICES": self.ground.visible([own])}
        if size.cpu:
            options |= {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 1024, "enforce_eager": True}
            environment, settings = {}, settings | {"device": devices[own]}
        connector = {
            "kv_connector": "SwiftCacheConnector",
            "kv_connector_module_path": "swiftcache.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"socket": self.ground.socket} | settings,
        }
        task = {"options": options, "connector": connector, "talks": talks, "new": size.new, "answer": size.answer}
        task["vocabulary"] = shapes.SHAPES[size.shape]["vocab_size"]
        log = log_file(self.args.report, f"lender {name}")
        engine = Told([sys.executable, HERE / "lender.py", "--child"], log, ENGINE_ENVIRONMENT | environment)
        engine.say("start", task=task)
        return engine

    def run(self) -> dict[str, Any]:
        size = self.size
        lender = self._engine("lender", 1, size.pool, size.lender_talks, {"lend": 0.5, "max_leased_bytes": 0})
        borrower = self._engine(
            "borrower",
            0,
            size.borrower_pool,
            size.borrower_talks,
            {"max_leased_bytes": size.pool, "lease_step_bytes": size.pool},
        )
        try:
            for one in (lender, borrower):
                one.answer()
            lender.ask("learn")
            eventually("the lender to lend", lambda: self.ground.leased() > 0)
            borrower.ask("learn")
            phases: dict[str, Any] = {"alone": [], "read from": []}
            read: Turns = []
            # For nobody's measurement.
            lender.ask("talk", rounds=1, clients=4)
            borrower.ask("talk", rounds=1, clients=4)
            lent = self.ground.leased()
            for _ in range(size.times):
                phases["alone"] += lender.ask("talk", rounds=size.rounds, clients=4)
                borrower.ask("begin", clients=4)
                phases["read from"] += lender.ask("talk", rounds=size.rounds, clients=4)
                read += borrower.ask("end")
                print(f"lent {lent / GiB:.2f} GiB; turns of both: {len(phases['read from'])}, {len(read)}", flush=True)
            count, length = size.burst
            before = self.ground.leased()
            borrower.ask("begin", clients=4)
            phases["burst, taking back"] = lender.ask("burst", count=count, length=length, clients=count)
            between = self.ground.leased()
            meanwhile = borrower.ask("end")
            phases["burst, all its own"] = lender.ask("burst", count=count, length=length, clients=count)
            return {
                "lent": {"at first": lent, "before the burst": before, "after the burst": between},
                "lender": phases,
                "borrower": {"reading": read, "while memory is taken back": meanwhile},
            }
        finally:
            lender.close()
            borrower.close()


def figures(turns: Turns) -> dict[str, float]:
    first = [turn["first_ms"] for turn in turns]
    token = [turn["per_token_ms"] for turn in turns]
    return {
        "turns": len(turns),
        "p50": statistics.median(first),
        "p90": quantile(first, 0.9),
        "p99": quantile(first, 0.99),
        "token_p50": statistics.median(token),
        "token_p99": quantile(token, 0.99),
        "found": sum(turn["cached"] for turn in turns) / sum(turn["prompt"] for turn in turns),
    }


def table(result: dict[str, Any]) -> str:
    rows = ["| engine | phase | turns | first token: p50 | p90 | p99 | time per token: p50 | p99 | found |"]
    rows.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for engine in ("lender", "borrower"):
        for phase, turns in result[engine].items():
            one = figures(turns)
            rows.append(
                f"| {engine} | {phase} | {one['turns']} | {one['p50']:.0f} ms | {one['p90']:.0f} | {one['p99']:.0f} | "
                f"{one['token_p50']:.2f} ms | {one['token_p99']:.2f} | {100 * one['found']:.0f} % |"
            )
    for phase, quiet in {"read from": "alone", "burst, taking back": "burst, all its own"}.items():
        one, other = figures(result["lender"][phase]), figures(result["lender"][quiet])
        rows.append(
            f"\nlender, {phase} / {quiet}: first token p50 {one['p50'] / other['p50']:.3f}, p99 "
            f"{one['p99'] / other['p99']:.3f}; per token p50 {one['token_p50'] / other['token_p50']:.3f}, p99 "
            f"{one['token_p99'] / other['token_p99']:.3f}"
        )
    rows.append(f"\nlent, bytes: {json.dumps(result['lent'])}")
    return "\n".join(rows)


def main() -> None:
    if sys.argv[1:] == ["--child"]:
        asyncio.run(Orders().serve_async(Child()))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for lender.json and logs")
    parser.add_argument("--cpu", action="store_true", help="try the script: vLLM's CPU build, simulated devices")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        trial = Trial(Path(directory), args)
        try:
            result = trial.run()
        finally:
            trial.ground.close()
    result["on"] = f"{trial.ground.hardware}; the lender is on {trial.ground.way}"
    (args.report / "lender.json").write_text(json.dumps(result))
    print(f"{result['on']}\n{table(result)}")
    sys.exit(not (result["lent"]["at first"] and figures(result["borrower"]["reading"])["found"] > 0))


if __name__ == "__main__":
    main()
