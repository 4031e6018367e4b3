"""The KV cache groups of a model, and which blocks of each a request needs.

vLLM puts layers that keep the same blocks into one group. Layers of different groups lie over each other: a block of
vLLM's pool belongs to one group at a time, and its bytes are that block's pages in all of the pool's memory. So a block
of the cache is a block of the pool, whatever its group, and its key names the group too.

Prefixes are found in *units*: as many tokens as a block of every group divides, which is where vLLM itself finds them.
A block of a group is a unit, or one of several that make one.

A full-attention group needs every block of a prefix. The others need a *tail*: of a sliding-window group the blocks
that the window of the next token reaches, of chunked local attention those of the next token's chunk, and of a group of
state (Mamba, GDN) the one block with the state at the end of the prefix. vLLM gives up the blocks before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
    get_kv_cache_spec_kind,
    iter_layer_specs,
)

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
    """Of sliding windows: tokens that a layer of it reaches back over, the token itself included."""
    extra: int = 0
    """Tokens before the window that vLLM keeps all the same."""
    most: int = 0
    """The most blocks of a window or chunk, or with states, that a request has at a time."""
    state: bool = False
    """A block is not of tokens: it is what the layers remember of all tokens up to its end."""
    per_unit: int = 1
    """Blocks that make a unit."""
    chunk: int | None = None
    """Of chunked local attention: tokens of a chunk, over whose beginning no layer of it reaches back."""

    @property
    def full(self) -> bool:
        return self.window is None and self.chunk is None and not self.state

    def first(self, end: int, unit_tokens: int) -> int:
        """The first block that a request needs which goes on after `end` units."""
        if self.state:
            return max(0, self.last(end) - 1)
        tokens, size = end * unit_tokens, unit_tokens // self.per_unit
        if self.chunk is not None:
            return tokens // self.chunk * self.chunk // size
        if self.window is not None:
            return max(0, tokens - self.window + 1 - self.extra) // size
        return 0

    def last(self, end: int) -> int:
        """How many blocks `end` units are."""
        return end * self.per_unit

    def held(self, units: int) -> int:
        """Blocks that a request of so many units has at a time, at most."""
        return self.last(units) if self.full else min(self.last(units), self.most)


class Groups:
    def __init__(self, groups: Sequence[Group], several: bool | None = None) -> None:
        """`several`: whether vLLM has several groups, of which these may be only one."""
        self.all = tuple(groups)
        self.full = tuple(group for group in groups if group.full)
        self.tails = tuple(group for group in groups if not group.full)
        self.windows = tuple(group for group in self.tails if not group.state)
        """Those of which a request's table tells where its tail is: sliding windows and chunks."""
        self.states = tuple(group for group in groups if group.state)
        self.several = len(self.all) > 1 if several is None else several

    @staticmethod
    def of(kv: KVCacheConfig, config: VllmConfig, unit_tokens: int) -> Groups:
        """The groups of a model that `safety` serves, but for those of which vLLM itself keeps no prefix."""
        specs = ((number, kv.kv_cache_groups[number].kv_cache_spec) for number in kv.prefix_cacheable_group_ids)
        groups = [_group(number, spec, config, unit_tokens) for number, spec in specs]
        return Groups(groups, len(kv.kv_cache_groups) > 1)

    def salt(self, group: Group) -> bytes:
        """What of a group is in the keys of its blocks. A model's only group has nothing."""
        return group.number.to_bytes(2, "big") if self.several else b""

    def blocks(self, groups: Sequence[Group], first: int, end: int, unit_tokens: int) -> Iterator[tuple[int, Group]]:
        """The blocks from the unit `first` on that a request needs which goes on after `end` units, unit by unit: how
        many of the first ones are there is a question that one lookup answers."""
        starts = [(max(group.last(first), group.first(end, unit_tokens)), group) for group in groups]
        for unit in range(min((start // group.per_unit for start, group in starts), default=end), end):
            for start, group in starts:
                for block in range(max(start, group.last(unit)), group.last(unit + 1)):
                    yield block, group


STATES_OF_A_REQUEST = 4
"""Blocks with states that a request has at most, beside those that a kernel fills in the middle of a step and one for
each token that is guessed: the one that it goes on from, the one before it while a step is under way, the next one, and
a copy of one that it shares."""


def _group(number: int, spec: KVCacheSpec, config: VllmConfig, unit_tokens: int) -> Group:
    # Of a model's only group vLLM takes the unit from its settings, and nothing else has to be a part of it.
    kind, per_unit = get_kv_cache_spec_kind(spec).value, max(1, unit_tokens // spec.block_size)
    layer = next(iter(iter_layer_specs(spec)))
    if isinstance(layer, MambaSpec):
        most = STATES_OF_A_REQUEST + layer.num_prefill_checkpoint_blocks + layer.num_speculative_blocks
        return Group(number, kind, most=most, state=True, per_unit=per_unit)
    if isinstance(layer, (SlidingWindowSpec, ChunkedLocalAttentionSpec)):
        most = layer.max_admission_blocks_per_request(config.max_in_flight_tokens, config.model_config.max_model_len)
        if isinstance(layer, ChunkedLocalAttentionSpec):
            return Group(number, kind, most=most, per_unit=per_unit, chunk=layer.attention_chunk_size)
        return Group(number, kind, layer.sliding_window, layer.extra_retained_tokens, most, per_unit=per_unit)
    if not isinstance(layer, FullAttentionSpec):
        raise ValueError(f"SwiftCache does not know which blocks a group of {type(layer).__name__} needs")
    return Group(number, kind, per_unit=per_unit)


ONE = Groups([Group(0)])
"""A model of one full-attention group."""
