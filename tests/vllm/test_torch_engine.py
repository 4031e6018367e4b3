"""The GPU machine's PyTorch check and measurements, here in shared memory, so that they run there too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lab as of

SCRIPTS = of.REPO / "tests" / "gpu" / "torch_engine"


def run(script: str, *arguments: str) -> str:
    options = ["--programs", str(of.REPO / "target" / "debug"), "--device", "cpu", "--shape", "tiny"]
    command = [sys.executable, str(SCRIPTS / script), *options, *arguments]
    environment = os.environ | of.ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_blocks_replicas_and_loans_under_pytorch() -> None:
    said = run("check.py")
    assert "a replica in another process loads the same" in said
    assert "were lent, borrowed, and taken back empty" in said


def test_the_time_to_the_first_token_is_measured_by_where_the_prefix_is(tmp_path: Path) -> None:
    file = tmp_path / "ttft.json"
    said = run("ttft.py", "--tokens", "256", "512", "--turn", "64", "--rounds", "2", "--json", str(file))
    report = json.loads(file.read_text())
    assert [row["prefix_tokens"] for row in report["rows"]] == [256, 512]
    arms = {"computed", "host memory", "donor (shared memory, no GPU)", "resident"}
    for row in report["rows"]:
        assert row["ttft_ms"].keys() == arms and min(row["ttft_ms"].values()) > 0
    assert "| 512 tokens |" in said and "no GPU" in said


def test_what_the_neighbour_notices_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "neighbour.json"
    said = run("neighbour.py", "--rounds", "2", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["work"] for row in rows] == ["matrix products", "passes over memory"]
    assert all(row["slowdown"] > 0 and row["read_gb_per_s"] > 0 for row in rows)
    assert "no GPU" in said
