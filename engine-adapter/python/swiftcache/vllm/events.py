"""vLLM's KV events for cache-aware routers: what is kept on donors, as far as this engine knows.

A block is reported stored once every worker has published it, and removed when a load did not find it. A block that is
revoked or evicted and asked for by nobody is not reported: no engine hears of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

if TYPE_CHECKING:
    from vllm.v1.request import Request

MEDIUM = "SWIFTCACHE"


class Events:
    def __init__(self, enabled: bool, block_tokens: int) -> None:
        self.enabled = enabled
        self._block_tokens = block_tokens
        self._offered: dict[int, BlockStored] = {}
        self._ready: list[Any] = []

    def offered(self, number: int, request: Request, first: int, last: int, step: int) -> None:
        if not self.enabled:
            return
        size = self._block_tokens
        hashes = _hashes(request, first, last, step)
        lora = request.lora_request
        self._offered[number] = BlockStored(
            block_hashes=hashes,
            parent_block_hash=_hashes(request, first - 1, first, step)[0] if first else None,
            token_ids=list(request.all_token_ids[first * size : last * size]),
            block_size=size,
            lora_id=lora.lora_int_id if lora else None,
            medium=MEDIUM,
            lora_name=lora.lora_name if lora else None,
        )

    def kept(self, number: int) -> None:
        if event := self._offered.pop(number, None):
            self._ready.append(event)

    def gone(self, number: int) -> None:
        self._offered.pop(number, None)

    def removed(self, request: Request, first: int, last: int, step: int) -> None:
        if self.enabled and first < last:
            self._ready.append(BlockRemoved(block_hashes=_hashes(request, first, last, step), medium=MEDIUM))

    def take(self) -> list[Any]:
        ready, self._ready = self._ready, []
        return ready


def _hashes(request: Request, first: int, last: int, step: int) -> list[Any]:
    return [maybe_convert_block_hash(h) for h in request.block_hashes[first * step + step - 1 : last * step : step]]
