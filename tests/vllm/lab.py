"""What the engine tests share: configurations, workloads, and the tokens each gives without SwiftCache."""

from __future__ import annotations

import json
import os
import random
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from engine import Engine
from neighbours import SLAB
from node import Node, eventually

REPO = Path(__file__).resolve().parents[2]
HOME = REPO / "target" / "vllm"
BLOCK = 32
ANSWER = 16
"""Tokens of each answer."""
POOL = 256
"""Blocks of an engine's own pool: 8,192 tokens."""
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}

GUESSES = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "eagle": {"method": "eagle", "num_speculative_tokens": 2},
    "mtp": {"method": "mtp", "num_speculative_tokens": 2},
}


ENVIRONMENT = {
    # One thread: with more, every step waits for whoever else uses the cores.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CACHE_ROOT": str(HOME / "cache"),
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # So that events name blocks as SwiftCache can, too.
    "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "0",
}


def options(model: str = "llama", seed: int = 0, **more: Any) -> dict[str, Any]:
    base = {
        "model": str(models.make(model, HOME / "models", seed)),
        "skip_tokenizer_init": True,
        # vLLM's CPU kernels of GDN are in this precision.
        "dtype": "bfloat16" if model.startswith("qwen3next") else "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": POOL,
        "block_size": BLOCK,
        "distributed_executor_backend": "uni",
        "async_scheduling": False,
        "disable_log_stats": True,
    }
    return base | more


def guessing(how: str) -> dict[str, Any]:
    """An engine's option to guess tokens."""
    draft = {"model": str(models.make("eagle", HOME / "models"))} if how == "eagle" else {}
    return {"speculative_config": GUESSES[how] | draft}


def tokens(seed: object, count: int) -> list[int]:
    source = random.Random(str(seed))
    return [source.randrange(models.VOCABULARY) for _ in range(count)]


def shared_prefix() -> dict[str, list[int]]:
    """Four at once, alike for 200 tokens."""
    return {f"shared-{number}": tokens("prefix", 200) + tokens(number, 70 + 10 * number) for number in range(4)}


def long_prompt() -> dict[str, list[int]]:
    """Longer than a step takes: its prefill comes in chunks."""
    return {"long": tokens("long", 700)}


def talk(engine: Engine, turns: int = 3, between: Callable[[int], Any] = lambda turn: None, name: str = "talk"):
    """A conversation: each prompt is all that was said before, and something new."""
    history, said = tokens(name, 90), {}
    for turn in range(turns):
        label = f"{name}-{turn}"
        said |= engine.generate({label: history}, ANSWER)
        history = history + said[label]["tokens"] + tokens(f"{name}{turn}", 45)
        between(turn)
    return said


def play(engine: Engine, between: Callable[[int], Any] = lambda turn: None) -> dict[str, dict[str, Any]]:
    """All workloads."""
    results = engine.generate(shared_prefix(), ANSWER)
    results |= engine.generate(long_prompt(), ANSWER)
    return results | talk(engine, between=between)


def said(results: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    return {name: result["tokens"] for name, result in results.items()}


def matching(
    want: dict[str, list[int]], phase: Callable[[], dict[str, dict[str, Any]]], rounds: int = 2
) -> dict[str, dict[str, Any]]:
    """The results of a phase whose tokens are those of `want`, in its second round at the latest. Others' pace decides
    which requests share a step; sums round differently in other company, and once in a long while a token follows.
    Wrong bytes are wrong again."""
    for _ in range(rounds):
        results = phase()
        differ = [name for name, tokens in said(results).items() if tokens != want.get(name)]
        if not differ:
            return results
        warnings.warn(f"other tokens than without SwiftCache: {differ}", stacklevel=2)
    raise AssertionError(f"other tokens than without SwiftCache, in round {rounds}: {differ}")


def cached(results: dict[str, dict[str, Any]]) -> int:
    return sum(result["cached"] for result in results.values())


def traces() -> list[list[list[int]]]:
    """Conversations of agents, as far as they fit: their texts, four characters a token."""
    directory = Path(os.environ.get("SWIFTCACHE_TRACES", REPO.parent / "shared" / "traces" / "agent_miniswe"))
    found = []
    for file in sorted(directory.glob("*.jsonl"))[:3]:
        texts = [json.loads(line)["input"].encode() for line in file.read_text().splitlines()]
        turns = [[zlib.crc32(text[at : at + 4]) % models.VOCABULARY for at in range(0, len(text), 4)] for text in texts]
        fitting = sorted((turn for turn in turns if len(turn) < 3000), key=len)[:3]
        if fitting:
            found.append(fitting)
    return found


def play_traces(engine: Engine) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for number, conversation in enumerate(traces()):
        for turn, prompt in enumerate(conversation):
            results |= engine.generate({f"agent-{number}-{turn}": prompt}, ANSWER)
    return results


def connect(engine: Engine, node: Node, *, wait: bool = True, events: bool = False, connector: Any = None, **more: Any):
    """Starts an engine with SwiftCache, and waits until it has leased room."""
    # A late lookup is a miss, which on a busy machine would be one here and there.
    defaults = {"max_leased_bytes": 8 * SLAB, "lease_step_bytes": SLAB, "lookup_ms": 60_000}
    settings = {"socket": node.socket} | defaults | (connector or {})
    started = engine.start(**options(**more), connector=settings, events=events)
    assert started["policy"] == "recompute"
    if wait:
        eventually("a lease", lambda: engine.ask("leased"))
    return started


class Lab:
    """Engine processes, and what each configuration answers without SwiftCache."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._engines: dict[str, Engine] = {}
        self._wanted: dict[str, dict[str, Any]] = {}

    def engine(self, name: str, environment: dict[str, str] | None = None) -> Engine:
        if name not in self._engines:
            self._engines[name] = Engine(self._logs / f"{name}.log", ENVIRONMENT | (environment or {}))
        return self._engines[name]

    def want(self, name: str, work: Callable[[Engine], dict[str, Any]] = play, **more: Any) -> dict[str, list[int]]:
        """What the configuration says without the connector; run in the idle engine `name`."""
        key = json.dumps([work.__module__, work.__qualname__, more], sort_keys=True)
        if key not in self._wanted:
            engine = self.engine(name)
            engine.start(**options(**more))
            self._wanted[key] = said(work(engine))
            engine.ask("stop")
        return self._wanted[key]

    def kill(self, name: str) -> None:
        """Kills an engine process. The next one of this name is a new one."""
        self._engines.pop(name).kill()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
