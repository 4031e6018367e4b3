"""docs/sglang.md: the example runs as written, and prints what the page says."""

from __future__ import annotations

from dataclasses import fields

import lab as of
from documents import check_example, named, section

PAGE = (of.REPO / "docs" / "sglang.md").read_text()


def test_the_example_prints_what_the_docs_say() -> None:
    check_example(PAGE, "engine-adapter/examples/sglang_cpu.py", of.model(), of.ENVIRONMENT)


def test_every_setting_and_metric_is_documented() -> None:
    from swiftcache.engine.metrics import COUNTERS, GAUGES
    from swiftcache.engine.settings import Settings
    from swiftcache.sglang.metrics import SGLANG_COUNTERS

    assert named(section(PAGE, "Settings")) == {field.name for field in fields(Settings)}
    counters = COUNTERS | SGLANG_COUNTERS
    assert named(section(PAGE, "Metrics")) == {f"{name}_total" for name in counters} | set(GAUGES)


def test_every_refused_flag_is_documented() -> None:
    from swiftcache.sglang import safety

    text = section(PAGE, "What is served")
    assert [name for name, _, _ in safety._REFUSED if f"--{name.replace('_', '-')}`" not in text] == []
