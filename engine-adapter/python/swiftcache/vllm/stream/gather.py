"""Copies the blocks of a batch's contexts into a window, side by side. Block tables and lengths are read where they
are, on the
device: the host waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORD = 4
"""Bytes are moved as words of so many."""


def as_words(pages: torch.Tensor) -> torch.Tensor:
    """The bytes of each page, [pages, words], whatever their type and the order of their dimensions. A page must be one
    run of bytes."""
    page = pages.element_size()
    for size in pages.shape[1:]:
        page *= size
    stride, offset = pages.stride(0) * pages.element_size(), pages.storage_offset() * pages.element_size()
    if page % WORD or stride % WORD or offset % WORD:
        raise ValueError(f"pages of {page} bytes, {stride} apart, are not made of words of {WORD} bytes")
    words = torch.empty(0, dtype=torch.int32, device=pages.device)
    size = (pages.shape[0], page // WORD)
    return words.set_(pages.untyped_storage(), offset // WORD, size, (stride // WORD, 1))


@dataclass(frozen=True)
class Span:
    """Which blocks of each request to copy: from `first` up to `last`; block `j` goes to place `to + j` of the window.
    One number for each request, on the device."""

    first: torch.Tensor
    last: torch.Tensor
    to: torch.Tensor
    most: int
    """As many of one request at most, as far as the host knows."""


def gather(window: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, span: Span) -> None:
    """`window` and `pages` are words (`as_words`); `table` has the page of each block of each request."""
    if span.most <= 0:
        return
    if pages.device.type == "cuda":
        from swiftcache.vllm.stream.gather_kernel import launch

        launch(window, pages, table, span.first, span.last, span.to, span.most)
        return
    step = torch.arange(span.most, device=table.device)
    blocks = span.first[:, None] + step
    chosen = blocks < span.last[:, None]
    rows = torch.arange(table.shape[0], device=table.device)[:, None].expand_as(blocks)[chosen]
    blocks = blocks[chosen].long()
    window.index_copy_(0, (span.to[rows] + blocks).long(), pages.index_select(0, table[rows, blocks].long()))
