"""Speculative decoding where a layer keeps state, on vLLM's CPU engine: of the kernels that this needs, vLLM 0.32 has
two for GPUs only. They move states between the blocks of a request: to the block that a step goes on in, and to the one
that ended when guesses were accepted beyond its end. These do the same with memory of the CPU, request by request.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

KERNELS = "vllm.v1.worker.mamba_utils"


class Places(NamedTuple):
    """Where states are, as vLLM gives it to its kernels: tensors with an entry for each state of a layer."""

    tables: Any
    """Of each group, the address of its requests' block tables."""
    table_stride: int
    bases: Any
    block_strides: Any
    element_sizes: Any
    inner_sizes: Any
    conv_widths: Any
    """Tokens of a convolution's window; 0: the state is of all tokens."""
    groups: Any
    row_counts: Any
    row_strides: Any

    def block(self, state: int, request: int, column: int) -> int:
        """The address of a state in a block of a request."""
        at = int(self.tables[int(self.groups[state])]) + 4 * (request * self.table_stride + column)
        number = ctypes.c_int32.from_address(at).value
        return int(self.bases[state]) + number * int(self.block_strides[state])

    def move(self, request: int, source: int, target: int, accepted: int, rows: bool) -> None:
        """All states of a request from one column of its table to another, as they are after so many accepted guesses.
        `rows`: the tokens of a convolution's window lie next to each other, in rows of the other dimension."""
        for state in range(len(self.bases)):
            size, inner = int(self.element_sizes[state]), int(self.inner_sizes[state])
            width, into = int(self.conv_widths[state]), self.block(state, request, target)
            if not width:
                ctypes.memmove(into, self.block(state, request, source + accepted), inner * size)
                continue
            out, kept = self.block(state, request, source), width - accepted
            if not rows:
                ctypes.memmove(into, out + accepted * inner * size, kept * inner * size)
                continue
            for row in range(int(self.row_counts[state])):
                at = row * int(self.row_strides[state])
                ctypes.memmove(into + at, out + at + accepted * size, kept * size)


def before(target: Any, source: Any, accepted: Any, *places: Any, CONV_STATE_DIM_FIRST: bool, **_: Any) -> None:
    """`precopy_mamba_align_fused_kernel`."""
    *where, _, requests = places
    for request in range(requests):
        was, now = int(source[request]), int(target[request])
        if 0 <= was != now:
            Places(*where).move(request, was, now, int(accepted[request]), CONV_STATE_DIM_FIRST)


def after(
    accepted: Any,
    column: Any,
    scheduled: Any,
    computed: Any,
    drafts: Any,
    *places: Any,
    block_size: int,
    CONV_STATE_DIM_FIRST: bool,
    **_: Any,
) -> None:
    """`postprocess_mamba_fused_kernel`."""
    *where, out, _, requests = places
    for request in range(requests):
        running = int(computed[request]) + int(scheduled[request]) - int(drafts[request])
        end = (running + int(accepted[request]) - 1) // block_size * block_size
        if end < running:
            continue
        source, target = int(column[request]), end // block_size - 1
        if source == target:
            out[request] = 1
        if source != target or end != running:
            Places(*where).move(request, source, target, end - running, CONV_STATE_DIM_FIRST)


@functools.cache
def register() -> None:
    """Once in a process is enough."""
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels(
        {
            f"{KERNELS}.precopy_mamba_align_fused_kernel": before,
            f"{KERNELS}.postprocess_mamba_fused_kernel": after,
        }
    )
