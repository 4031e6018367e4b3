"""Where the time to the first token goes, on real vLLM: what the engine does for one request, in milliseconds.

The engine runs in this process, one request at a time, and its parts are timed. Arms: the prefix is resident in the
engine's own pool; or it is loaded from a donor, `asynchronous` as where scheduler and worker are two processes. The
median request of each arm is printed, step after step. In the arms `full pool` the engine has not forgotten its
prefixes, but its pool is smaller than all of them, so that each one is evicted before it is asked for again, as in the
bench. After that several requests decode at once: how long is a step, and what of it is spent in the connector's hooks?
One arm has a connector that does nothing: so much of it is vLLM's calls, and their being timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes
from ground import ENGINE_ENVIRONMENT, HERE, V1, V2, Ground, Orders, Told, ToldError, chosen, eventually, log_file

ARMS: dict[str, dict[str, Any]] = {
    "resident": {"environment": V2, "options": {}},
    "SwiftCache": {"environment": V2, "options": {}, "settings": {}},
    "SwiftCache, full pool": {"environment": V2, "options": {}, "settings": {}, "full": True},
    "hooks that do nothing": {"environment": V2, "options": {}, "nothing": True},
    "asynchronous": {"environment": V2, "options": {}, "settings": {}, "claims": False},
    "wait": {"environment": V2, "options": {}, "settings": {"load": "wait"}},
    "resident, V1": {"environment": V1, "options": {"async_scheduling": False}},
    "sync, V1": {"environment": V1, "options": {"async_scheduling": False}, "settings": {"load": "sync"}},
}


WARM = 10
"""Requests that are not measured, before the others."""
PAUSE = 0.2
"""Seconds between an answer and the next request, in all arms: processors that have rested are slower."""


class Line:
    """What happens, and when."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.entries: list[tuple[str, float, float]] = []

    def restart(self) -> None:
        self.began, self.entries = time.perf_counter(), []

    def now(self) -> float:
        return 1e3 * (time.perf_counter() - self.began)

    def around(self, owner: Any, method: str, name: str, seen: Callable[[Any], bool] = lambda _: True) -> None:
        """Times a method of an object from now on, where its result is worth it."""
        call = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = self.now()
            result = call(*arguments, **named)
            if seen(result):
                self.entries.append((name, start, self.now() - start))
            return result

        setattr(owner, method, timed)


class Copies:
    """Around a worker's cache: notes how long queueing the copies of a load takes, of which Python's part is the rest
    of the hook."""

    def __init__(self, cache: Any, line: Line, *, claims: bool) -> None:
        self._cache, self._line, self._claims = cache, line, claims
        line.around(self, "load", "    of which queueing its copies")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load(self, *arguments: Any) -> Any:
        return self._cache.load(*arguments)

    def claim(self, *arguments: Any) -> Any:
        claim = self._cache.claim(*arguments) if self._claims else None
        return Claimed(claim, self._line) if claim is not None else None


class Claimed:
    """Around what a scheduler has claimed: notes the same of its load."""

    def __init__(self, claim: Any, line: Line) -> None:
        self._claim = claim
        line.around(self, "load", "    of which queueing its copies")

    def __len__(self) -> int:
        return len(self._claim)

    def load(self, *arguments: Any) -> Any:
        return self._claim.load(*arguments)


class Arm:
    def __init__(self, task: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        options = dict(task["options"])
        if task["connector"] is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="SwiftCacheConnector",
                kv_connector_module_path="swiftcache.vllm",
                kv_role="kv_both",
                kv_connector_extra_config=task["connector"],
            )
        elif task["nothing"]:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="NothingConnector", kv_connector_module_path="nothing", kv_role="kv_both"
            )
        self.llm = LLM(**options)
        self.loads = task["connector"] is not None
        self.task, self.line = task, Line()
        core = self.llm.llm_engine.engine_core.engine_core
        self._scheduler = core.scheduler
        line = self.line
        line.around(self.llm.llm_engine, "add_request", "add_request: input is processed and hashed")
        line.around(core.scheduler, "schedule", "schedule")
        line.around(core.model_executor, "execute_model", "execute_model")
        line.around(core.model_executor, "sample_tokens", "sample_tokens")
        line.around(core.scheduler, "update_from_output", "update_from_output")
        if self.loads:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            worker, side = get_kv_transfer_group().worker, core.scheduler.connector.scheduler
            self._worker = worker
            worker._cache = Copies(worker._cache, line, claims=task["claims"])
            line.around(side, "matched_tokens", "  lookup")
            line.around(side, "metadata", "  metadata of the step")
            line.around(worker, "start_loads", "  start of loads")
            line.around(worker, "finished", "  a load is over", lambda result: bool(result[1]))

    def run(self) -> list[dict[str, Any]]:
        prompts = [self._prompt(number) for number in range(self.task["count"])]
        if self.loads:
            eventually("a lease", self._leased)
        for number, prompt in enumerate(prompts):
            self._ask(f"history {number}", prompt, 1)
        self._settle()
        # So many that the broker is not asked any more, which has nothing else in any case.
        for number in range(WARM):
            self._forget()
            of = prompts[number % len(prompts) if self.task["full"] else number % 2]
            self._ask(f"warm {number}", of + self._new(f"warm {number}"), 8)
        found = []
        for turn in range(self.task["rounds"]):
            for number, prompt in enumerate(prompts[2:]):
                name = f"turn {turn} {number}"
                self._settle()
                self._forget()
                time.sleep(PAUSE)
                found.append(self._ask(name, prompt + self._new(name), 8))
        return found

    def decode(self) -> dict[str, Any]:
        """Medians of steps in which several requests get a token each, milliseconds: a step, and its part in hooks."""
        from meter import Meter
        from vllm import SamplingParams
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        meter, engine, count = Meter(), self.llm.llm_engine, 256
        if has_kv_transfer_group():
            meter.around(self._scheduler.connector)
            meter.around(get_kv_transfer_group())
        parameters = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        for number in range(8):
            engine.add_request(f"decode {number}", {"prompt_token_ids": self._new(f"decode {number}")}, parameters)
        steps, hooks = [], []
        while engine.has_unfinished_requests():
            began, before = time.perf_counter(), meter.seconds
            engine.step()
            steps.append(1e3 * (time.perf_counter() - began))
            hooks.append(1e3 * (meter.seconds - before))
        # Without the first ones, which compute prompts, and the last ones, which end requests.
        steps, hooks = steps[count // 4 : -count // 4], hooks[count // 4 : -count // 4]
        return {
            "step": statistics.median(steps),
            "hooks": statistics.median(hooks),
            "hooks_mean": statistics.mean(hooks),
            "step_mean": statistics.mean(steps),
            "by_hook": {name: 1e3 * seconds / count for name, seconds in meter.by_hook.items()},
        }

    def _prompt(self, number: int) -> list[int]:
        source = random.Random(number)
        return [source.randrange(500) for _ in range(self.task["tokens"])]

    def _new(self, name: str) -> list[int]:
        source = random.Random(name)
        return [source.randrange(500) for _ in range(self.task["new"])]

    def _leased(self) -> bool:
        return self._worker._cache.stats()["leases"] > 0

    def _settle(self) -> None:
        while self._scheduler.has_requests():
            self.llm.llm_engine.step()

    def _forget(self) -> None:
        """Only where prefixes are to come from donors, and are not evicted."""
        if self.loads and not self.task["full"]:

            def forgotten() -> bool:
                self._settle()
                return bool(self.llm.reset_prefix_cache())

            eventually("the engine to forget its prefixes", forgotten)

    def _ask(self, name: str, prompt: list[int], count: int) -> dict[str, Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        engine, first, cached = self.llm.llm_engine, 0.0, 0
        self.line.restart()
        engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not first and output.outputs[0].token_ids:
                    first, cached = self.line.now(), output.num_cached_tokens
        entries = sorted((entry for entry in self.line.entries if entry[1] < first), key=lambda entry: entry[1])
        return {"first_ms": first, "cached": cached, "prompt": len(prompt), "entries": entries}


class Child:
    """The process of an arm."""

    def measure(self, task: dict[str, Any]) -> dict[str, Any]:
        arm = Arm(task)
        return {"requests": arm.run(), "decode": arm.decode()}


def measure(ground: Ground, name: str, arm: dict[str, Any], args: Any) -> dict[str, Any]:
    tokens = 400 if args.cpu else args.tokens
    longest = tokens + 1024 if args.cpu else max(shapes.LIMIT, tokens + 1024)
    model = shapes.make("tiny" if args.cpu else "qwen3-8b", args.report, longest)
    options = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 256 << 20 if args.cpu else 48 << 30,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": args.eager,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni",
    } | arm["options"]
    lent, slab = (64 << 20, 8 << 20) if args.cpu else (48 << 30, 256 << 20)
    if args.cpu:
        options |= {"dtype": "float32", "block_size": 32, "enforce_eager": True}
    connector = None
    if "settings" in arm:
        connector = {"socket": ground.socket, "max_leased_bytes": lent, "lease_step_bytes": lent} | arm["settings"]
    task = {"options": options, "connector": connector, "tokens": tokens, "new": 64 if args.cpu else 256}
    task |= {"count": 6 if args.cpu else args.prefixes, "rounds": args.rounds}
    task |= {"claims": arm.get("claims", True)}
    task |= {"full": arm.get("full", False), "nothing": arm.get("nothing", False)}
    if task["full"]:
        # Of the prompts it holds two or three of six, or four of twelve.
        options["kv_cache_memory_bytes"] = 4 << 20 if args.cpu else 12 << 30
    donor = ground.lend(lent, slab) if connector is not None else None
    log = log_file(args.report, f"timeline {name}")
    try:
        environment = ENGINE_ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment |= {} if args.cpu else arm["environment"]
        with contextlib.closing(Told([sys.executable, HERE / "timeline.py", "--arm"], log, environment)) as engine:
            return engine.ask("measure", within=600, task=task)
    except ToldError as reason:
        return {"error": str(reason)}
    finally:
        if donor is not None:
            donor.kill()
            donor.wait()


def shown(name: str, of: dict[str, Any]) -> str:
    if "error" in of:
        return f"{name}: NOT MEASURED: {of['error']}"
    requests = sorted(of["requests"], key=lambda request: request["first_ms"])
    median = requests[len(requests) // 2]
    rows = [
        f"{name}: first token after {median['first_ms']:.1f} ms ({requests[0]['first_ms']:.1f} to "
        f"{requests[-1]['first_ms']:.1f}), {median['cached']:,} of {median['prompt']:,} tokens found"
    ]
    rows += [f"  {start:8.2f} + {took:7.2f}  {what}" for what, start, took in median["entries"] if took >= 0.02]
    decode = of["decode"]
    rows.append(f"  a decode step of 8 requests: {decode['step']:.2f} ms (mean {decode['step_mean']:.2f})")
    if decode["by_hook"]:
        share = 100 * decode["hooks"] / decode["step"]
        slowest = sorted(decode["by_hook"].items(), key=lambda one: -one[1])[:8]
        rows.append(
            f"  {1e3 * decode['hooks']:.0f} us of it in hooks ({share:.1f} %; mean {1e3 * decode['hooks_mean']:.0f}). "
            "On average: " + ", ".join(f"{name} {1e3 * took:.1f}" for name, took in slowest)
        )
    return "\n".join(rows)


def main() -> None:
    if sys.argv[1:] == ["--arm"]:
        Orders().serve(Child())
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for timeline.json and logs")
    parser.add_argument("--cpu", action="store_true", help="try the script: vLLM's CPU build, simulated devices")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--only", default="", help="arms whose names this regular expression finds")
    parser.add_argument("--tokens", type=int, default=20_000, help="of a prefix")
    parser.add_argument("--prefixes", type=int, default=12, help="how many; two of them only warm the engine up")
    parser.add_argument("--rounds", type=int, default=1, help="how often a turn follows on each of the others")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    wanted = chosen(ARMS, args.only)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        ground = Ground(Path(directory), args.programs, cpu=args.cpu)
        try:
            ground.start_broker()
            print(f"{ground.hardware}; the lent memory is on {ground.way}", flush=True)
            for name, arm in wanted.items():
                results[name] = measure(ground, name, arm, args)
                print(shown(name, results[name]), flush=True)
        finally:
            ground.close()
    (args.report / "timeline.json").write_text(json.dumps({"on": ground.hardware, "way": ground.way, "arms": results}))
    sys.exit(any("error" in of for of in results.values()))


if __name__ == "__main__":
    main()
