"""Time to the first token of a conversation's next turn: with SwiftCache, computed again, and with vLLM's
ExampleConnector (files, in memory here). And what SwiftCache costs a step that finds nothing.

On the CPU engine and the host backend (shared memory): ratios within this machine, not of a GPU. Same model, same kind
of prompts, same run.

    tests/vllm/run.sh --bench [--lengths 512,1024,2048] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "harness")]

import lab as of  # noqa: E402
import models  # noqa: E402
from engine import Engine  # noqa: E402
from neighbours import donate  # noqa: E402
from node import Node, eventually  # noqa: E402

STEPS = 40
"""Decode steps of one measurement of a step."""
ROUNDS = 10
"""Measurements of a step."""


def configuration(model: Path) -> dict[str, Any]:
    return of.options(num_gpu_blocks_override=512, max_num_batched_tokens=4096) | {"model": str(model)}


def first_token(engine: Engine, name: str, prompt: list[int]) -> tuple[float, int, float]:
    """Seconds until it is there, tokens that were not computed, seconds in the connector."""
    engine.ask("add", name=name, tokens=prompt, max_tokens=1)
    answer = engine.ask("step", count=0)
    return sum(answer["seconds"]), answer["finished"][name]["cached"], sum(answer["hooks"])


def turns(engine: Engine, lengths: list[int], rounds: int, label: str) -> dict[int, dict[str, float]]:
    """The median of `rounds` next turns, each of a conversation of its own."""
    found = {}
    for length in lengths:
        seconds, cached = [], []
        for turn in range(rounds + 1):
            # One token more than whole blocks: ExampleConnector finds only what ends where it stored.
            history = of.tokens(f"{label}-{length}-{turn}", length + 1)
            engine.generate({f"{label}-{length}-{turn}-history": history}, 1)
            engine.ask("reset")
            took, hit, _ = first_token(engine, f"{label}-{length}-{turn}", history + of.tokens("new", of.BLOCK - 1))
            engine.ask("reset")
            if turn:  # the first one is for warming up
                seconds.append(took)
                cached.append(hit)
        found[length] = {"ms": 1e3 * statistics.median(seconds), "cached": statistics.median(cached)}
    return found


def step_ms(engine: Engine, label: str) -> dict[str, float]:
    """A decode step of eight requests, and a prefill of 1,024 tokens, nothing being found."""
    for number in range(8):
        engine.ask("add", name=f"{label}-d{number}", tokens=of.tokens(f"{label}{number}", 64), max_tokens=STEPS)
    decode = engine.ask("step", count=0)
    engine.ask("reset")
    prefill, cached, hooks = first_token(engine, f"{label}-p", of.tokens(f"{label}p", 1024))
    assert cached == 0
    engine.ask("reset")
    return {
        "decode_ms": 1e3 * statistics.median(decode["seconds"][5:-5]),
        "decode_hooks_ms": 1e3 * statistics.mean(decode["hooks"][5:-5]),
        "prefill_ms": 1e3 * prefill,
        "prefill_hooks_ms": 1e3 * hooks,
    }


def steps(plain: Engine, with_it: Engine, label: str) -> dict[str, float]:
    """Medians of turns taken one after the other, so that what else the machine does meets both."""
    rounds = [(step_ms(plain, f"{label}-{n}"), step_ms(with_it, f"{label}-{n}")) for n in range(ROUNDS + 1)][1:]
    found = {}
    for what in ("decode_ms", "prefill_ms"):
        found[f"none_{what}"] = statistics.median(one[what] for one, _ in rounds)
        found[what] = statistics.median(other[what] for _, other in rounds)
        found[f"{what}_ratio"] = statistics.median(other[what] / one[what] for one, other in rounds)
    for what in ("decode_hooks_ms", "prefill_hooks_ms"):
        found[what] = statistics.median(other[what] for _, other in rounds)
    return found


def measure(lengths: list[int], rounds: int) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix="swiftcache-bench-"))
    node = Node(directory)
    files = Path(tempfile.mkdtemp(prefix="swiftcache-bench-", dir="/dev/shm"))
    plain = Engine(directory / "plain.log", of.ENVIRONMENT)
    engine = Engine(directory / "engine.log", of.ENVIRONMENT)
    options = configuration(models.make("llama-wide", of.HOME / "models"))
    result: dict[str, Any] = {
        "backend": "host (shared memory), CPU engine",
        "model": "llama-wide",
        "rounds": rounds,
        "turns": {},
        "steps": {},
    }
    try:
        print("without a connector ...", file=sys.stderr)
        plain.start(**options)
        result["turns"]["recompute"] = turns(plain, lengths, rounds, "recompute")

        print("ExampleConnector ...", file=sys.stderr)
        engine.start(**options, other_connector={"kv_connector": "ExampleConnector", "path": str(files)})
        result["turns"]["example"] = turns(engine, lengths, rounds, "example")
        engine.ask("stop")

        node.start_broker()
        donate(node, slabs=96)
        for load in ("sync", "async"):
            print(f"SwiftCache, load {load} ...", file=sys.stderr)
            settings = {"socket": node.socket, "load": load, "max_leased_bytes": 512 << 20}
            engine.start(**options, connector=settings, metered=True)
            eventually("a lease", lambda: engine.ask("leased"))
            result["turns"][load] = turns(engine, lengths, rounds, load)
            result["steps"][load] = steps(plain, engine, load)
            engine.ask("stop")
        return result
    finally:
        plain.close()
        engine.close()
        node.close()
        shutil.rmtree(directory)
        shutil.rmtree(files)


NAMES = {
    "recompute": "computed again",
    "example": "ExampleConnector",
    "sync": "SwiftCache, layer by layer",
    "async": "SwiftCache, asynchronous",
}


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['backend']}; model {result['model']}; medians of {result['rounds']}", ""]
    lines += ["| next turn after a prefix of | " + " | ".join(NAMES.values()) + " |", "|---|" + "---:|" * len(NAMES)]
    for length in result["turns"]["recompute"]:
        base = result["turns"]["recompute"][length]["ms"]
        cells = []
        for name in NAMES:
            one = result["turns"][name][length]
            cells.append(f"{one['ms']:.1f} ms ({one['ms'] / base:.2f}x; {one['cached']:.0f} cached)")
        lines.append(f"| {length} tokens | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| nothing found | decode step of 8 | in hooks | prefill of 1,024 | in hooks |",
        "|---|" + "---:|" * 4,
    ]
    for name, one in result["steps"].items():
        cells = []
        for what in ("decode", "prefill"):
            without, took, hooks = one[f"none_{what}_ms"], one[f"{what}_ms"], one[f"{what}_hooks_ms"]
            cells += [
                f"{without:.2f} -> {took:.2f} ms ({100 * (one[f'{what}_ms_ratio'] - 1):+.1f} %)",
                f"{1e3 * hooks:.0f} us ({100 * hooks / took:.2f} %)",
            ]
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens of the prefixes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    result = measure([int(length) for length in arguments.lengths.split(",")], arguments.rounds)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
