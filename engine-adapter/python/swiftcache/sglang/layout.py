"""The layout of SGLang's KV pool: a block is a page of token slots, in each layer's buffers."""

from __future__ import annotations

from typing import Any

from swiftcache.engine import layout


def layout_of(pool: Any, page: int) -> layout.Layout:
    """`pool`: one that `safety.check` has passed. Its first page is SGLang's own, for padding, and a block like others.

    Raises ValueError for a layout that is not served.
    """
    blocks = (pool.size + page) // page
    if hasattr(pool, "kv_buffer"):
        buffers = [(kv,) for kv in pool.kv_buffer]
    else:
        buffers = list(zip(pool.k_buffer, pool.v_buffer, strict=True))
    # A pool whose size is no multiple of a page ends with slots that are never handed out.
    layers = {str(number): [slots[: blocks * page] for slots in each] for number, each in enumerate(buffers)}
    return layout.layout_of(layers, blocks)


def gates(of: layout.Layout) -> list[int]:
    """For each layer the entry whose arrival means that all of the layer is there: entries are copied in order."""
    return [max(of.by_layer[str(number)]) for number in range(len(of.by_layer))]
