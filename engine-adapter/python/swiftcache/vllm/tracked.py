"""What the scheduler's half knows about a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Hit:
    """The answer of a lookup: so many blocks after what vLLM has computed tokens of."""

    computed: int
    blocks: int
    at: float


@dataclass(slots=True)
class Tracked:
    request: Request
    hit: Hit | None = None
    kept: int = 0
    """Leading blocks that are kept, on their way, or were found in vLLM's own cache."""
    stores: set[int] = field(default_factory=set)
    """Store jobs that are not known to be over."""
    loading: bool = False
    """An asynchronous load is under way; vLLM keeps the blocks until it is over."""
    waiting: bool = False
    """It has blocks and has not been scheduled since it got them: others may still be loading into them."""
    doubt: int = 0
    """The last step in doubt when it was scheduled first. Until that is settled, nobody knows whether the blocks that
    it started from are there."""
    spoiled: int | None = None
    """From this block on its KV is wrong, or not known to be right."""
    failed: bool = False
    """A load failed: whatever is promised, this request does not try again."""
    looked: int = 0
    """Leading blocks of which it is known whether they are leased."""
    leased: bool = False
    """A block of it is in leased slabs."""
    closed: bool = False
    """Nothing more of it is stored: its KV is older than a reset."""
    finished: bool = False
