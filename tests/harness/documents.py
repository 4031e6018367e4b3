"""What a page of docs/ says about an engine, held against what is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def check_example(page: str, example: str, model: str, environment: Mapping[str, str]) -> None:
    """The example runs as written, and prints what the page shows."""
    said = re.search(r"```\n(first turn: .*?)```", page, re.DOTALL)
    assert said is not None
    # A late lookup is a miss, which on a busy machine would be one here and there.
    environment = os.environ | environment | {"SWIFTCACHE_LOOKUP_MS": "60000"}
    ran = subprocess.run(
        [sys.executable, example, model],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    for line in said[1].splitlines():
        assert line in ran.stdout.splitlines()


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def named(text: str) -> set[str]:
    """What the first column of a table names."""
    rows = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}
