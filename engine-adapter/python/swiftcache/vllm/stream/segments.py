"""Contexts that are longer than a window, read through the windows part by part.

The new tokens of a step attend to one another first, then to one part of their contexts after the other. Each time the
kernel says the log-sum-exp of the scores besides its output, by which the outputs are merged into what one pass would
give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from swiftcache.vllm.stream.gather import Span


class Kernel(Protocol):
    """Attention that says the log-sum-exp of its scores. A result is output and scores."""

    def among_new(self, query: Any, key: Any, value: Any, metadata: Any) -> Any: ...

    def over_pages(self, query: Any, pages: Any, metadata: Any, table: Any, lengths: Any, longest: int) -> Any: ...

    def merge(self, one: Any, other: Any) -> Any: ...


class Ahead(Protocol):
    def start(self, work: Callable[[], None]) -> None: ...

    def wait(self) -> None: ...


@dataclass
class Parts:
    windows: list[torch.Tensor]
    side: Ahead
    fill: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Span], None]
    count: int
    """As many parts as the contexts may have."""


class Segmented:
    """Stands in for a layer's attention in one step."""

    def __init__(self, implementation: Any, kernel: Kernel, parts: Parts) -> None:
        self._implementation, self._kernel, self._parts = implementation, kernel, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._implementation, name)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("a quantised output is not merged from parts")
        tokens = attn_metadata.num_actual_tokens
        query, key, value = query[:tokens], key[:tokens], value[:tokens]
        found = self._kernel.among_new(query, key, value, attn_metadata)
        spans = list(self._spans(kv_cache, attn_metadata))
        self._copy(0, spans, kv_cache)
        for number, part in enumerate(spans):
            self._parts.side.wait()
            # The window of the part before the last one is free again: its attention is queued.
            self._copy(number + 1, spans, kv_cache)
            window = self._parts.windows[number % 2]
            longest = min(part.lengths_most, attn_metadata.max_seq_len)
            more = self._kernel.over_pages(query, window, attn_metadata, part.table, part.lengths, longest)
            found = self._kernel.merge(found, more)
        output[:tokens].copy_(found[0].view(output[:tokens].shape))
        return output

    def _copy(self, number: int, spans: list[Part], pages: torch.Tensor) -> None:
        if number < len(spans):
            part, window = spans[number], self._parts.windows[number % 2]
            self._parts.side.start(lambda: self._parts.fill(window, pages, part.source, part.span))

    def _spans(self, pages: torch.Tensor, metadata: Any) -> Any:
        """The parts: as many blocks of all contexts, request after request, as a window has room for."""
        room, size = self._parts.windows[0].shape[0], pages.shape[2]
        queries = metadata.query_start_loc[1:] - metadata.query_start_loc[:-1]
        table = metadata.block_table[: queries.shape[0]]
        before = metadata.seq_lens[: queries.shape[0]] - queries
        blocks = (before + size - 1) // size
        to = torch.cumsum(blocks, 0, dtype=torch.int32) - blocks
        most = min(-(-metadata.max_seq_len // size), table.shape[1], room)
        places = torch.arange(most, device=table.device)
        for number in range(self._parts.count):
            start = number * room
            first = torch.minimum((start - to).clamp(min=0), blocks)
            last = torch.minimum((start + room - to).clamp(min=0), blocks)
            lengths = (torch.minimum(before, last * size) - first * size).clamp(min=0)
            where = (to + first - start)[:, None] + places
            yield Part(
                table,
                Span(first, last, to - start, most),
                where.clamp(min=0, max=room - 1).to(table.dtype),
                lengths.to(metadata.seq_lens.dtype),
                most * size,
            )


@dataclass
class Part:
    source: torch.Tensor
    span: Span
    table: torch.Tensor
    """Where the part's blocks of each request are in the window."""
    lengths: torch.Tensor
    lengths_most: int
