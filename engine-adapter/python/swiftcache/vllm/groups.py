"""The KV cache groups of a model, and which blocks of each a request needs.

vLLM puts layers that keep the same blocks into one group. Layers of different groups lie over each other: a block of
vLLM's pool belongs to one group at a time, and its bytes are that block's pages in all of the pool's memory. So a block
of the cache is a block of the pool, whatever its group, and its key names the group too. Of groups that are served
every block has the same number of tokens.

A full-attention group needs every block of a prefix. A sliding-window group needs the *tail*: the blocks that the
window of the next token reaches. vLLM gives up the blocks before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import SlidingWindowSpec, get_kv_cache_spec_kind, iter_layer_specs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


@dataclass(frozen=True)
class Group:
    number: int
    """Its place among vLLM's groups."""
    kind: str = "full_attention"
    """What vLLM's events call its layers."""
    window: int | None = None
    """Tokens that a layer of it reaches back over, the token itself included; None: all."""
    extra: int = 0
    """Tokens before the window that vLLM keeps all the same."""
    most: int = 0
    """The most blocks of a window that a request has at a time."""

    def first(self, end: int, block_tokens: int) -> int:
        """The first block that a request needs which goes on after `end` blocks."""
        if self.window is None:
            return 0
        return max(0, end * block_tokens - self.window + 1 - self.extra) // block_tokens


class Groups:
    def __init__(self, groups: Sequence[Group]) -> None:
        self.all = tuple(groups)
        self.full = tuple(group for group in groups if group.window is None)
        self.windows = tuple(group for group in groups if group.window is not None)
        self.several = len(self.all) > 1

    @staticmethod
    def of(kv: KVCacheConfig, config: VllmConfig) -> Groups:
        """The groups of a model that `safety` serves."""
        return Groups([_group(number, group.kv_cache_spec, config) for number, group in enumerate(kv.kv_cache_groups)])

    def salt(self, group: Group) -> bytes:
        """What of a group is in the keys of its blocks. A model's only group has nothing."""
        return group.number.to_bytes(2, "big") if self.several else b""

    def blocks(self, groups: Sequence[Group], first: int, end: int, block_tokens: int) -> Iterator[tuple[int, Group]]:
        """The blocks from `first` on that a request needs which goes on after `end` blocks, block by block: how many
        of the first ones are there is a question that one lookup answers."""
        starts = [(max(first, group.first(end, block_tokens)), group) for group in groups]
        for block in range(min((start for start, _ in starts), default=end), end):
            for start, group in starts:
                if start <= block:
                    yield block, group


def _group(number: int, spec: KVCacheSpec, config: VllmConfig) -> Group:
    kind = get_kv_cache_spec_kind(spec).value
    layer = next(iter(iter_layer_specs(spec)))
    if isinstance(layer, SlidingWindowSpec):
        most = layer.max_admission_blocks_per_request(config.max_in_flight_tokens, config.model_config.max_model_len)
        return Group(number, kind, layer.sliding_window, layer.extra_retained_tokens, most)
    return Group(number, kind)


ONE = Groups([Group(0)])
"""A model of one full-attention group."""
