"""Contexts larger than local HBM, on real vLLM: are tokens right, and what does a token cost?

identity: an engine whose KV cache is stitched, and one that has all of it itself, answer the same prompts, one by one
and together. Tokens and logprobs must be equal where both compute in the same shapes: always, but for prompts that are
longer than a window, which are read in parts. Then sums are rounded in another way: what that may do where a model's
attention is sharp is shown by an all-local engine that computes in shorter steps. The control reads windows that
nothing was copied to, and must differ. Then the donor takes everything back while a token follows another, and the
answer must be the same again.

speed: how many tokens fit, what computing a long prompt takes beside an all-local engine, what a token costs by the
bytes it reads from the neighbour, and the longest pause while the donor takes everything back in mid-decode.

longest: contexts of many times the local pool, in pools of two sizes: are the tokens those of an all-local engine of
the same context, and what does computing it, and a token, take in both?
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import re
import statistics
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import shapes
from ground import INVARIANT, V1, V2, Donors, Engine, GiB, Ground, chosen, eventually, log_file, ranked, started

Result = dict[str, dict[str, Any]]


class Size:
    """How much of everything. KV of a token is 112 KiB in qwen3-0.6b and 144 KiB in qwen3-8b."""

    def __init__(self, cpu: bool, args: argparse.Namespace) -> None:
        self.cpu = cpu
        # Identity: a window has room for 16,384 tokens on a GPU.
        self.shape = "tiny" if cpu else "qwen3-0.6b"
        self.window = 80 * (16 << 10) if cpu else 64 << 20
        self.own = 2 * self.window + (32 * 4 * (16 << 10) if cpu else 512 << 20)
        self.stream = 24 * (256 << 10) if cpu else 6 * GiB
        self.slab = 256 << 10 if cpu else 32 << 20
        self.prompts = (
            {"short": 150, "long": 2000} if cpu else {"short": 1500, "long": 12_000, "longer than a window": 30_000}
        )
        self.crowd = [600] * 3 if cpu else [6000] * 4
        self.answer = 24
        # Speed.
        self.large = "tiny" if cpu else args.shape
        self.large_own = self.own if cpu else args.own
        self.large_lent = self.stream if cpu else args.lent
        self.large_slab = self.slab if cpu else 64 << 20
        self.contexts = [400, 1600] if cpu else args.contexts
        self.longest = 2000 if cpu else args.longest
        self.tokens = 16 if cpu else 64
        # Longest: bytes of local KV cache, and of all of it, windows left out.
        self.long = "tiny" if cpu else "qwen3-7b-mha"
        self.long_window = self.window if cpu else 256 << 20
        self.owns = [self.own, self.own + (1 << 20)] if cpu else args.pools
        self.whole = 3 * self.own if cpu else 118 * GiB
        # More tokens than are local.
        self.control = 2000 if cpu else 40_000


class Place:
    def __init__(self, directory: Path, args: argparse.Namespace, size: Size) -> None:
        self.size, self.report = size, args.report
        self.ranks, self._donors = args.ranks, args.donors
        simulated = max(2, args.ranks + args.donors)
        self.ground = Ground(directory, args.programs, cpu=size.cpu, simulated=simulated)
        self.ground.start_broker()

    def lend(self, stream: int, slab: int, ranks: int) -> Donors:
        """So much for each of so many ranks."""
        return Donors(self.ground, stream * ranks, slab, self.ground.devices[-self._donors :])

    def token_bytes(self, shape: str) -> int:
        """KV of a token in each rank."""
        return shapes.token_bytes(shape, 4 if self.size.cpu else 2) // self.ranks

    def prompt(self, name: str, count: int) -> list[int]:
        source = random.Random(name)
        return [source.randrange(500) for _ in range(count)]

    def options(self, shape: str, longest: int, **more: Any) -> dict[str, Any]:
        model = shapes.make(shape, self.report, max_position_embeddings=longest + 4096)
        options = {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": longest,
            "max_num_batched_tokens": 2048,
            "gpu_memory_utilization": 0.2,
            "disable_log_stats": True,
        } | ranked(self.ranks)
        if self.size.cpu:
            options |= {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 256, "enforce_eager": True}
        return options | more

    def settings(self) -> dict[str, Any]:
        """Of the connector. No prefix is kept on donors: what is read is the engine's own pool."""
        return {"socket": self.ground.socket, "max_leased_bytes": 0} | ({"device": "SIM-0"} if self.size.cpu else {})

    def stitched(self, window: int, stream: int) -> dict[str, Any]:
        return self.settings() | {"stream_bytes": stream} | ({"stream_window_bytes": window} if window else {})

    def engine(self, name: str, environment: dict[str, str], options: dict[str, Any]) -> Engine:
        said = {"VLLM_LOGGING_LEVEL": "INFO"}
        return started(log_file(self.report, name), environment | said, **options)


def look(engine: Engine) -> dict[str, Any]:
    return engine.ask("stitched")[0]


def asked(engine: Engine, prompts: dict[str, list[int]], count: int) -> Result:
    for name, tokens in prompts.items():
        engine.ask("add", name=name, tokens=tokens, max_tokens=count, logprobs=True)
    return engine.finish()


def one_by_one(engine: Engine, prompts: dict[str, list[int]], count: int) -> Result:
    found: Result = {}
    for name, tokens in prompts.items():
        found |= asked(engine, {name: tokens}, count)
    return found


def forget(engine: Engine) -> None:
    eventually("the engine to forget its prefixes", lambda: engine.ask("reset"))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["tokens"] == other["tokens"] and one["logprobs"] == other["logprobs"]


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many first tokens are equal, and how far their logprobs are apart at most."""
    pairs = list(zip(one["tokens"], other["tokens"], strict=True))
    equal = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
    steps = [abs(a - b) for a, b in zip(one["logprobs"][:equal], other["logprobs"][:equal], strict=True)]
    return {"first_equal": equal, "of": len(pairs), "logprobs_apart": max(steps, default=0.0)}


def near(of: dict[str, Any]) -> bool:
    return of["logprobs_apart"] < 0.5 and of["first_equal"] > 0


def by_itself(
    place: Place,
    name: str,
    environment: dict[str, str],
    options: dict[str, Any],
    asks: tuple[dict[str, list[int]], dict[str, list[int]]],
) -> tuple[Result, Result, Result]:
    """What an engine answers to prompts one by one, again, and to a crowd of them together."""
    prompts, crowd = asks
    engine = place.engine(name, environment, options)
    try:
        truth = one_by_one(engine, prompts, place.size.answer)
        again = one_by_one(engine, prompts, place.size.answer)
        forget(engine)
        return truth, again, asked(engine, crowd, place.size.answer)
    finally:
        engine.close()


def identity(place: Place, name: str, environment: dict[str, str], more: dict[str, Any]) -> dict[str, Any]:
    size = place.size
    longest = max(size.prompts.values()) + size.answer + 64
    prompts = {called: place.prompt(called, count) for called, count in size.prompts.items()}
    crowd = {f"crowd {number}": place.prompt(f"crowd {number}", count) for number, count in enumerate(size.crowd)}
    # As many blocks in both, so that both schedule alike. And a connector in both: vLLM compiles a model in another way
    # when there is none.
    more = dict(more)
    of_other_shape = "shape" in more
    options = place.options(more.pop("shape", size.shape), longest, **more)
    all_local = {"kv_cache_memory_bytes": size.own + size.stream, "connector": place.settings()}
    truth, again, together = by_itself(place, f"{name}, all local", environment, options | all_local, (prompts, crowd))
    in_steps: dict[str, Any] | None = None
    if of_other_shape:
        steps = {"max_num_batched_tokens": options["max_num_batched_tokens"] // 2}
        called = f"{name}, all local, shorter steps"
        others, _, _ = by_itself(place, called, environment, options | all_local | steps, (prompts, {}))
        in_steps = {called: apart(truth[called], others[called]) for called in prompts}
    # Each rank has its own stitched pool.
    donors = place.lend(size.stream * 3 // 2, size.slab, options["tensor_parallel_size"])
    engine = place.engine(
        name,
        environment,
        options
        | {
            "kv_cache_memory_bytes": size.own,
            "worker_cls": "swiftcache.vllm.StreamWorker",
            "connector": place.stitched(size.window, size.stream),
        },
    )
    try:
        found = one_by_one(engine, prompts, size.answer)
        staged = look(engine)["staged"]
        found_again = one_by_one(engine, prompts, size.answer)
        print(
            f"{name}: {sum(same(truth[called], found[called]) for called in prompts)} of {len(prompts)} equal",
            flush=True,
        )
        forget(engine)
        at_once = asked(engine, crowd, size.answer)
        forget(engine)
        engine.ask("rig", stale=True)
        control = one_by_one(engine, {"long": prompts["long"]}, size.answer)
        engine.ask("rig")
        forget(engine)
        before = look(engine)
        engine.ask("add", name="long", tokens=prompts["long"], max_tokens=size.answer, logprobs=True)
        steps = -(-len(prompts["long"]) // options["max_num_batched_tokens"]) + 4
        engine.ask("step", count=steps)
        donors.withdraw()
        withdrawn = engine.finish()
        while not donors.over():
            withdrawn_again = asked(engine, {"long": prompts["long"]}, size.answer)
        withdrawn_again = asked(engine, {"long": prompts["long"]}, size.answer)
        after = look(engine)
    finally:
        engine.close()
        donors.close()
    result = {
        "blocks": before["blocks"],
        "local_blocks": before["local_blocks"],
        "staged": staged,
        "equal": {called: same(truth[called], found[called]) for called in prompts},
        "prefix_equal": {called: same(again[called], found_again[called]) for called in prompts},
        "apart": {called: apart(truth[called], found[called]) for called in prompts},
        "apart_in_shorter_steps": in_steps,
        "batch_equal": sum(same(together[called], at_once[called]) for called in crowd),
        "batch": len(crowd),
        "control_equal": same(truth["long"], control["long"]),
        "withdrawn_equal": same(found["long"], withdrawn["long"]),
        "on_floor_equal": same(found_again["long"], withdrawn_again["long"]),
        "moved_units": after["moved_units"] - before["moved_units"],
        "on_floor": after["on_floor"],
    }
    whole = [called for called in prompts if called != "longer than a window"]
    invariant = INVARIANT.items() <= environment.items()
    result["passed"] = (
        all(result["equal"][called] for called in whole)
        and (not invariant or result["batch_equal"] == len(crowd))
        and result["staged"] > 0
        and not result["control_equal"]
        and result["withdrawn_equal"]
        and result["on_floor_equal"]
        and result["moved_units"] > 0
        and all(near(of) or (in_steps and not near(in_steps[called])) for called, of in result["apart"].items())
    )
    return result


def configurations(cpu: bool) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    if cpu:
        return {"eager": ({}, {})}
    return {
        "V2, eager": (V2, {"enforce_eager": True}),
        "V2, CUDA graphs": (V2, {}),
        "V1, CUDA graphs": (V1, {}),
        "V2, CUDA graphs, batch-invariant": (V2 | INVARIANT, {}),
        "V2, eager, Llama": (V2, {"enforce_eager": True, "shape": "llama-0.6b"}),
        "V2, eager, TP 2": (
            V2,
            {"enforce_eager": True, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        ),
    }


# Speed.


def seconds_of(engine: Engine, name: str, tokens: list[int], count: int) -> list[float]:
    engine.ask("add", name=name, tokens=tokens, max_tokens=count)
    return engine.ask("step", count=0)["seconds"]


def costs(engine: Engine, place: Place, contexts: list[int]) -> dict[int, dict[str, float]]:
    """Of each context: seconds until it is computed, and seconds a token afterwards."""
    found = {}
    # Kernels compile.
    seconds_of(engine, "first", place.prompt("first", contexts[0] // 2), 4)
    for context in contexts:
        tokens = place.prompt(f"speed {context}", context)
        prefill = sum(seconds_of(engine, f"{context} computed", tokens, 1))
        steps = seconds_of(engine, f"{context} decoded", tokens, place.size.tokens + 8)
        found[context] = {"prefill": prefill, "token": statistics.median(steps[8:])}
        print(
            f"  context {context:,}: computed in {prefill:.2f} s, then {1e3 * found[context]['token']:.2f} ms a token",
            flush=True,
        )
        forget(engine)
    return found


def speed(place: Place) -> dict[str, Any]:
    size = place.size
    environment = {} if size.cpu else V2
    result: dict[str, Any] = {}
    print("all local", flush=True)
    options = place.options(size.large, max(size.contexts) + 256)
    room = (max(size.contexts) + 1024) * place.token_bytes(size.large)
    own = place.engine("speed, all local", environment, options | {"kv_cache_memory_bytes": room})
    try:
        result["all local"] = costs(own, place, size.contexts)
    finally:
        own.close()
    print("stitched", flush=True)
    donors = place.lend(size.large_lent, size.large_slab, place.ranks)
    options = place.options(size.large, size.longest + 256) | {
        "kv_cache_memory_bytes": size.large_own,
        "worker_cls": "swiftcache.vllm.StreamWorker",
        "connector": place.stitched(size.window if size.cpu else 0, size.large_lent),
    }
    engine = place.engine("speed, stitched", environment, options)
    try:
        result["said"] = said(log_file(place.report, "speed, stitched"))
        print(f"  {json.dumps(result['said'])}", flush=True)
        result["stitched"] = costs(engine, place, size.contexts)
        # The longest context last but one, and the withdrawal in the one before it.
        context = max(size.contexts)
        tokens = place.prompt(f"speed {context}", context)
        seconds_of(engine, "again", tokens, 1)
        truth = asked(engine, {"undisturbed": tokens}, size.tokens * 4)["undisturbed"]
        engine.ask("add", name="withdrawn", tokens=tokens, max_tokens=size.tokens * 4, logprobs=True)
        quiet = engine.ask("step", count=size.tokens)["seconds"][8:]
        before = look(engine)["moved_units"]
        donors.withdraw()
        rest = engine.ask("step", count=0)
        while not donors.over():
            seconds_of(engine, "let go", tokens[: len(tokens) // 4], 8)
        on_floor = seconds_of(engine, "on the floor", tokens, size.tokens)[8:]
        result["withdrawn"] = {
            "equal": same(truth, rest["finished"]["withdrawn"]),
            "quiet_ms": 1e3 * statistics.median(quiet),
            "longest_pause_ms": 1e3 * max(rest["seconds"]),
            "seconds": sum(rest["seconds"]),
            "on_floor_ms": 1e3 * statistics.median(on_floor),
            "moved_units": look(engine)["moved_units"] - before,
        }
        print(f"  withdrawn: {json.dumps(result['withdrawn'])}", flush=True)
        donors = place.lend(size.large_lent, size.large_slab, place.ranks)

        def back() -> bool:
            seconds_of(engine, "steps", tokens[:64], 2)
            return look(engine)["on_floor"] == 0

        eventually("the pool to be back on the donor", back)
        forget(engine)
        result["longest"] = costs(engine, place, [size.longest])
    finally:
        engine.close()
        donors.close()
    result["passed"] = result["withdrawn"]["equal"] and result["withdrawn"]["moved_units"] > 0
    return result


def longest(place: Place) -> dict[str, Any]:
    size = place.size
    environment = {} if size.cpu else V2
    token = place.token_bytes(size.long)
    # Some tokens less than there is room for: each layer ends within a slab, and vLLM keeps a block.
    context = size.whole // token * 95 // 100 - size.answer - 64
    # Eager: a step at such a context takes far longer than starting its kernels.
    options = place.options(size.long, context + size.answer + 64) | {"enforce_eager": True}
    prompt = place.prompt("longest", context)

    def answered(engine: Engine, name: str) -> tuple[dict[str, Any], dict[str, float]]:
        """The answer, and the seconds that it took."""
        # Kernels compile.
        asked(engine, {"first": prompt[-context // 16 :]}, size.answer)
        engine.ask("add", name=name, tokens=prompt, max_tokens=size.answer, logprobs=True)
        done = engine.ask("step", count=0)
        first = len(done["seconds"]) - size.answer + 1
        seconds = {"prefill": sum(done["seconds"][:first]), "token": statistics.median(done["seconds"][first:])}
        print(f"  {name}, {context:,} tokens: {json.dumps(seconds)}", flush=True)
        return done["finished"][name], seconds

    engine = place.engine(
        "longest, all local",
        environment,
        options | {"kv_cache_memory_bytes": (context + 1024) * token, "connector": place.settings()},
    )
    try:
        truth, all_local = answered(engine, "all local")
    finally:
        engine.close()
    pools: dict[str, Any] = {}
    for own in size.owns:
        name = f"{own / GiB:g} GiB"
        lent = -(-(size.whole - own + 2 * size.long_window) // size.large_slab) * size.large_slab
        donors = place.lend(lent, size.large_slab, place.ranks)
        stitched = {"kv_cache_memory_bytes": own, "connector": place.stitched(size.long_window, lent)}
        stitched |= {"worker_cls": "swiftcache.vllm.StreamWorker"}
        engine = place.engine(f"longest, {name}", environment, options | stitched)
        try:
            one, seconds = answered(engine, name)
            pools[name] = seconds | {
                "apart": apart(truth, one),
                "said": said(log_file(place.report, f"longest, {name}")),
            }
            print(f"  {json.dumps(pools[name])}", flush=True)
            # Of a shorter prompt, computed twice: one that is cached is read in place, and no window is used.
            control = {"control": prompt[: size.control * place.ranks]}
            forget(engine)
            right = asked(engine, control, size.answer)["control"]
            forget(engine)
            before = look(engine)["staged"]
            engine.ask("rig", stale=True)
            wrong = asked(engine, control, size.answer)["control"]
            pools[name] |= {"control_equal": same(right, wrong), "control_staged": look(engine)["staged"] - before}
        finally:
            engine.close()
            donors.close()
    return {
        "context": context,
        "all local": all_local,
        "pools": pools,
        "passed": all(
            of["apart"]["first_equal"] == size.answer and of["control_staged"] and not of["control_equal"]
            for of in pools.values()
        ),
    }


def said(log: Path) -> dict[str, float]:
    """What the engine's log tells its user when it starts."""
    text = " ".join(log.read_text(errors="replace").split())
    pattern = (
        r"stitched pool: (?P<fit>\d+) tokens fit, (?P<times>[\d.]+) times the (?P<local>\d+).*?at (?P<at>\d+) tokens a "
        r"new token reads (?P<bytes>\d+) bytes.*?about (?P<ms>[\d.]+) ms at the (?P<rate>\d+) GB/s"
    )
    text = re.sub(r"\(EngineCore[^)]*\) |INFO \S+ \S+ \[[^]]*\] ", "", text)
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{log} does not say what fits")
    return {name: float(value) for name, value in found.groupdict().items()}


def plot(results: dict[str, Any], file: Path, title: str) -> bool:
    """What a token costs by the length of its context. Returns whether matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    speed = results["speed"]
    figure, axis = pyplot.subplots(figsize=(7, 4))
    series = {"all local": speed["all local"], "stitched": speed["stitched"] | speed["longest"]}
    for (name, of), colour in zip(series.items(), ("#888888", "#4878a8"), strict=True):
        contexts = [int(context) for context in of]
        axis.plot(contexts, [1e3 * one["token"] for one in of.values()], "o-", label=name, color=colour)
    said, withdrawn = speed["said"], speed["withdrawn"]
    each = said["bytes"] / (said["at"] - said["local"])
    contexts = [said["local"], *(int(context) for context in speed["longest"])]
    expected = [1e3 * (context - said["local"]) * each / (said["rate"] * 1e9) for context in contexts]
    axis.plot(contexts, expected, ":", color="#4878a8", label=f"leased bytes at {said['rate']:.0f} GB/s")
    floor = [max(int(context) for context in speed["stitched"])]
    axis.plot(floor, [withdrawn["on_floor_ms"]], "s", color="#b06030", label="all taken back: read from host memory")
    axis.axvline(said["local"], color="#bbbbbb", linewidth=1)
    axis.annotate("local memory ends", (said["local"], axis.get_ylim()[1] * 0.9), color="#777777", fontsize=8)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("ms a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file)
    return True


def table(results: dict[str, Any]) -> str:
    rows: list[str] = []
    if results["identity"]:
        rows += [
            "| configuration | one at a time | from its own prefix cache | longer than a window | at once | control | "
            "taken back in mid-decode | from host memory | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for name, of in results["identity"].items():
        if "error" in of:
            rows.append(f"| {name} | | | | | | | | FAILED {of['error'][:80]} |")
            continue
        parts = of["apart"].get("longer than a window")
        longer = (
            f"{parts['first_equal']} of {parts['of']} tokens, logprobs {parts['logprobs_apart']:.4f} apart"
            if parts
            else ""
        )
        if shorter := (of["apart_in_shorter_steps"] or {}).get("longer than a window"):
            longer += f"; all local in shorter steps: {shorter['first_equal']} of {shorter['of']}"

        def yes(equal: bool) -> str:
            return "equal" if equal else "DIFFERENT"

        whole = {called: equal for called, equal in of["equal"].items() if called != "longer than a window"}
        rows.append(
            f"| {name} | {sum(whole.values())} of {len(whole)} equal | {sum(of['prefix_equal'].values())} of "
            f"{len(of['prefix_equal'])} equal | {longer} | {of['batch_equal']} of {of['batch']} equal | "
            f"{'EQUAL' if of['control_equal'] else 'different'} | {yes(of['withdrawn_equal'])} | "
            f"{yes(of['on_floor_equal'])} | {'passed' if of['passed'] else 'FAILED'} |"
        )
    if (of := results.get("longest")) and "error" in of:
        rows.append(f"\nlongest: FAILED {of['error'][:200]}")
    elif of:
        rows += [
            "",
            f"| {of['context']:,} tokens | local tokens | times | computed | a token | said at start | tokens equal "
            "| control |",
            "|---|---:|---:|---:|---:|---:|---|---|",
            f"| all local | | | {of['all local']['prefill']:.1f} s | {1e3 * of['all local']['token']:.1f} ms | | | |",
        ]
        for name, one in of["pools"].items():
            local, near = one["said"]["local"], one["apart"]
            rows.append(
                f"| {name} local | {local:,.0f} | {of['context'] / local:.1f} | {one['prefill']:.1f} s | "
                f"{1e3 * one['token']:.1f} ms | {one['said']['ms']:.1f} ms | {near['first_equal']} of {near['of']}, "
                f"logprobs at most {near['logprobs_apart']:.4f} apart | "
                f"{'EQUAL' if one['control_equal'] else 'different'} |"
            )
    if (of := results.get("speed")) and "error" in of:
        rows.append(f"\nspeed: FAILED {of['error'][:200]}")
    elif of:
        rows += [
            "",
            "| context | computed: all local | stitched | a token: all local | stitched |",
            "|---:|---:|---:|---:|---:|",
        ]
        for context, stitched in (of["stitched"] | of["longest"]).items():
            local = of["all local"].get(context)
            first = f"{local['prefill']:.2f} s" if local else ""
            each = f"{1e3 * local['token']:.2f} ms" if local else ""
            rows.append(
                f"| {context:,} | {first} | {stitched['prefill']:.2f} s | {each} | {1e3 * stitched['token']:.2f} ms |"
            )
        rows.append(f"\nat start: {json.dumps(of['said'])}\nwithdrawn: {json.dumps(of['withdrawn'])}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for context.json and logs")
    parser.add_argument("--cpu", action="store_true", help="try the script: vLLM's CPU build, simulated devices")
    parser.add_argument("--ranks", type=int, default=1, help="of each engine, but for those of identity that have two")
    parser.add_argument("--donors", type=int, default=1, help="on the last devices, which lend alike")
    parser.add_argument("--part", choices=("identity", "speed", "longest"), help="only this")
    parser.add_argument("--only", default="", help="configurations of identity that this regular expression finds")
    parser.add_argument("--at-once", type=int, default=3, help="configurations of identity that run at a time")
    speed_of = parser.add_argument_group("speed")
    speed_of.add_argument("--shape", default="qwen3-8b", help="of the model")
    speed_of.add_argument("--own", type=int, default=6 * GiB, help="bytes of local KV cache of each rank")
    speed_of.add_argument("--lent", type=int, default=64 * GiB, help="bytes that donors lend to each rank")
    speed_of.add_argument("--contexts", type=int, nargs="+", default=[32_768, 131_072], help="tokens, beside all local")
    speed_of.add_argument("--longest", type=int, default=400_000, help="tokens of the longest context")
    longest_of = parser.add_argument_group("longest")
    longest_of.add_argument("--pools", type=int, nargs="+", default=[12 * GiB, 6 * GiB], help="bytes of local KV cache")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"identity": {}}
    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory), args, Size(args.cpu, args))

        def guarded(work: Any, *arguments: Any) -> dict[str, Any]:
            try:
                return work(place, *arguments)
            except Exception as reason:
                traceback.print_exc()
                return {"passed": False, "error": str(reason)[-3000:]}

        try:
            results["on"] = f"{place.ground.hardware}; the lent memory is on {place.ground.way}"
            if args.part in (None, "identity"):

                def one(name: str, how: tuple[dict[str, str], dict[str, Any]]) -> None:
                    results["identity"][name] = guarded(identity, name, *how)
                    print(name, json.dumps(results["identity"][name]), flush=True)

                wanted = chosen(configurations(args.cpu), args.only)
                with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
                    list(pool.map(lambda item: one(*item), wanted.items()))
            if args.part in (None, "speed"):
                results["speed"] = guarded(speed)
            if args.part in (None, "longest"):
                results["longest"] = guarded(longest)
        finally:
            place.ground.close()
    (args.report / "context.json").write_text(json.dumps(results, indent=1))
    if "error" not in results.get("speed", {"error": ""}):
        plot(
            results, args.report / "context.svg", f"Contexts larger than local HBM: {place.size.large}\n{results['on']}"
        )
    print(f"{results['on']}\n{table(results)}")
    passed = [of["passed"] for of in results["identity"].values()]
    passed += [results[part]["passed"] for part in ("speed", "longest") if part in results]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
