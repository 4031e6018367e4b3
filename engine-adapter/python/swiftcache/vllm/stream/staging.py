"""Reads leased blocks through a local window while prompts are computed.

Attention over a long prompt reads the whole context once for every 128 new tokens. From a neighbour's memory that would
take ten times as long as from the engine's own. So each layer's blocks are copied to a window first, which costs one
read, and attention reads the window. There are two windows: while a layer computes, the next layer's old blocks are on
their way into the other one. New blocks, which this step writes, are copied when the layer has written them.

Steps with few new tokens (decoding) read in place: there the whole context is read once anyway, and CUDA graphs stay as
they are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swiftcache.engine.quiet import logger
from swiftcache.vllm.stream import inside
from swiftcache.vllm.stream.gather import Span, as_words, gather
from swiftcache.vllm.stream.inside import InForward
from swiftcache.vllm.stream.segments import Parts, Segmented

IN_PLACE_TOKENS = 128
"""With so many new tokens of a sequence, or fewer, attention reads the context once: in place is as good."""


@dataclass
class Batch:
    """Where the blocks of this step's contexts go in a window: request after request."""

    table: torch.Tensor
    """What to read for each block of each request: its page of the pool."""
    staged: torch.Tensor
    """The same blocks in the window."""
    all: Span
    old: Span
    """Blocks that earlier steps have written."""
    new: Span
    """The last ones, which this step writes to."""


class Side:
    """Work ahead, on a stream of its own; without a GPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done: Any = None

    def start(self, work: Callable[[], None]) -> None:
        """After all that the engine has queued until now."""
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            self._done = self._stream.record_event()

    def wait(self) -> None:
        """The engine's stream waits for what was started."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = None


def timed(work: Callable[[], None]) -> float:
    """Seconds until the work is done, on the device if it is queued there."""
    _finish()
    began = time.perf_counter()
    work()
    _finish()
    return max(time.perf_counter() - began, 1e-9)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Staging:
    def __init__(
        self, layers: Sequence[str], blocks: int, windows: Callable[[torch.Tensor], list[torch.Tensor]]
    ) -> None:
        """`layers`: in the order in which a forward comes to them. `blocks`: of the pool. `windows`: makes two for a
        layer's pages."""
        self._number = {name: number for number, name in enumerate(layers)}
        self._next = dict(itertools.pairwise(layers))
        self._pool_blocks = blocks
        self._make = windows
        self._windows: list[torch.Tensor] = []
        self._side: Side | None = None
        self._said: set[str] = set()
        self._blocks = 0
        self._ahead_allowed = False
        self._batch: Batch | None = None
        self._ahead: str | None = None
        self._home: tuple[InForward, Any, Any, Any] | None = None
        self.staged_layers = 0
        """How many times a layer's blocks went through a window."""

    def prepare(self, pages: torch.Tensor) -> None:
        """Takes the windows, for pages like these of a layer."""
        self._windows = self._make(pages)
        self._side = Side(pages.device)

    def measure(self, pages: torch.Tensor, local: int) -> float:
        """How fast a layer's leased pages, those behind the first `local` ones, are read: bytes a second. The kernel is
        compiled by that, before a request needs it."""
        window = self._windows[0]
        count = min(window.shape[0], pages.shape[0] - local)
        table = torch.arange(local, local + count, dtype=torch.int32, device=pages.device)[None]
        zero = torch.zeros(1, dtype=torch.int32, device=pages.device)
        span = Span(zero, zero + count, zero, count)
        seconds = min(timed(lambda: self._fill(window, pages, table, span)) for _ in range(3))
        return count * window.stride(0) * window.element_size() / seconds

    def begin(self, blocks: int, ahead: bool) -> None:
        """A step. `blocks`: of all its contexts, if any of them is leased, else 0. `ahead`: whether the next layer's
        old blocks are there before its turn; a load that runs layer by layer writes them later."""
        self._blocks, self._ahead_allowed = blocks, ahead
        self._batch = self._ahead = None

    def enter(self, name: str) -> None:
        """A layer has written its new KV and is about to read."""
        if self._blocks == 0:
            return
        at = inside.layer_in_forward(name)
        if at is None or at.metadata.max_query_len <= IN_PLACE_TOKENS:
            return
        if reason := inside.why_in_place(at.layer, at.metadata):
            self._say_in_place(reason)
            return
        if not self._windows:
            self.prepare(at.pages)
        if self._windows[0].shape[1:] != at.pages.shape[1:]:
            self._say_in_place(f"the pages of layer {name} are not those of other layers")
            return
        # A kernel may cut a block into several.
        blocks = self._blocks * (at.pages.shape[0] // self._pool_blocks)
        self._home = (at, at.pages, at.metadata.block_table, at.layer.impl)
        if blocks > self._windows[0].shape[0]:
            self._in_parts(at, blocks)
            return
        window = self._window_of(name)
        batch = self._batch or self._lay_out(at, window.shape[0])
        self._batch = batch
        self._fill(window, at.pages, batch.table, self._remaining(name, batch))
        self._go_ahead(name, at, batch)
        at.lead(window, batch.staged)
        self.staged_layers += 1

    def leave(self) -> None:
        """The layer has read."""
        if self._home is None:
            return
        at, pages, table, implementation = self._home
        self._home = None
        at.lead(pages, table)
        at.compute_by(implementation)

    # Whole contexts.

    def _lay_out(self, at: InForward, room: int) -> Batch:
        metadata, tokens = at.metadata, at.pages.shape[2]
        queries = metadata.query_start_loc[1:] - metadata.query_start_loc[:-1]
        table = metadata.block_table[: queries.shape[0]]
        lengths = metadata.seq_lens[: queries.shape[0]]
        last = (lengths + tokens - 1) // tokens
        old = torch.minimum((lengths - queries) // tokens, last)
        to = torch.cumsum(last, 0, dtype=torch.int32) - last
        zero = torch.zeros_like(last)
        most = min(-(-metadata.max_seq_len // tokens), table.shape[1])
        fresh = min(-(-metadata.max_query_len // tokens) + 1, most)
        staged = (to[:, None] + torch.arange(table.shape[1], device=table.device)).clamp(max=room - 1)
        return Batch(
            table,
            staged.to(table.dtype),
            Span(zero, last, to, most),
            Span(zero, old, to, most),
            Span(old, last, to, fresh),
        )

    def _remaining(self, name: str, batch: Batch) -> Span:
        """What of a layer is not in its window yet."""
        assert self._side is not None
        self._side.wait()
        return batch.new if self._ahead == name else batch.all

    def _window_of(self, name: str) -> torch.Tensor:
        return self._windows[self._number[name] % 2]

    def _fill(self, window: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, span: Span) -> None:
        gather(as_words(window), as_words(pages), table, span)

    def _go_ahead(self, name: str, at: InForward, batch: Batch) -> None:
        """Has the next layer's old blocks copied meanwhile, to the window that the layer before this one has read."""
        following = self._next.get(name)
        self._ahead = None
        if following is None or not self._ahead_allowed or self._side is None:
            return
        later = inside.layer_in_forward(following)
        if later is None or later.pages.shape != at.pages.shape or inside.why_in_place(later.layer, later.metadata):
            return
        window = self._window_of(following)
        self._side.start(lambda: self._fill(window, later.pages, batch.table, batch.old))
        self._ahead = following

    # Contexts that are longer than a window.

    def _in_parts(self, at: InForward, blocks: int) -> None:
        if reason := inside.why_unmerged(at.layer, at.metadata):
            self._say_in_place(
                f"this step's contexts have {blocks} blocks, a window has room for {self._windows[0].shape[0]}, and "
                f"{reason}"
            )
            return
        assert self._side is not None
        parts = Parts(self._windows, self._side, self._fill, -(-blocks // self._windows[0].shape[0]))
        at.compute_by(Segmented(at.layer.impl, inside.FlashParts(at.layer.impl), parts))
        self.staged_layers += 1

    def _say_in_place(self, reason: str) -> None:
        kind = reason.rsplit(",", maxsplit=1)[-1]
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("SwiftCache: prompts read leased KV in place, which is several times slower: %s", reason)
