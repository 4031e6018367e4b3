"""SGLang's real engine on a GPU: are the tokens of loaded KV right, and how soon does a next turn begin?

Identity: an engine with a pool that holds all prompts answers them twice, the second time from its own prefixes. Two
engines with SwiftCache and a pool of a third of that do the same, and load the prefixes from a donor. Tokens, logprobs
and the lengths of prefixes must be equal. The model needs weights of its own: with made-up ones the answer is the same
whatever the KV cache holds. `tests/sglang` has the control: a donor that is overwritten changes tokens.

Next turn: time to the first token by where the prefix comes from: computed again, HiCache (pinned host memory),
SwiftCache from host memory or from a donor's HBM, resident. All arms hold the same conversations, those of
tests/gpu/vllm/bench.py.

    next_turn.py PROGRAMS REPORT [identity|bench] [--only ARM] [--attention triton] [--clients 1 4]

REPORT gets sglang.json and logs. With one GPU, the memory that is lent is the engine's own GPU's: no link is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "vllm")]

import shapes  # noqa: E402
from bench import quantile  # noqa: E402
from ground import GiB, Ground, Orders, Told, ToldError, chosen, log_file  # noqa: E402
from talk import Talk, add, in_turn, steps, to_say  # noqa: E402

LOCAL = "from its own pool"
SAID = ("tokens", "logprobs", "cached", "finish")
"""What must be equal."""
ARMS: dict[str, dict[str, Any]] = {
    "HiCache": {"hicache": True},
    "SwiftCache, host memory": {"settings": {}, "lent_by": "HOST-0"},
    "SwiftCache": {"settings": {}},
    "resident": {"resident": True},
    "computed again": {},
    "SwiftCache, load: wait": {"settings": {"load": "wait"}},
}
"""What is compared first comes first: an engine takes more than a minute to start."""


class Size:
    """How much of everything."""

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        self.shape = "tiny" if cpu else "qwen3-8b"
        self.token = shapes.token_bytes(self.shape, 4 if cpu else 2)
        self.conversations = 4 if cpu else 12
        self.shortest, self.longest = (200, 400) if cpu else (15_000, 25_000)
        self.new, self.answer, self.rounds = (32, 8, 1) if cpu else (256, 32, 2)
        self.page = 16 if cpu else 64
        self.local, self.resident = (1024 * self.token, 8192 * self.token) if cpu else (12 * GiB, 56 * GiB)
        self.lent, self.slab = (64 << 20, 8 << 20) if cpu else (48 * GiB, 256 << 20)
        # Identity.
        self.prompts, self.pool = ([450] * 5, 2048) if cpu else ([3000] * 8, 12_288)


class Child:
    """The process of an engine."""

    async def run(self, task: dict[str, Any]) -> dict[str, Any]:
        import sglang

        self._task = task
        self._more: dict[str, Any] = {}

        began = time.monotonic()
        self._engine = sglang.Engine(**self._task["options"])
        started = time.monotonic() - began
        try:
            what = self._converse if self._task["what"] == "bench" else self._answer
            return {"started": started} | await what()
        finally:
            self._engine.shutdown()

    async def _converse(self) -> dict[str, Any]:
        task, rounds = self._task, {}
        talk = Talk(self._ask, task)
        await talk.begin()
        for load, do, arguments in steps(task["rounds"], task["clients"], task["rates"]):
            add(rounds, load, await getattr(talk, do)(**arguments))
        return {"rounds": rounds}

    async def _answer(self) -> dict[str, Any]:
        """Two passes over the prompts."""
        self._more = {"return_logprob": True}
        source = random.Random("identity")
        prompts = [
            [source.randrange(self._task["vocabulary"]) for _ in range(count)] for count in self._task["prompts"]
        ]
        return {"passes": [await in_turn(self._ask, prompts, 1, 16) for _ in range(2)]}

    async def _ask(self, prompt: list[int], answer: int) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
        began, first = time.perf_counter(), 0.0
        said: dict[str, Any] = {}
        stream = await self._engine.async_generate(
            input_ids=prompt, sampling_params=sampling, stream=True, **self._more
        )
        async for part in stream:
            said, first = part, first or time.perf_counter() - began
        over = time.perf_counter() - began
        return {
            "first_ms": 1e3 * first,
            "per_token_ms": 1e3 * (over - first) / max(1, answer - 1),
            "prompt": len(prompt),
            "answered": len(said["output_ids"]),
            "cached": said["meta_info"].get("cached_tokens", 0),
            "tokens": said["output_ids"],
            "logprobs": [one[0] for one in said["meta_info"].get("output_token_logprobs") or ()],
            "finish": said["meta_info"].get("finish_reason"),
        }


class Place:
    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.size, self.args = Size(args.cpu), args
        self.ground = Ground(directory, args.programs, cpu=args.cpu)
        self.directory = directory

    def options(self, shape: str, tokens: int) -> dict[str, Any]:
        size = self.size
        options = {
            "model_path": str(shapes.make(shape, self.directory)),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "skip_server_warmup": True,
            "max_total_tokens": tokens,
            "context_length": size.longest + 16 * (size.new + size.answer),
            "page_size": size.page,
            "chunked_prefill_size": 8192,
            "mem_fraction_static": 0.85,
            "sampling_backend": "pytorch",
            "log_level": "info",
        }
        if self.args.attention:
            options["attention_backend"] = self.args.attention
        if size.cpu:
            options |= {"device": "cpu", "dtype": "float32", "mem_fraction_static": 0.2, "chunked_prefill_size": 1024}
        return options

    def linker(self, **settings: Any) -> dict[str, Any]:
        own = {"socket": self.ground.socket, "max_leased_bytes": self.size.lent, "lease_step_bytes": self.size.lent}
        return {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": {
                "linker": "SwiftCacheLinker",
                "linker_module_path": "swiftcache.sglang",
                "linker_extra_config": own | settings | ({"device": "SIM-0"} if self.size.cpu else {}),
            },
        }

    def run(self, name: str, task: dict[str, Any], lent_by: str | None) -> dict[str, Any]:
        """An engine's life, with a donor of that device's memory if there is one."""
        donor = self.ground.lend(self.size.lent, self.size.slab, lent_by) if lent_by else None
        try:
            environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
            command = [sys.executable, Path(__file__).resolve(), "--child"]
            with contextlib.closing(Told(command, log_file(self.args.report, name), environment)) as engine:
                return engine.ask("run", within=self.args.arm_limit, task=task)
        except ToldError as reason:
            return {"error": str(reason)}
        finally:
            if donor is not None:
                donor.kill()
                donor.wait()

    def identity(self) -> dict[str, Any]:
        size = self.size
        task = {
            "what": "identity",
            "prompts": size.prompts,
            "vocabulary": 500,
            "options": self.options("tiny" if size.cpu else "qwen3-0.6b", size.pool),
        }
        task["options"] |= {"model_path": self.args.model, "load_format": "auto", "context_length": 4096}
        own = {"max_total_tokens": 3 * size.pool}
        found = {}
        for name, more in {LOCAL: own, "SwiftCache": self.linker(), "load: wait": self.linker(load="wait")}.items():
            changed = {**task, "options": task["options"] | more}
            found[name] = self.run(f"identity {name}", changed, None if name == LOCAL else self.ground.donor_device)
        if any("error" in of for of in found.values()):
            return {"passed": False, "error": next(of["error"] for of in found.values() if "error" in of)}
        told = {name: [[one[what] for what in SAID] for one in of["passes"][1]] for name, of in found.items()}
        cached = {name: sum(one["cached"] for one in of["passes"][1]) for name, of in found.items()}
        equal = {
            name: sum(one == local for one, local in zip(answers, told[LOCAL], strict=True))
            for name, answers in told.items()
        }
        various = len({json.dumps(answer) for answer in told[LOCAL]})
        passed = set(equal.values()) == {len(size.prompts)} and various == len(size.prompts) and cached[LOCAL] > 0
        return {"equal": equal, "cached": cached, "answers": various, "prompts": len(size.prompts), "passed": passed}

    def arm(self, name: str, arm: dict[str, Any]) -> dict[str, Any]:
        size = self.size
        own = size.resident if arm.get("resident") else size.local
        more: dict[str, Any] = {}
        lent_by = None
        if arm.get("hicache"):
            more = {"enable_hierarchical_cache": True, "hicache_size": size.lent // 10**9, "hicache_ratio": 0}
        if "settings" in arm:
            more = self.linker(**arm["settings"])
            lent_by = arm.get("lent_by", self.ground.donor_device)
        task = {
            "what": "bench",
            "options": self.options(size.shape, own // size.token // size.page * size.page) | more,
        }
        task |= to_say(size) | {"clients": self.args.clients, "rates": self.args.rates}
        return self.run(f"bench {name}", task, lent_by)


def table(results: dict[str, Any]) -> str:
    rows = []
    if identity := results.get("identity"):
        rows.append(f"identity: {json.dumps(identity)}")
    rows.append("| arm | load | first token: p50 | p90 | p99 | time per token | of the prompt found |")
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, of in results["arms"].items():
        if "error" in of:
            rows.append(f"| {name} | | NOT MEASURED: {of['error'].splitlines()[0][:80]} | | | | |")
            continue
        for load, one in of["rounds"].items():
            first = [turn["first_ms"] for turn in one["turns"]]
            token = statistics.median(turn["per_token_ms"] for turn in one["turns"])
            share = sum(turn["cached"] for turn in one["turns"]) / sum(turn["prompt"] for turn in one["turns"])
            rows.append(
                f"| {name} | {load} | {statistics.median(first):.0f} ms | {quantile(first, 0.9):.0f} | "
                f"{quantile(first, 0.99):.0f} | {token:.1f} ms | {100 * share:.0f} % |"
            )
    return "\n".join(rows)


def main() -> None:
    if sys.argv[1:] == ["--child"]:
        asyncio.run(Orders().serve_async(Child()))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for results and logs")
    parser.add_argument("what", nargs="?", choices=("identity", "bench"), help="only this")
    parser.add_argument("--cpu", action="store_true", help="try the script: SGLang's CPU engine, simulated devices")
    parser.add_argument("--model", help="for identity: a model with weights of its own")
    parser.add_argument("--attention", help="SGLang's --attention-backend")
    parser.add_argument("--only", default="", help="arms whose names this regular expression finds")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="turns a second that arrive in any case")
    parser.add_argument("--arm-limit", type=float, default=300, help="the longest that an engine may live, seconds")
    args = parser.parse_args()
    if args.what != "bench" and not args.model:
        parser.error("identity needs --model")
    args.report.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"arms": {}}
    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory), args)
        try:
            place.ground.start_broker()
            results["on"] = f"{place.ground.hardware}; the lent memory is on {place.ground.way}"
            if args.what != "bench":
                results["identity"] = place.identity()
                print(json.dumps(results["identity"]), flush=True)
            wanted = chosen(ARMS, args.only)
            for name, arm in wanted.items() if args.what != "identity" else ():
                results["arms"][name] = place.arm(name, arm)
                print(table({"arms": {name: results["arms"][name]}}), flush=True)
                (args.report / "sglang.json").write_text(json.dumps(results))
        finally:
            place.ground.close()
    print(f"{results['on']}\n{table(results)}")
    failed = any("error" in of for of in results["arms"].values())
    sys.exit(failed or not results.get("identity", {"passed": True})["passed"])


if __name__ == "__main__":
    main()
