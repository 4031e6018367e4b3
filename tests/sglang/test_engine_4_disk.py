"""Pages that lie on a disk only: their request waits for them, while others are served; and it computes them when it
may not wait, or when the disk does not answer.
"""

from __future__ import annotations

import signal

import lab as of
import pytest
from engine import Engine
from node import eventually, stop

PAGE = 16
LONG_MS = 60_000
HOST = {"max_leased_bytes": 0, "max_host_leased_bytes": 8 * of.SLAB}
RANKS = {"tp_size": 2, "disable_custom_all_reduce": True, "environment": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}}


@pytest.fixture(scope="module")
def disk(node, tmp_path_factory):
    node.start_broker()
    of.donate(node, slabs=32, device="HOST-0")
    return node.start_disk(tmp_path_factory.mktemp("disk"), size="256MiB", memory=4 * of.SLAB)


def pages(prompt: list[int]) -> int:
    return (len(prompt) - 1) // PAGE


def connected(lab, node, disk_ms: int, **more) -> Engine:
    engine = lab.engine("a")
    of.connect(engine, node, linker=HOST | {"disk_ms": disk_ms}, **more)
    return engine


def on_disk_only(lab, node, prompts: dict[str, list[int]], **more) -> dict[str, list[int]]:
    """An engine computes some prompts, and is gone when they lie on the disk. Returns its tokens."""

    def blocks() -> int:
        [shown] = node.status()["disks"]
        return shown["blocks"]

    before, in_memory = blocks(), node.status()["indexed_blocks"]
    engine = connected(lab, node, 0, **more)
    results = engine.generate(prompts, of.ANSWER, at_once=False)
    assert of.failed(results) == []
    ranks = more.get("tp_size", 1)
    eventually("them on the disk", lambda: blocks() >= before + ranks * sum(map(pages, prompts.values())))
    engine.stop()
    # What has come back for another test may still be there.
    eventually("memory without them", lambda: node.status()["indexed_blocks"] <= in_memory)
    return of.said(results)


@pytest.mark.parametrize("more", [{}, RANKS], ids=["one-rank", "two-ranks"])
def test_a_request_waits_for_a_disk_and_others_do_not(lab, node, disk, more) -> None:
    prompt, other = of.tokens("disk", 450), of.tokens("other", 300)
    want = on_disk_only(lab, node, {"disk": prompt}, **more)
    engine = connected(lab, node, LONG_MS, **more)
    # A disk that does not answer for a while: who wants nothing of it is served, and its pages are stored.
    stop(disk)
    stored = engine.native("stored_blocks") + more.get("tp_size", 1) * pages(other)
    with of.Meanwhile(lambda: engine.generate({"disk": prompt, "other": other}, of.ANSWER)) as both:
        try:
            eventually("the other request to be served", lambda: engine.native("stored_blocks") >= stored)
            assert not both.over
        finally:
            disk.send_signal(signal.SIGCONT)
    of.right({"disk": both.result["disk"]}, want)
    assert of.failed(both.result) == []
    assert {name: its["cached"] for name, its in both.result.items()} == {"disk": pages(prompt) * PAGE, "other": 0}
    assert engine.count("aborted_loads") == engine.count("unwaited_batches") == 0
    engine.stop()


def test_a_request_that_may_not_wait_computes(lab, node, disk) -> None:
    """The twin."""
    prompt = of.tokens("hurried", 450)
    want = on_disk_only(lab, node, {"hurried": prompt})
    engine = connected(lab, node, 0)
    results = engine.generate({"hurried": prompt}, of.ANSWER)
    of.right(results, want)
    assert of.cached(results) == 0
    engine.stop()


def test_a_disk_that_does_not_answer_holds_nobody_up_for_longer_than_that(lab, node, disk) -> None:
    prompt = of.tokens("stopped", 450)
    want = on_disk_only(lab, node, {"stopped": prompt})
    engine = connected(lab, node, 50)
    stop(disk)
    try:
        results = engine.generate({"stopped": prompt}, of.ANSWER)
    finally:
        disk.send_signal(signal.SIGCONT)
    of.right(results, want)
    assert of.cached(results) == 0
    [shown] = node.status()["disks"]
    assert shown["corrupt_blocks"] == shown["failed_blocks"] == 0
    engine.stop()
