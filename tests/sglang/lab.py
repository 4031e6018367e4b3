"""What the engine tests share: configurations, workloads, and the tokens each gives without SwiftCache."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import Engine, Nursery
from node import Node, eventually

REPO = Path(__file__).resolve().parents[2]
HOME = REPO / "target" / "sglang"
SLAB = 8 << 20
ANSWER = 12
"""Tokens of each answer."""
POOL = 2048
"""Tokens of an engine's own pool: the prompts of `evicting` push each other out of it."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # One thread: with more, every step waits for whoever else uses the cores.
    "OMP_NUM_THREADS": "1",
    # SGLang's own checks: ranks that decide differently, and memory that is held when the engine is idle, end it.
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "TORCH_EXTENSIONS_DIR": str(HOME / "cache"),
    "PYTHONPATH": ":".join(
        str(REPO / part) for part in ("tests/sglang/stubs", "tests/sglang", "engine-adapter/python")
    ),
}


def _models() -> Any:
    """The tiny models of tests/vllm."""
    spec = importlib.util.spec_from_file_location("models", REPO / "tests" / "vllm" / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = _models()


def model(kind: str = "llama", seed: int = 0) -> str:
    return str(models.make(kind, HOME / "models", seed))


def options(kind: str = "llama", seed: int = 0, page: int = 16, **more: Any) -> dict[str, Any]:
    base = {
        "model_path": model(kind, seed),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "float32",
        "mem_fraction_static": 0.2,
        "context_length": 1024,
        "max_total_tokens": POOL,
        "page_size": page,
        "skip_server_warmup": True,
        "log_level": "info",
    }
    return base | more


def linked(node: Node, linker: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Options of an engine with SwiftCache."""
    # A late lookup is a miss, which on a busy machine would be one here and there.
    settings = {"socket": node.socket, "max_leased_bytes": 8 * SLAB, "lease_step_bytes": SLAB, "lookup_ms": 60_000}
    return options(
        enable_unified_cache_external_linker=True,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config={
            "linker": "ProbedLinker",
            "linker_module_path": "probe",
            "linker_extra_config": settings | (linker or {}),
        },
        **more,
    )


def connect(engine: Engine, node: Node, *, linker: dict[str, Any] | None = None, **more: Any) -> None:
    """Starts an engine with SwiftCache, and waits until every rank has leased room."""
    environment = more.pop("environment", None)
    engine.start(environment, **linked(node, linker, **more))
    eventually("a lease", engine.leased)


def donate(node: Node, slabs: int = 16, device: str = "SIM-1") -> subprocess.Popen[bytes]:
    return node.start_donor(device, slabs, SLAB)


# Workloads.


def tokens(seed: object, count: int) -> list[int]:
    source = random.Random(str(seed))
    return [source.randrange(models.VOCABULARY) for _ in range(count)]


def evicting() -> dict[str, list[int]]:
    return {f"evicting-{number}": tokens(number, 450) for number in range(5)}


def shared_prefix() -> dict[str, list[int]]:
    """Alike for 200 tokens."""
    return {f"shared-{number}": tokens("prefix", 200) + tokens(f"s{number}", 70 + 10 * number) for number in range(4)}


def long_prompt() -> dict[str, list[int]]:
    """Its prefill comes in chunks, where these are 256 tokens."""
    return {"long": tokens("long", 900)}


def talk(engine: Engine) -> dict[str, dict[str, Any]]:
    """A conversation: each prompt is all that was said before, and something new."""
    history, said = tokens("talk", 90), {}
    for turn in range(3):
        said |= engine.generate({f"talk-{turn}": history}, ANSWER)
        history = history + said[f"talk-{turn}"]["tokens"] + tokens(f"talk{turn}", 45)
    return said


def play(engine: Engine) -> dict[str, dict[str, Any]]:
    """All workloads, the first one last: its prompts push out what was there."""
    results = engine.generate(shared_prefix(), ANSWER)
    results |= engine.generate(long_prompt(), ANSWER)
    results |= talk(engine)
    return results | engine.generate(evicting(), ANSWER, at_once=False)


def said(results: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    return {name: result["tokens"] for name, result in results.items()}


def cached(results: dict[str, dict[str, Any]]) -> int:
    return sum(result["cached"] for result in results.values())


def failed(results: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, result in results.items() if (result["finish"] or {}).get("type") != "length"]


def right(results: dict[str, dict[str, Any]], want: dict[str, list[int]]) -> None:
    """None failed, and none has other tokens than without SwiftCache."""
    assert failed(results) == []
    assert said(results).items() <= want.items()


class Meanwhile:
    """Work on another thread while a test does something to the node. Leaving it waits for the work, and raises what
    it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._problem, self.result = work, None, None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as problem:
            self._problem = problem

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def __enter__(self) -> Meanwhile:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.join()
        if self._problem is not None and kind is None:
            raise self._problem


class Lab:
    """Engines, and what each model answers without SwiftCache."""

    def __init__(self, directory: Path) -> None:
        self._nursery = Nursery(directory, ENVIRONMENT)
        self._engines: dict[str, Engine] = {}
        self._wanted: dict[str, dict[str, list[int]]] = {}

    def engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = Engine(self._nursery, name)
        return self._engines[name]

    def want(self, kind: str = "llama", seed: int = 0, **more: Any) -> dict[str, list[int]]:
        key = repr((kind, seed, sorted(more.items())))
        if key not in self._wanted:
            with self.engine("plain").running(**options(kind, seed, **more)) as engine:
                self._wanted[key] = said(play(engine))
        return self._wanted[key]

    def close(self) -> None:
        for engine in self._engines.values():
            engine.stop()
        self._nursery.close()
