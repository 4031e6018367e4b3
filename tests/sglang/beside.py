"""vLLM's engine, of tests/vllm, in the environment and with the driver of that suite."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import lab as of

SUITE = of.REPO / "tests" / "vllm"
VENV = of.REPO / "target" / "vllm" / "venv"
BLOCK = 32


def _module(name: str) -> Any:
    """A file of the other suite, some of which have this one's names."""
    spec = importlib.util.spec_from_file_location(f"vllm_suite_{name}", SUITE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def engine(log: Path) -> Any:
    """Installs what is missing, and starts the driver."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TORCH_EXTENSIONS_DIR")}
    subprocess.run([SUITE / "run.sh", "--setup"], check=True, env=clean, stdin=subprocess.DEVNULL)
    environment = {
        "PYTHONPATH": str(of.REPO / "engine-adapter" / "python"),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(of.REPO / "target" / "vllm" / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return _module("engine").Engine(log, environment, python=VENV / "bin" / "python")


def options(**more: Any) -> dict[str, Any]:
    return {
        "model": of.model(),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": 640,
        "block_size": BLOCK,
        "distributed_executor_backend": "uni",
        "async_scheduling": False,
        "disable_log_stats": True,
    } | more
