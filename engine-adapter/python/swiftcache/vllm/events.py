"""vLLM's KV events about blocks of a request, from `first` up to `last`; `step` hashes make a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from swiftcache.engine.events import MEDIUM

if TYPE_CHECKING:
    from vllm.v1.request import Request


def stored(request: Request, first: int, last: int, step: int, block_tokens: int) -> BlockStored:
    lora = request.lora_request
    return BlockStored(
        block_hashes=_hashes(request, first, last, step),
        parent_block_hash=_hashes(request, first - 1, first, step)[0] if first else None,
        token_ids=list(request.all_token_ids[first * block_tokens : last * block_tokens]),
        block_size=block_tokens,
        lora_id=lora.lora_int_id if lora else None,
        medium=MEDIUM,
        lora_name=lora.lora_name if lora else None,
    )


def removed(request: Request, first: int, last: int, step: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=_hashes(request, first, last, step), medium=MEDIUM)


def _hashes(request: Request, first: int, last: int, step: int) -> list[Any]:
    return [maybe_convert_block_hash(h) for h in request.block_hashes[first * step + step - 1 : last * step : step]]
