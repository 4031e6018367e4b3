"""When a model of several KV groups may be promised another load: so that none waits for ever for blocks of another.

vLLM gives a request its blocks before they are loaded, and schedules it when they are. Until then nobody can take them
away. vLLM 0.32 schedules such requests in order: if there is no room for what the first one still needs, it looks at no
other. It counts what they still need before it admits another load, but not what groups of sliding windows need, and
not that a request whose load has failed starts from nothing. So all blocks can be held by loaded requests, of which the
first lacks a few: then nothing is scheduled any more.

A load is promised if nobody waits with one, or if there is room for all that those who wait may need: what runs
meanwhile ends some day. Otherwise the request waits, and no other is promised a load before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftcache.vllm.groups import Groups
    from swiftcache.vllm.tracked import Tracked


class Room:
    def __init__(self, groups: Groups, block_tokens: int) -> None:
        self._groups, self._block_tokens = groups, block_tokens
        self._next: str | None = None
        """The request that is promised the next load."""

    def allows(self, tracked: Tracked, end: int, requests: Iterable[Tracked], free: int) -> bool:
        """Whether a request may be promised its first `end` units. `free`: blocks of the pool that nobody uses."""
        name = tracked.request.request_id
        if self._next not in (None, name):
            return False
        others = [one for one in requests if one.promised and not one.finished and one is not tracked]
        wanted = sum(self._more(one, one.promised) for one in others)
        if others and free < wanted + self._held(end) + self._more(tracked, end):
            self._next = name
            return False
        self._next = None
        return True

    def gone(self, request_id: str) -> None:
        """A request wants no load any more."""
        if self._next == request_id:
            self._next = None

    def _held(self, end: int) -> int:
        """Blocks that a load takes."""
        return sum(group.last(end) - group.first(end, self._block_tokens) for group in self._groups.all)

    def _more(self, tracked: Tracked, end: int) -> int:
        """How many more blocks a request needs than its load takes, until all of its tokens are computed: at most."""
        units = -(-tracked.request.num_tokens // self._block_tokens)
        more = 0
        for group in self._groups.all:
            whole, last = group.last(units) + 1, group.last(end)
            if group.full:
                more += whole - last
            else:
                # It goes on from the tail, or from nothing, when the load has failed.
                anew = min(whole, group.most) - (last - group.first(end, self._block_tokens))
                more += max(min(whole - last, group.most), anew)
        return more
