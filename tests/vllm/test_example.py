"""docs/vllm.md: the example runs as written, and prints what the page says."""

from __future__ import annotations

from dataclasses import fields

import lab as of
import models
from documents import check_example, named, section

PAGE = (of.REPO / "docs" / "vllm.md").read_text()


def test_the_example_prints_what_the_docs_say() -> None:
    model = str(models.make("llama", of.HOME / "models"))
    check_example(PAGE, "engine-adapter/examples/vllm_cpu.py", model, of.ENVIRONMENT)


def test_every_setting_and_metric_is_documented() -> None:
    from swiftcache.engine.metrics import COUNTERS, GAUGES
    from swiftcache.engine.settings import Settings

    assert named(section(PAGE, "Settings")) == {field.name for field in fields(Settings)}
    assert named(section(PAGE, "Metrics")) == {f"{name}_total" for name in COUNTERS} | set(GAUGES)
