"""The GPU machine's check of the gate, here in shared memory, so that it runs there too."""

from __future__ import annotations

import os
import subprocess
import sys

import lab as of


def test_gates_under_pytorch() -> None:
    script = of.REPO / "tests" / "gpu" / "sglang" / "gate.py"
    options = ["--programs", str(of.REPO / "target" / "debug"), "--device", "cpu", "--rounds", "2"]
    environment = os.environ | {"PYTHONPATH": str(of.REPO / "engine-adapter" / "python"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rounds: 24 layers" in done.stdout and "was noticed" in done.stdout
