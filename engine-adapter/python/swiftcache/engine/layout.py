"""Where the blocks of each layer lie in an engine's KV pool, from its tensors. A block's page is opaque bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """One run of pages: a layer's, or a layer's K or V where they are kept apart."""

    address: int
    bytes: int
    offset: int
    stride: int
    page: int

    def place(self) -> tuple[int, int, int, int]:
        return (self.address, self.bytes, self.offset, self.stride)


@dataclass(frozen=True)
class Layout:
    entries: tuple[Entry, ...]
    """In the order in which a forward needs them."""
    by_layer: dict[str, tuple[int, ...]]
    """The entries of each layer. Layers that share KV share entries."""
    blocks: int
    shape: tuple[str, ...]
    """What must be equal for bytes to mean the same: dtype, shape and strides of a page, entry by entry."""

    @cached_property
    def block_bytes(self) -> int:
        """Of a block in all layers."""
        return sum(entry.page for entry in self.entries)


def layout_of(
    caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], blocks: int, *, overlaid: bool = False
) -> Layout:
    """Reads the layout of a pool of `blocks` blocks from its layers' tensors, in the order in which a forward needs
    them. Raises ValueError for a layout whose pages are not one run of bytes a constant stride apart.

    Args:
        overlaid: each block is of some layers only, and pages of different layers may lie over each other. Such pages
            make one run, as long as all of them together.
    """
    entries: list[Entry] = []
    shapes: list[str] = []
    known: dict[tuple[int, int, int, int], int] = {}
    by_layer: dict[str, tuple[int, ...]] = {}
    for name, tensors in caches.items():
        numbers = []
        for tensor in tensors if isinstance(tensors, (list, tuple)) else [tensors]:
            for part in _block_major(name, tensor, blocks):
                entry, shape = _entry(name, part, blocks)
                where = (entry.address + entry.offset, entry.stride, entry.page, 0)
                if where not in known:
                    known[where] = len(entries)
                    entries.append(entry)
                    shapes.append(shape)
                numbers.append(known[where])
        by_layer[name] = tuple(numbers)
    if not entries:
        raise ValueError("the engine has no KV cache: SwiftCache has nothing to keep")
    if overlaid:
        runs = _runs(entries)
        run_of = {number: index for index, run in enumerate(runs) for number in run}
        shapes = [
            " over ".join(f"{entries[n].offset - entries[run[0]].offset}:{shapes[n]}" for n in run) for run in runs
        ]
        entries = [_together([entries[number] for number in run]) for run in runs]
        by_layer = {name: tuple(dict.fromkeys(run_of[n] for n in numbers)) for name, numbers in by_layer.items()}
    _refuse_overlap(entries, blocks)
    return Layout(tuple(entries), by_layer, blocks, tuple(shapes))


def _block_major(name: str, tensor: torch.Tensor, blocks: int) -> list[torch.Tensor]:
    """Views with the pool's blocks as the first dimension; kernels may split a block into several."""
    if tensor.dim() >= 2 and tensor.shape[0] % blocks != 0 and tensor.shape[0] == 2 and tensor.shape[1] % blocks == 0:
        return [half for tensor_half in tensor.unbind(0) for half in _block_major(name, tensor_half, blocks)]
    if tensor.dim() < 2 or tensor.shape[0] == 0 or tensor.shape[0] % blocks:
        raise ValueError(
            f"layer {name}: a KV cache of shape {tuple(tensor.shape)} does not have its {blocks} blocks first; "
            "SwiftCache does not serve this layout"
        )
    return [tensor if tensor.shape[0] == blocks else tensor.unflatten(0, (blocks, -1))]


def _entry(name: str, tensor: torch.Tensor, blocks: int) -> tuple[Entry, str]:
    item = tensor.element_size()
    shape, strides = tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])
    page = item
    for size in shape:
        page *= size
    # Dense exactly when the furthest element is where the last of as many would be.
    reach = item * (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)))
    if reach != page:
        raise ValueError(
            f"layer {name}: a block of shape {shape} with strides {strides} is not one run of bytes; SwiftCache does "
            "not serve this layout"
        )
    stride = tensor.stride(0) * item
    if blocks > 1 and stride < page:
        raise ValueError(f"layer {name}: blocks of {page} bytes lie {stride} bytes apart, one over the other")
    storage = tensor.untyped_storage()
    entry = Entry(storage.data_ptr(), storage.nbytes(), tensor.data_ptr() - storage.data_ptr(), stride, page)
    return entry, f"{tensor.dtype}{shape}{strides}"


def _runs(entries: Sequence[Entry]) -> list[list[int]]:
    """Numbers of entries whose pages of one block lie over each other, lowest address first; runs in the order in which
    a forward comes to them first."""
    runs: list[list[int]] = []
    place, end = None, 0
    for number in sorted(range(len(entries)), key=lambda number: _place(entries[number])):
        address, stride, offset = _place(entries[number])
        if place == (address, stride) and offset < end:
            runs[-1].append(number)
        else:
            runs.append([number])
            end = offset
        place, end = (address, stride), max(end, offset + entries[number].page)
    return sorted(runs, key=min)


def _place(entry: Entry) -> tuple[int, int, int]:
    return (entry.address, entry.stride, entry.offset)


def _together(entries: Sequence[Entry]) -> Entry:
    first = entries[0]
    page = max(entry.offset + entry.page for entry in entries) - first.offset
    return Entry(first.address, first.bytes, first.offset, first.stride, page)


def ranges_of(layout: Layout, first: int, last: int) -> list[tuple[int, int]]:
    """Where all bytes of the blocks from `first` up to `last` lie, and no other block's: address and bytes of each
    range.

    Raises NotImplementedError for a layout with something between the pages that is not known to be theirs.
    """
    ranges = []
    for stride, group in groupby(sorted(layout.entries, key=_row), key=lambda entry: entry.stride):
        begin, end = 0, 0
        for entry in group:
            # Layers that lie side by side in every block make one range.
            start = entry.address + entry.offset
            if end - begin in (0, stride):
                begin = start
            elif start != end:
                raise NotImplementedError(_BETWEEN)
            end = start + entry.page
            if end - begin == stride:
                ranges.append((begin + first * stride, (last - first) * stride))
        if end - begin != stride:
            raise NotImplementedError(_BETWEEN)
    return ranges


_BETWEEN = (
    "something lies between the blocks of a layer that is not known to be theirs; SwiftCache does not lend from this "
    "layout"
)


def _row(entry: Entry) -> tuple[int, int]:
    return (entry.stride, entry.address + entry.offset)


def _refuse_overlap(entries: Sequence[Entry], blocks: int) -> None:
    """Layers that alias each other only in part would be loaded over each other."""
    for i, one in enumerate(entries):
        for other in entries[:i]:
            first = other.address + other.offset - one.address - one.offset
            if one.stride != other.stride:
                overlap = -other.stride * blocks < first < one.stride * blocks
            else:
                apart = first % one.stride if one.stride else 0
                within = abs(first) < one.stride * blocks
                overlap = within and (apart < one.page or one.stride - apart < other.page)
            if overlap:
                raise ValueError("two layers' KV overlap without being the same; SwiftCache does not serve this layout")
