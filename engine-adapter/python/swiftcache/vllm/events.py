"""vLLM's KV events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)

from swiftcache.engine.events import CLEARED, Change

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from swiftcache.vllm.groups import Group


class Block(NamedTuple):
    """What an event says of a block."""

    name: Any
    parent: Any
    tokens: list[int]
    extra_keys: tuple[Any, ...] | None
    lora: tuple[int, str] | None
    group: Group | None


def block(request: Request, number: int, step: int, block_tokens: int, group: Group | None) -> Block:
    """A request's block with this number; `step` hashes make a block. `group`: which of several it is of."""
    start, end = number * block_tokens, (number + 1) * block_tokens
    lora = request.lora_request
    return Block(
        name=_name(request, number, step),
        parent=_name(request, number - 1, step) if number else None,
        tokens=list(request.all_token_ids[start:end]),
        extra_keys=generate_block_hash_extra_keys(request, start, end, 0)[0],
        lora=(lora.lora_int_id, lora.lora_name) if lora else None,
        group=group,
    )


def _name(request: Request, number: int, step: int) -> Any:
    return maybe_convert_block_hash(request.block_hashes[number * step + step - 1])


def of(changes: Iterable[Change]) -> list[Any]:
    """The events that say so. Blocks that follow each other share one."""
    events: list[Any] = []
    last: Change | None = None
    for change in changes:
        if change is CLEARED:
            events.append(AllBlocksCleared())
        elif last is not None and _continues(last, change):
            event = events[-1]
            event.block_hashes.append(change.block.name)
            if change.found:
                event.token_ids.extend(change.block.tokens)
                event.extra_keys = (event.extra_keys or []) + (_extra_keys(change.block) or [])
        else:
            events.append(_stored(change) if change.found else _removed(change))
        last = None if change is CLEARED else change
    return events


def _continues(last: Change, change: Change) -> bool:
    """Whether one event says both."""
    alike = (last.found, last.medium, last.block.group) == (change.found, change.medium, change.block.group)
    if not alike or not change.found:
        return alike
    one, other = last.block, change.block
    return (one.name, one.lora, len(one.tokens)) == (other.parent, other.lora, len(other.tokens))


def _extra_keys(block: Block) -> list[tuple[Any, ...] | None] | None:
    return to_event_extra_keys([block.extra_keys])


def _stored(change: Change) -> BlockStored:
    block, group = change.block, change.block.group
    return BlockStored(
        block_hashes=[block.name],
        parent_block_hash=block.parent,
        token_ids=list(block.tokens),
        block_size=len(block.tokens),
        lora_id=block.lora[0] if block.lora else None,
        medium=change.medium,
        lora_name=block.lora[1] if block.lora else None,
        extra_keys=_extra_keys(block),
        group_idx=group.number if group else None,
        kv_cache_spec_kind=group.kind if group else None,
        kv_cache_spec_sliding_window=group.window if group else None,
    )


def _removed(change: Change) -> BlockRemoved:
    group = change.block.group
    return BlockRemoved(
        block_hashes=[change.block.name], medium=change.medium, group_idx=group.number if group else None
    )
