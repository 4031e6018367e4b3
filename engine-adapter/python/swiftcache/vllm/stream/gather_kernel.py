"""The kernel of `gather`, in Triton. Imported where there is a GPU, and where Triton's interpreter stands in for
one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

STEP = 1024
"""Words that a program moves at a time."""


@triton.jit
def copy_page(
    window,
    pages,
    table,
    first,
    last,
    to,
    window_stride,
    page_stride,
    table_stride,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program copies one page: a block of a request. Strides are words, but for the table's."""
    request = tl.program_id(1)
    block = tl.load(first + request) + tl.program_id(0)
    if block < tl.load(last + request):
        source = tl.load(table + request * table_stride + block).to(tl.int64) * page_stride
        target = (tl.load(to + request) + block).to(tl.int64) * window_stride
        for at in range(0, WORDS, STEP):
            words = at + tl.arange(0, STEP)
            inside = words < WORDS
            tl.store(window + target + words, tl.load(pages + source + words, mask=inside), mask=inside)


def launch(
    window: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    to: torch.Tensor,
    most: int,
) -> None:
    """Copies blocks from `first` up to `last` of each request, `most` of one at most, on the current stream."""
    # Blocks come first: a grid may have many programs on its first axis only.
    copy_page[(most, table.shape[0])](
        window,
        pages,
        table,
        first,
        last,
        to,
        window.stride(0),
        pages.stride(0),
        table.stride(0),
        WORDS=pages.shape[1],
        STEP=STEP,
        num_warps=8,
    )
