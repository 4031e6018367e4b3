"""What the scheduler's half knows about a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from swiftcache.vllm.finder import Tables
    from swiftcache.vllm.metadata import Adapter


@dataclass(slots=True)
class Hit:
    """The answer of a lookup: so many units (see `groups`) after what vLLM has computed tokens of."""

    computed: int
    blocks: int
    junction: int
    """With several groups: the units of the request that full attention alone would have found. The tails of the other
    groups are kept there, for the next one who comes so far."""
    at: float


@dataclass(slots=True)
class Tracked:
    request: Request
    hit: Hit | None = None
    disk_since: float | None = None
    """When it began to wait for blocks that are on their way from a disk."""
    disk_asked: float = 0.0
    """When it was asked last whether they are there."""
    kept: int = 0
    """Leading units that are kept, on their way, or were found in vLLM's own cache: of full-attention groups."""
    ends: list[int] = field(default_factory=list)
    """Where the tails of other groups are still to be kept: after so many units, ascending."""
    tail: int = 0
    """The last such end where they are kept or on their way, or were loaded; 0: none."""
    stores: dict[int, list[int]] = field(default_factory=dict)
    """Store jobs that are not known to be over, and the blocks of the pool that each reads."""
    sliding: dict[int, tuple[int, int, list[int]]] = field(default_factory=dict)
    """Those of them of sliding-window groups: the group, the first block, and where they are in the pool."""
    loading: bool = False
    """An asynchronous load is under way; vLLM keeps the blocks until it is over."""
    promised: int = 0
    """With several groups: so many first units are loaded, on their way, or failed to load. 0 once it is scheduled."""
    waiting: bool = False
    """It has blocks and has not been scheduled since it got them: others may still be loading into them."""
    doubt: int = 0
    """The last step in doubt when it was scheduled first. Until that is settled, nobody knows whether the blocks that
    it started from are there."""
    spoiled: int | None = None
    """From this block on its KV is wrong, or not known to be right."""
    forgotten: int = 0
    """Where it is spoiled: so many first blocks has vLLM forgotten for good."""
    too_few: int | None = None
    """vLLM had no room for it in its last step, in which so many blocks were free in the end."""
    failed: bool = False
    """A load failed: whatever is promised, this request does not try again."""
    looked: int = 0
    """Leading blocks of which it is known whether they are leased."""
    leased: bool = False
    """A block of it is in leased slabs."""
    claimed: bool = False
    """vLLM was told that what was found last cannot fail to load."""
    closed: bool = False
    """Nothing more of it is stored: its KV is older than a reset, or nobody knows what its adapter is."""
    adapter: Adapter | None = None
    finished: bool = False

    def reaches_end(self, full: int) -> bool:
        """Whether tails are to be kept at an end within the first `full` units."""
        return bool(self.ends) and self.ends[0] <= full

    def left_by_windows(self, tables: Tables) -> list[int]:
        """Stores of blocks that are not in its tables any more. They are named once."""
        left = []
        for number, (group, first, blocks) in self.sliding.items():
            if not tables or tables[group][first : first + len(blocks)] != blocks:
                left.append(number)
        for number in left:
            del self.sliding[number]
        return left
