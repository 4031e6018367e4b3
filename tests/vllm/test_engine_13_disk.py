"""A prompt is stored, falls to a disk, and everything is started again: engine, broker, donor, agent. The same prompt
is found, and its tokens are the same.
"""

from __future__ import annotations

import lab as of
import pytest
from neighbours import SLAB, donate
from node import Node, eventually

SETTINGS = {"load": "sync", "max_leased_bytes": 0, "max_host_leased_bytes": 64 << 20, "disk_ms": 60_000}
PROMPT = of.long_prompt()
BLOCKS = (len(PROMPT["long"]) - 1) // of.BLOCK


def started(lab, directory, name: str, engine: str, disk):
    """A node of its own, with an engine. `disk`: the directory of the file, or none."""
    directory = directory / name
    directory.mkdir()
    node = Node(directory)
    node.start_broker()
    donate(node, device="HOST-0")
    if disk:
        node.start_disk(disk, size="256MiB", memory=8 * SLAB)
    one = lab.engine(engine)
    of.connect(one, node, wait=False, connector=SETTINGS)
    eventually("leased host memory", lambda: one.ask("stats").get("host_leased_bytes", 0))
    return node, one


@pytest.mark.parametrize("kept", [True, False], ids=["disk", "no-disk"])
def test_a_prompt_outlives_engine_broker_and_memory_on_a_disk(lab, tmp_path, kept) -> None:
    want = lab.want("a")
    disk = tmp_path / "disk"
    node, engine = started(lab, tmp_path, "first", "a", disk)
    assert of.said(engine.generate(PROMPT, of.ANSWER)).items() <= want.items()
    engine.ask("settle")
    eventually("the prompt on the disk", lambda: node.status()["disks"][0]["blocks"] >= BLOCKS)
    engine.ask("stop")
    node.close()
    node, engine = started(lab, tmp_path, "second", "b", disk if kept else None)
    assert node.status()["indexed_blocks"] == 0
    if kept:
        eventually("what is on the disk", lambda: node.status()["disks"][0]["blocks"] >= BLOCKS)
    results = engine.generate(PROMPT, of.ANSWER)
    assert of.said(results).items() <= want.items()
    # The twin has no disk, and computes everything.
    assert of.cached(results) == (BLOCKS * of.BLOCK if kept else 0)
    if kept:
        [shown] = node.status()["disks"]
        assert shown["read_blocks"] >= BLOCKS and shown["corrupt_blocks"] == shown["failed_blocks"] == 0
    engine.ask("stop")
    node.close()
