"""The layout of vLLM's KV pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from swiftcache.engine import layout


def layout_of(caches: Mapping[str, Any], blocks: int, *, several: bool = False) -> layout.Layout:
    """Raises ValueError for a layout that is not served, with what to do. `several`: with several groups the pages of
    a layer lie over those of another group's."""
    in_order = {name: caches[name] for name in sorted(caches, key=_order)}
    try:
        return layout.layout_of(in_order, blocks, overlaid=several)
    except ValueError as reason:
        raise ValueError(
            f"{reason}. VLLM_KV_CACHE_LAYOUT chooses another one: LBNHC keeps a layer's blocks whole"
        ) from reason


def _order(name: str) -> tuple[int, str]:
    """Layers as the forward comes to them."""
    try:
        return (extract_layer_index(name), name)
    except (AssertionError, ValueError):
        return (1 << 30, name)
