"""What the linker tells SGLang of a load, by what was found; without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fakes import Load, Noted

from swiftcache.sglang.linker import SwiftCacheLinker
from swiftcache.sglang.metrics import Shown

PAGE, PAGES = 16, 3


class Found:
    """A hit, and the load that it becomes."""

    def __init__(self, load: Load, own: int = PAGES, blocks: int = PAGES) -> None:
        self.load_made, self.own_blocks, self.blocks = load, own, blocks
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.blocks

    def load(self, blocks: list[int], after: object) -> Load:
        self.asked = blocks
        return self.load_made


def stage(found: Found, *, proven: bool = True, waits: bool = False) -> SwiftCacheLinker:
    linker = SwiftCacheLinker.__new__(SwiftCacheLinker)
    linker._quiet = Noted()
    linker._attempt = linker._quiet.attempt
    linker._page, linker._waits, linker._groups, linker._queued, linker._used = PAGE, waits, [], {}, False
    linker._behind, linker._cache = None, SimpleNamespace(mark=lambda stream: stream)
    linker._hits = SimpleNamespace(take=lambda rid, keys: found)
    linker._shown = Shown({}, enabled=False)
    linker.layer_done_counter = SimpleNamespace(proven=proven)
    return linker


def load(linker: SwiftCacheLinker) -> bool:
    slots = torch.arange(5 * PAGE, (5 + PAGES) * PAGE)
    return linker.load("r", [SimpleNamespace(keys=["k"] * PAGES, device_indices=slots)])


def test_own_blocks_are_left_to_the_forward() -> None:
    found = Found(Load())
    linker = stage(found)
    assert load(linker) and not found.load_made.finished
    assert found.asked == [5, 6, 7] and linker._queued == {"r": (found.load_made, True)}
    assert linker._shown.counts["layer_wise_loads"] == 1
    assert linker._shown.counts["promised_tokens"] == PAGES * PAGE


@pytest.mark.parametrize(
    ("found", "more"),
    [
        (Found(Load(), own=PAGES - 1), {}),
        (Found(Load()), {"proven": False}),
        (Found(Load()), {"waits": True}),
    ],
    ids=["another-engine's", "forwards-not-seen-to-wait", "told-to-wait"],
)
def test_others_are_waited_for(found, more) -> None:
    linker = stage(found, **more)
    assert load(linker) and found.load_made.finished
    assert linker._queued == {"r": (found.load_made, False)} and linker._shown.counts["waited_loads"] == 1


@pytest.mark.parametrize(
    "found",
    [Found(Load(), blocks=PAGES - 1), Found(Load([1])), Found(Load([1]), own=0)],
    ids=["no-longer-found", "missing", "failed"],
)
def test_a_load_that_is_refused_is_over(found) -> None:
    linker = stage(found)
    assert not load(linker) and linker._queued == {}
    # Nothing was begun, or nothing is on its way any more: the slots go back to SGLang.
    assert found.load_made.finished == (len(found) == PAGES)
    assert linker._shown.counts["failed_loads"] == 1 and linker._shown.counts["promised_tokens"] == 0


def test_what_another_rank_refuses_is_over_here(monkeypatch) -> None:
    found = Found(Load())
    linker = stage(found)
    monkeypatch.setattr(linker, "_all_ranks", lambda good: False)
    assert not load(linker) and found.load_made.finished and linker._queued == {}


def test_a_load_that_breaks_is_refused() -> None:
    linker = stage(Found(Load()))
    linker._hits = SimpleNamespace(take=lambda rid, keys: 1 / 0)
    assert not load(linker) and linker._quiet.kinds[0] == "a load could not start"


def test_a_load_that_is_cancelled_is_over() -> None:
    found = Found(Load())
    linker = stage(found)
    load(linker)
    assert linker.cancel_queued_load("r") and found.load_made.finished
    assert not linker.cancel_queued_load("r") and linker.start_layer_wise_loading() == -1


class Stream:
    def __init__(self, name: str, number: int = 0) -> None:
        self.name, self.cuda_stream, self.waits_for = name, number, []

    def wait_stream(self, other: Stream) -> None:
        self.waits_for.append(other.name)


@pytest.mark.parametrize("forward", [Stream("forward"), None])
def test_a_mark_is_behind_whatever_stream_a_forward_runs_on(monkeypatch, forward) -> None:
    """Without overlapped scheduling forwards run on the current stream, and with it on one of their own."""
    linker = stage(Found(Load()))
    linker._behind, linker.forward_stream = Stream("behind", 7), forward
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    assert linker._mark() == 7
    assert linker._behind.waits_for == ["current", *(["forward"] if forward else [])]
