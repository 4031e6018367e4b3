"""Tokens and logprobs of loaded KV against those of a local prefix hit, on real vLLM, in every way that loads can run.

For each configuration: prompts are computed; answered again from the engine's own prefix cache, which is the truth;
and again after the engine has forgotten its own prefixes, from donors' HBM. One at a time they must be equal, and so
must equal batches where loads are synchronous. The control loads the first block's bytes into all blocks, and must
differ. In the configuration `faults` the broker and donors are killed and withdrawn between prompts as well. In `sleep`
the engine's pool is taken away and comes back in between; in `priority` requests push each other out while they load.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import shapes
from ground import ENGINE_ENVIRONMENT, INVARIANT, V1, V2, Engine, Ground, chosen, eventually, hbm_used, log_file

ANSWER = 24
"""Tokens of each answer."""
LONG_ANSWER = 96
"""Tokens of an answer during which others come."""
FAULTS, SLEEP, PRIORITY = "faults", "sleep", "priority"
FEW_TOKENS = {"vocab_size": 32, "num_nextn_predict_layers": 1}
"""What is changed of a shape whose tokens are guessed: of so few a guess is right now and then."""

Result = dict[str, dict[str, Any]]


def configurations(cpu: bool) -> dict[str, dict[str, Any]]:
    """By name: options of vLLM, SwiftCache's settings, the environment, and the model's shape unless it is the plain
    one: models of several KV cache groups; and what is changed of the shape."""
    if cpu:
        # Not gpt-oss: vLLM's CPU build packs its weights when it loads them, and made-up ones cannot be given it later.
        plain = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 256}
        return {
            "sync": {"options": plain | {"async_scheduling": False}, "settings": {"load": "sync"}},
            "async": {"options": plain, "settings": {"load": "async"}},
            "Gemma 3": {"shape": "tiny-gemma3", "options": plain | {"async_scheduling": False}, "settings": {}},
            PRIORITY: {
                "options": plain | {"scheduling_policy": "priority", "num_gpu_blocks_override": 28},
                "settings": {"load": "async"},
            },
            FAULTS: {"options": plain, "settings": {"load": "async"}},
        }
    eager = {"enforce_eager": True, "block_size": 16}
    alone = {"async_scheduling": False}
    # By itself vLLM takes FlashInfer's kernel on these GPUs, which is not everywhere.
    gdn = eager | {"gdn_prefill_backend": "triton"}
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    guessed = {"shape": "qwen3-next", "changed": FEW_TOKENS, "settings": {}, "environment": V2}
    return {
        "V2 async, eager": {"options": eager, "settings": {}, "environment": V2},
        "V2 async, CUDA graphs": {"options": eager | {"enforce_eager": False}, "settings": {}, "environment": V2},
        "V1 async, eager": {"options": eager, "settings": {"load": "async"}, "environment": V1},
        "V1 sync, eager": {"options": eager | alone, "settings": {"load": "sync"}, "environment": V1},
        "V1 sync, CUDA graphs": {
            "options": eager | alone | {"enforce_eager": False},
            "settings": {"load": "sync"},
            "environment": V1,
        },
        "V2 async, pages of 32": {"options": eager | {"block_size": 32}, "settings": {}, "environment": V2},
        "V2 async, fp8 KV": {"options": eager | {"kv_cache_dtype": "fp8"}, "settings": {}, "environment": V2},
        "V2 async, eager, batch-invariant": {
            "options": eager,
            "settings": {},
            "environment": V2 | INVARIANT,
        },
        "V2 async, CUDA graphs, batch-invariant": {
            "options": eager | {"enforce_eager": False},
            "settings": {},
            "environment": V2 | INVARIANT,
        },
        "V2 async, TP 2": {"options": eager | {"tensor_parallel_size": 2}, "settings": {}, "environment": V2},
        "gpt-oss, V2, eager": {"shape": "gpt-oss", "options": eager, "settings": {}, "environment": V2},
        "gpt-oss, V2, CUDA graphs": {
            "shape": "gpt-oss",
            "options": eager | {"enforce_eager": False},
            "settings": {},
            "environment": V2,
        },
        "Gemma 3, V2, eager": {"shape": "gemma3", "options": eager, "settings": {}, "environment": V2},
        "Gemma 3, V1, eager": {"shape": "gemma3", "options": eager | alone, "settings": {}, "environment": V1},
        "Qwen3-Next, V2, eager": {"shape": "qwen3-next", "options": gdn, "settings": {}, "environment": V2},
        "Qwen3-Next, V2, CUDA graphs": {
            "shape": "qwen3-next",
            "options": gdn | {"enforce_eager": False},
            "settings": {},
            "environment": V2,
        },
        "Qwen3-Next, V1, eager": {"shape": "qwen3-next", "options": gdn | alone, "settings": {}, "environment": V1},
        "Qwen3-Next, V2, eager, n-grams": guessed | {"options": gdn | {"speculative_config": ngram}},
        "Qwen3-Next, V2, CUDA graphs, MTP": guessed
        | {
            "options": gdn
            | {"enforce_eager": False, "speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
        },
        "Qwen3-Next, V1, eager, n-grams": guessed
        | {"options": gdn | alone | {"speculative_config": ngram}, "environment": V1},
        "Granite 4, V2, eager": {"shape": "granite4", "options": eager, "settings": {}, "environment": V2},
        # Its kernels have pages of 64 tokens, and do not always give the same answer twice.
        "DeepSeek V3.2, V2, eager": {
            "repeats": False,
            "shape": "deepseek-v3.2",
            "options": eager | {"block_size": 64},
            "settings": {},
            "environment": V2,
        },
        SLEEP: {"options": eager | {"enable_sleep_mode": True}, "settings": {}, "environment": V2},
        PRIORITY: {
            "options": eager | {"scheduling_policy": "priority", "num_gpu_blocks_override": 400},
            "settings": {},
            "environment": V2 | INVARIANT,
        },
        FAULTS: {"options": eager, "settings": {}, "environment": V2},
    }


class Place:
    """What all configurations share: the node, its donor, models, where logs go, and how long prompts are."""

    def __init__(self, directory: Path, programs: Path, report: Path, *, cpu: bool) -> None:
        self.ground = Ground(directory, programs, cpu=cpu)
        self.shape = "tiny" if cpu else "qwen3-0.6b"
        """The plain model's."""
        self.report = report
        self.shortest, self.longest, self.count = (100, 300, 3) if cpu else (800, 3000, 8)
        self._lent = (256 << 20, 8 << 20) if cpu else (24 << 30, 64 << 20)
        self.ground.start_broker()
        self.donor = self.lend()

    def lend(self) -> Any:
        self.donor = self.ground.lend(*self._lent)
        return self.donor

    def prompts(self, name: str, count: int, vocabulary: int) -> dict[str, list[int]]:
        source = random.Random(name)
        return {
            f"{name}-{number}": [
                source.randrange(vocabulary) for _ in range(source.randint(self.shortest, self.longest))
            ]
            for number in range(count)
        }


class Trial:
    """One configuration on an engine of its own."""

    def __init__(self, place: Place, name: str, of: dict[str, Any]) -> None:
        ground = self.ground = place.ground
        self.place, self.name = place, name
        shape, changed = of.get("shape", place.shape), of.get("changed", {})
        self._vocabulary = (shapes.SHAPES[shape] | changed)["vocab_size"]
        options = {
            "model": str(shapes.make(shape, place.report, **changed)),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": place.longest + LONG_ANSWER + 64,
            "max_num_batched_tokens": 2048,
            # Without this, vLLM measures the GPU's free memory, which other engines change meanwhile.
            "kv_cache_memory_bytes": 4 << 30,
            "gpu_memory_utilization": 0.2,
            "disable_log_stats": True,
        } | of["options"]
        if options.get("tensor_parallel_size", 1) == 1:
            options |= {"distributed_executor_backend": "uni"}
        settings = {
            "socket": ground.socket,
            "salt": name,
            # All at once: what is stored while leases still grow is not kept.
            "max_leased_bytes": "4GiB",
            "lease_step_bytes": "4GiB",
            "lookup_ms": 60_000,
        } | of["settings"]
        if ground.cpu:
            del options["kv_cache_memory_bytes"]
            settings |= {"max_leased_bytes": "64MiB", "lease_step_bytes": "8MiB"}
        self.options = options
        self.repeats = of.get("repeats", True)
        """Whether the model gives the same answer to the same prompt every time."""
        self.claims = (
            "shape" not in of and options.get("tensor_parallel_size", 1) == 1 and settings.get("load") != "sync"
        )
        """Whether loads are part of the step that finds them, though they are not `sync`."""
        self.batches = settings.get("load") == "sync" or INVARIANT.items() <= of.get("environment", {}).items()
        """Whether the answers of a batch can be compared, too."""
        self.guesses = "speculative_config" in options
        """Whether tokens are guessed: several may come in a step."""
        self.steps = 0
        """Those that the engine has taken to answer."""
        self.engine = Engine(log_file(place.report, name), ENGINE_ENVIRONMENT | of.get("environment", {}))
        try:
            self.engine.start(**options, connector=settings)
            self.engine.ask("enliven")
            eventually("a lease", lambda: self.engine.ask("leased"))
        except BaseException:
            self.engine.close()
            raise

    def answer(self, batch: dict[str, list[int]], count: int = ANSWER) -> Result:
        for name, tokens in batch.items():
            self.engine.ask("add", name=name, tokens=tokens, max_tokens=count, logprobs=True)
        done = self.engine.ask("step", count=0)
        self.steps += len(done["seconds"])
        return done["finished"]

    def one_by_one(self, batch: dict[str, list[int]], count: int = ANSWER) -> Result:
        found: Result = {}
        for name, tokens in batch.items():
            found |= self.answer({name: tokens}, count)
        return found

    def claimed(self) -> int:
        """Loads that could not fail from the lookup on, so far."""
        return self.engine.ask("held")["workers"][0]["claimed"]

    def by_priority(self, batch: dict[str, list[int]], count: int) -> Result:
        """The later ones come while earlier ones are answered, and go first."""
        found: Result = {}
        for number, (name, tokens) in enumerate(batch.items()):
            self.engine.ask(
                "add", name=name, tokens=tokens, max_tokens=count, logprobs=True, priority=len(batch) - number
            )
            found |= self.engine.ask("step", count=3)["finished"]
        return found | self.engine.finish()

    def prompts(self, name: str, count: int) -> dict[str, list[int]]:
        return self.place.prompts(name, count, self._vocabulary)

    def forget(self) -> None:
        eventually("the engine to forget its prefixes", lambda: self.engine.ask("reset"))


def equal(one: Result, other: Result) -> int:
    """Answers with the same tokens and logprobs."""
    same = (
        one[name]["tokens"] == other[name]["tokens"] and one[name]["logprobs"] == other[name]["logprobs"]
        for name in one
    )
    return sum(same)


def step_after(what: str, truth: Result, now: Result) -> dict[str, Any]:
    """What is said of the answers that came after something had happened."""
    cached = sum(of["cached"] for of in now.values())
    return {"after": what, "equal": equal(truth, now), "cached_tokens": cached}


def compare(trial: Trial) -> dict[str, Any]:
    work = trial.prompts(trial.name, trial.place.count)
    batch = trial.prompts(f"{trial.name}, batch", 4)
    trial.one_by_one(work)
    steps = trial.steps
    truth = trial.one_by_one(work)
    steps = trial.steps - steps
    again = trial.one_by_one(work)
    trial.answer(batch)
    together = trial.answer(batch)
    trial.forget()
    before = trial.claimed()
    loaded = trial.one_by_one(work)
    claimed = trial.claimed() - before
    trial.forget()
    trial.engine.ask("claims", on=False)
    beside = trial.one_by_one(work)
    trial.engine.ask("claims", on=True)
    trial.forget()
    at_once = trial.answer(batch)
    trial.forget()
    trial.engine.ask("repeat", on=True)
    control = trial.one_by_one(work)
    trial.engine.ask("repeat", on=False)
    found = {
        "prompts": len(work),
        "equal": equal(truth, loaded),
        "claimed": claimed,
        "steps_of_a_token": steps / (len(work) * ANSWER),
        "asynchronous_equal": equal(truth, beside),
        "local_hits_equal": equal(truth, again),
        "cached_tokens": sum(of["cached"] for of in loaded.values()),
        "cached_tokens_locally": sum(of["cached"] for of in truth.values()),
        "batch": len(batch),
        "batch_equal": equal(together, at_once),
        "control_equal": equal(truth, control),
    }
    wanted = len(work) if trial.repeats else max(1, found["local_hits_equal"])
    right = found["equal"] >= wanted and found["asynchronous_equal"] >= wanted
    right = right and claimed == (len(work) if trial.claims else 0)
    right = right and 0 < found["cached_tokens"] == found["cached_tokens_locally"]
    if trial.guesses:
        # Fewer than one for each token there are only if guesses were right.
        right = right and found["steps_of_a_token"] < 1
    if trial.batches:
        right = right and found["batch_equal"] == len(batch)
    found["passed"] = right and found["control_equal"] < len(work)
    return found


def survive(trial: Trial) -> dict[str, Any]:
    """Prompts in turn while what serves them goes away. Nothing may change a token."""
    place, ground = trial.place, trial.ground
    work = trial.prompts(trial.name, place.count)
    computed = trial.one_by_one(work)
    found = trial.one_by_one(work)
    steps: list[dict[str, Any]] = []

    def check(what: str) -> None:
        trial.forget()
        now = trial.one_by_one(work)
        # A prompt that is computed again is summed in other shapes than one whose prefix is found.
        truth = {name: (found if of["cached"] else computed)[name] for name, of in now.items()}
        steps.append(step_after(what, truth, now))

    def stored_again() -> None:
        place.lend()
        eventually("a lease", lambda: trial.engine.ask("leased"))
        trial.forget()
        trial.one_by_one(work)

    check("nothing")
    ground.withdraw(place.donor)
    place.donor.wait()
    check("the donor took everything back")
    stored_again()
    check("a new donor")
    place.donor.kill()
    place.donor.wait()
    check("the donor was killed")
    ground.kill_broker()
    check("the broker was killed")
    ground.start_broker()
    stored_again()
    check("broker and donor are back")
    passed = all(step["equal"] == len(work) for step in steps)
    passed = passed and steps[0]["cached_tokens"] > 0 and steps[-1]["cached_tokens"] > 0
    return {"prompts": len(work), "steps": steps, "passed": passed}


def doze(trial: Trial) -> dict[str, Any]:
    """vLLM takes the pool away and brings it back: what was stored before is forgotten, since weights may have changed,
    and what is stored afterwards is found."""
    work = trial.prompts(trial.name, trial.place.count)
    computed = trial.one_by_one(work)
    truth = trial.one_by_one(work)
    trial.forget()
    steps: list[dict[str, Any]] = []

    def check(what: str, want: Result) -> None:
        steps.append(step_after(what, want, trial.one_by_one(work)))
        trial.forget()

    check("nothing", truth)
    for nap in ("a nap", "another nap"):
        trial.engine.ask("sleep", level=1)
        trial.engine.ask("wake")
        eventually("a lease", lambda: trial.engine.ask("leased"))
        check(nap, computed)
        check(f"{nap} and a turn", truth)
    passed = all(step["equal"] == len(work) for step in steps)
    passed = passed and [step["cached_tokens"] > 0 for step in steps] == [True, False, True, False, True]
    return {"prompts": len(work), "steps": steps, "passed": passed}


def jostle(trial: Trial) -> dict[str, Any]:
    """Requests of a priority each. Four have room at a time, and answers for fewer: one of them has to go."""
    length = (trial.options["num_gpu_blocks_override"] // 4 - 1) * trial.options["block_size"]
    work = {name: (tokens * length)[:length] for name, tokens in trial.prompts(trial.name, 8).items()}
    trial.one_by_one(work, LONG_ANSWER)
    truth = trial.one_by_one(work, LONG_ANSWER)
    steps: list[dict[str, Any]] = []
    for turn in ("a turn", "another turn"):
        trial.forget()
        steps.append(step_after(turn, truth, trial.by_priority(work, LONG_ANSWER)))
    preempted = trial.engine.ask("held")["preemptions"]
    passed = preempted > 0 and all(step["equal"] == len(work) and step["cached_tokens"] for step in steps)
    return {"prompts": len(work), "steps": steps, "preempted": preempted, "passed": passed}


TRIALS = {FAULTS: survive, SLEEP: doze, PRIORITY: jostle}


def run(place: Place, name: str, of: dict[str, Any]) -> dict[str, Any]:
    trial: Trial | None = None
    try:
        trial = Trial(place, name, of)
        return TRIALS.get(name, compare)(trial)
    except Exception as reason:
        traceback.print_exc()
        return {"passed": False, "error": str(reason)[-2000:]}
    finally:
        if trial is not None:
            trial.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for identity.json and logs")
    parser.add_argument("--cpu", action="store_true", help="try the script: vLLM's CPU build, simulated devices")
    parser.add_argument("--only", default="", help="configurations whose names this regular expression finds")
    parser.add_argument("--at-once", type=int, default=3, help="engines that run at a time")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    before = hbm_used()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory), args.programs, args.report, cpu=args.cpu)
        try:
            wanted = chosen(configurations(args.cpu), args.only)
            for name, of in list(wanted.items()):
                ranks = of["options"].get("tensor_parallel_size", 1)
                if ranks > len(place.ground.devices):
                    del wanted[name]
                    print(f"{name}: not run, it needs {ranks} GPUs", flush=True)
            # What kills the broker and the donor runs alone, at the end.
            last = {name: wanted.pop(name) for name in [FAULTS] if name in wanted}

            def one(name: str, of: dict[str, Any]) -> None:
                results[name] = run(place, name, of)
                print(name, json.dumps(results[name]), flush=True)

            with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
                list(pool.map(lambda item: one(*item), wanted.items()))
            for name, of in last.items():
                one(name, of)
            hardware = place.ground.hardware
        finally:
            place.ground.close()
    results["HBM used before and after, MiB"] = {"before": before, "after": hbm_used()}
    leak = [after - was for was, after in zip(before, results["HBM used before and after, MiB"]["after"], strict=True)]
    results["HBM used before and after, MiB"]["passed"] = all(more < 64 for more in leak)
    (args.report / "identity.json").write_text(json.dumps({"on": hardware, "results": results}, indent=1))
    print(table(results))
    sys.exit(not all(of["passed"] for of in results.values()))


def table(results: dict[str, Any]) -> str:
    rows = [
        "| configuration | equal to a local hit | loads claimed | asynchronous | two local hits | tokens from donors "
        "| in batches | control | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, of in results.items():
        said = "passed" if of["passed"] else f"FAILED {of.get('error', '')[:80]}"
        if "steps" in of:
            worst = min(step["equal"] for step in of["steps"])
            cached = "; ".join(f"{step['after']}: {step['cached_tokens']}" for step in of["steps"])
            rows.append(f"| {name} | {worst} of {of['prompts']} at least | | | | {cached} | | | {said} |")
        elif "equal" in of:
            rows.append(
                f"| {name} | {of['equal']} of {of['prompts']} | {of['claimed']} | {of['asynchronous_equal']} | "
                f"{of['local_hits_equal']} | {of['cached_tokens']} | {of['batch_equal']} of {of['batch']} | "
                f"{of['control_equal']} of {of['prompts']} | {said} |"
            )
        else:
            rows.append(f"| {name} | | | | | | | | {said} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
