"""docs/sglang.md: the example runs as written, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields

import lab as of

DOCS = of.REPO / "docs" / "sglang.md"


def test_the_example_prints_what_the_docs_say() -> None:
    said = re.search(r"```\n(first turn: .*?)```", DOCS.read_text(), re.DOTALL)
    assert said is not None
    command = [sys.executable, "engine-adapter/examples/sglang_cpu.py", of.model()]
    # A late lookup is a miss, which on a busy machine would be one here and there.
    environment = os.environ | of.ENVIRONMENT | {"SWIFTCACHE_LOOKUP_MS": "60000"}
    ran = subprocess.run(
        command, cwd=of.REPO, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    for line in said[1].splitlines():
        assert line in ran.stdout.splitlines()


def test_every_setting_and_metric_is_documented() -> None:
    from swiftcache.engine.metrics import COUNTERS, GAUGES
    from swiftcache.engine.settings import Settings
    from swiftcache.sglang.metrics import SGLANG_COUNTERS

    text = DOCS.read_text()
    assert named(section(text, "Settings")) == {field.name for field in fields(Settings)}
    counters = COUNTERS | SGLANG_COUNTERS
    assert named(section(text, "Metrics")) == {f"{name}_total" for name in counters} | set(GAUGES)


def test_every_refused_flag_is_documented() -> None:
    from swiftcache.sglang import safety

    text = section(DOCS.read_text(), "What is served")
    assert [name for name, _, _ in safety._REFUSED if f"--{name.replace('_', '-')}`" not in text] == []


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def named(text: str) -> set[str]:
    """What the first column of a table names."""
    rows = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}
