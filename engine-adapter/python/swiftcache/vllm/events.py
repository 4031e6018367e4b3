"""vLLM's KV events about blocks of a request, from `first` up to `last`; `step` hashes make a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from swiftcache.engine.events import MEDIUM

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from swiftcache.vllm.groups import Group


def stored(
    request: Request, first: int, last: int, step: int, block_tokens: int, group: Group | None = None
) -> BlockStored:
    """`group`: which of several they are of."""
    lora = request.lora_request
    return BlockStored(
        block_hashes=_hashes(request, first, last, step),
        parent_block_hash=_hashes(request, first - 1, first, step)[0] if first else None,
        token_ids=list(request.all_token_ids[first * block_tokens : last * block_tokens]),
        block_size=block_tokens,
        lora_id=lora.lora_int_id if lora else None,
        medium=MEDIUM,
        lora_name=lora.lora_name if lora else None,
        group_idx=group.number if group else None,
        kv_cache_spec_kind=group.kind if group else None,
        kv_cache_spec_sliding_window=group.window if group else None,
    )


def removed(request: Request, first: int, last: int, step: int, group: int | None = None) -> BlockRemoved:
    return BlockRemoved(block_hashes=_hashes(request, first, last, step), medium=MEDIUM, group_idx=group)


def _hashes(request: Request, first: int, last: int, step: int) -> list[Any]:
    return [maybe_convert_block_hash(h) for h in request.block_hashes[first * step + step - 1 : last * step : step]]
