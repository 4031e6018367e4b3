"""SIGKILL on real memory, under real vLLM: a borrowing engine, a donor, an engine that lends, the broker.

Two engines answer prompts in batches without a pause, and forget their own prefixes between batches. One, of as many
ranks as are asked for, borrows from a donor on the last GPU and from the other engine, which lends part of its own pool
on another GPU. At random times one of the four is killed, and started again. Every answer of both engines is compared
with the first one. The engines run batch-invariant, so that an answer does not depend on what it shares steps with. At
the end, the HBM in use is what it was before.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import shapes
from ground import INVARIANT, V2, Engine, Ground, eventually, hbm_used, log_file, ranked, started

ANSWER = 16
Prompts = dict[str, list[int]]


class Size:
    """How much of everything."""

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        self.shape = "tiny" if cpu else "qwen3-0.6b"
        self.lengths = (100, 300) if cpu else (2000, 6000)
        self.prompts, self.batch = (8, 3) if cpu else (12, 4)
        self.donor, self.slab = (16 << 20, 8 << 20) if cpu else (2 << 30, 64 << 20)
        self.pool = 64 << 20 if cpu else 12 << 30
        self.leased = 64 << 20 if cpu else 8 << 30


class Loop:
    """An engine that answers prompts until it is told to stop or killed."""

    def __init__(self, place: Place, name: str, own: list[int], settings: dict[str, Any]) -> None:
        self._place, self.name, self._own, self._settings = place, name, own, settings
        self._source = random.Random(f"{name} {place.args.seed}")
        self._prompts = place.prompts(name)
        self._over = threading.Event()
        self._thread = threading.Thread()
        self.answers = self.wrong = self.cached = 0
        self.broken = ""
        self.truth: dict[str, list[list[int]]] = {}
        self.start()

    def start(self) -> None:
        """Starts the engine, for the first time or again, and its loop."""
        self.engine = self._place.engine(self.name, self._own, self._settings)
        if not self.truth:
            computed = self._ask(self._prompts)
            found = self._ask(self._prompts)
            for name in self._prompts:
                ways = [computed[name]["tokens"], found[name]["tokens"]]
                self.truth[name] = [tokens for at, tokens in enumerate(ways) if tokens not in ways[:at]]
        self._over.clear()
        self._thread = threading.Thread(target=self._go)
        self._thread.start()

    def _ask(self, prompts: Prompts) -> dict[str, Any]:
        for name, tokens in prompts.items():
            self.engine.ask("add", name=name, tokens=tokens, max_tokens=ANSWER)
        return self.engine.finish()

    def _go(self) -> None:
        try:
            while not self._over.is_set():
                chosen = self._source.sample(sorted(self._prompts), self._place.size.batch)
                for name, of in self._ask({name: self._prompts[name] for name in chosen}).items():
                    self.answers += 1
                    self.cached += of["cached"]
                    self.wrong += of["tokens"] not in self.truth[name]
                self.engine.ask("reset")
        except Exception as reason:
            # Its engine may be the one that is killed.
            self.broken = str(reason)

    def kill(self) -> None:
        self._over.set()
        self.engine.kill()
        self._thread.join()
        self.broken = ""

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        self.engine.close()


class Place:
    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.size, self.args, self.directory = Size(args.cpu), args, directory
        self.ground = Ground(directory, args.programs, cpu=args.cpu, simulated=args.ranks + 1)
        self.ground.start_broker()

    def prompts(self, name: str) -> Prompts:
        source, vocabulary = random.Random(name), shapes.SHAPES[self.size.shape]["vocab_size"]
        return {
            f"{name}-{number}": [source.randrange(vocabulary) for _ in range(source.randint(*self.size.lengths))]
            for number in range(self.size.prompts)
        }

    def donor(self) -> Any:
        return self.ground.lend(self.size.donor, self.size.slab)

    def engine(self, name: str, own: list[int], settings: dict[str, Any]) -> Engine:
        """On these devices, one rank on each."""
        size, devices = self.size, self.ground.devices
        own = [number % len(devices) for number in own]
        options: dict[str, Any] = {
            "model": str(shapes.make(size.shape, self.directory)),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": size.lengths[1] + 2 * ANSWER,
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": size.pool,
            "gpu_memory_utilization": 0.3,
            "disable_log_stats": True,
            "enforce_eager": True,
        } | ranked(len(own))
        environment = V2 | INVARIANT | {"CUDA_VISIBLE_DEVICES": self.ground.visible(own)}
        settings = {"socket": self.ground.socket, "lookup_ms": 60_000} | settings
        if size.cpu:
            options |= {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 512}
            options["num_gpu_blocks_override"] = 128
            del options["kv_cache_memory_bytes"]
            environment, settings = {}, settings | {"device": devices[own[0]]}
        return started(log_file(self.args.report, f"kills {name}"), environment, **options, connector=settings)


class Trial:
    def __init__(self, place: Place) -> None:
        self.place, self.ground = place, place.ground
        self.donor = place.donor()
        leased = place.size.leased
        ranks = list(range(place.args.ranks))
        self.lender = Loop(place, "lender", [len(ranks)], {"lend": 0.5, "lend_after_ms": 0, "max_leased_bytes": 0})
        self.borrower = Loop(place, "borrower", ranks, {"max_leased_bytes": leased, "lease_step_bytes": leased})

    def loops(self) -> list[Loop]:
        return [self.lender, self.borrower]

    def working(self, what: str) -> None:
        """Both engines go on, and the borrower finds prefixes on donors."""
        seen = {loop.name: loop.answers for loop in self.loops()}
        cached = self.borrower.cached

        def on() -> bool:
            for loop in self.loops():
                if loop.broken:
                    raise RuntimeError(f"{what}: the {loop.name} ended: {loop.broken[-3000:]}")
            moved = all(loop.answers > seen[loop.name] + 2 * self.place.size.batch for loop in self.loops())
            return moved and self.borrower.cached > cached

        eventually(f"{what}: both engines to go on, and hits", on)

    def kill_donor(self) -> None:
        self.donor.kill()
        self.donor.wait()
        self.donor = self.place.donor()

    def kill_broker(self) -> None:
        self.ground.kill_broker()
        self.ground.start_broker()

    def kill_lender(self) -> None:
        self.lender.kill()
        self.lender.start()

    def kill_borrower(self) -> None:
        self.borrower.kill()
        self.borrower.start()

    def run(self) -> dict[str, Any]:
        source = random.Random(self.place.args.seed)
        victims = ["donor", "broker"] * self.place.args.times + ["lender", "borrower"]
        source.shuffle(victims)
        steps = []
        try:
            self.working("at first")
            for victim in victims:
                # Anywhere in a batch.
                time.sleep(source.uniform(0, 2))
                getattr(self, f"kill_{victim}")()
                self.working(f"after the {victim}")
                steps.append({"killed": victim} | {loop.name: [loop.answers, loop.wrong] for loop in self.loops()})
                print(json.dumps(steps[-1]), flush=True)
        finally:
            for loop in self.loops():
                loop.end()
            self.donor.kill()
            self.donor.wait()
        return {
            "steps": steps,
            "engines": {
                loop.name: {
                    "answers": loop.answers,
                    "wrong": loop.wrong,
                    "cached_tokens": loop.cached,
                    "prompts_with_two_truths": sum(len(ways) > 1 for ways in loop.truth.values()),
                }
                for loop in self.loops()
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for kills.json and logs")
    parser.add_argument("--cpu", action="store_true", help="try the script: vLLM's CPU build, simulated devices")
    parser.add_argument("--times", type=int, default=4, help="how often the donor and the broker are killed")
    parser.add_argument("--ranks", type=int, default=1, help="of the borrowing engine, on the first devices")
    parser.add_argument("--seed", default=str(time.time_ns()), help="of when who is killed")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}", flush=True)
    before = hbm_used()
    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory), args)
        try:
            result = Trial(place).run()
        finally:
            place.ground.close()
    result |= {"on": place.ground.hardware, "seed": args.seed, "HBM before, MiB": before, "HBM after, MiB": hbm_used()}
    leak = [now - was for was, now in zip(before, result["HBM after, MiB"], strict=True)]
    right = all(of["wrong"] == 0 and of["prompts_with_two_truths"] == 0 for of in result["engines"].values())
    result["passed"] = right and all(more < 64 for more in leak)
    (args.report / "kills.json").write_text(json.dumps(result))
    print(json.dumps({name: of for name, of in result.items() if name != "steps"}, indent=1))
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
