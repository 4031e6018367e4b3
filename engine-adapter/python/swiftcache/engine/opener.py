"""A worker's way to its cache: one session with the broker, and the caches that are opened through it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from swiftcache.engine.quiet import logger

if TYPE_CHECKING:
    from swiftcache._native import Cache, Connection, StreamPool
    from swiftcache.engine.layout import Layout
    from swiftcache.engine.settings import Settings


class CacheOpener:
    """Opens a worker's cache, and again after the engine has taken its pool away for a while."""

    def __init__(self, settings: Settings, name: str, *, promises: bool = False) -> None:
        """`name`: for people, in status and logs. `promises`: the cache's own lookups are what requests are scheduled
        by; else a scheduler has looked up before."""
        self.borrower_id = os.urandom(16)
        """Names the cache to a scheduler's lookup. It is the same for every cache that this opens, since a scheduler
        hears it once."""
        self._settings, self._name, self._promises = settings, name, promises
        self._connection: Connection | None = None

    def open(
        self,
        namespace: str,
        layout: Layout,
        *,
        owner: Any,
        gpu: str | None,
        block_tokens: int,
        stitched: StreamPool | None = None,
    ) -> Cache:
        """Opens a cache over the pool that `owner` keeps alive. `gpu`: UUID of the GPU that the pool is on, None for
        host memory. `stitched`: the engine's pool is in this one. Raises ValueError for settings that cannot work."""
        from swiftcache import _native

        settings = self._settings
        block = layout.block_bytes
        for name in ("max_leased_bytes", "max_host_leased_bytes", "host_tier_bytes", "lease_step_bytes"):
            if 0 < (getattr(settings, name) or 0) < block:
                raise ValueError(
                    f"{name} is {getattr(settings, name)}, which is less than one block of this worker: {block} bytes "
                    f"in {len(layout.entries)} layers. Give it more" + (", or 0" if name != "lease_step_bytes" else "")
                )
        if self._connection is None:
            self._connection = _native.Connection(settings.socket, name=self._name, tenant=settings.tenant)
        cache = _native.Cache(
            self._connection,
            namespace=namespace,
            layer_bytes=[entry.page for entry in layout.entries],
            max_leased_bytes=settings.max_leased_bytes,
            max_host_leased_bytes=settings.max_host_leased_bytes,
            lease_step_bytes=settings.lease_step_bytes,
            host_tier_bytes=settings.host_tier_bytes,
            device=settings.device or gpu,
            backend="host" if settings.backend == "auto" and gpu is None else settings.backend,
            share=settings.share,
            # Of blocks that a scheduler has promised, a miss costs more now than it did there.
            lookup_ms=settings.lookup_ms if self._promises else max(settings.lookup_ms, _native.DEFAULT_LOOKUP_MS),
            lend_drain_ms=settings.lend_drain_ms,
            borrower_id=self.borrower_id,
        )
        places = [entry.place() for entry in layout.entries]
        if stitched is None:
            cache.register_pool(places, layout.blocks, owner)
        else:
            cache.register_pool(places, layout.blocks, owner, stream_pool=stitched)
        logger.info(
            "SwiftCache: %d blocks of %d tokens, %d bytes each in %d layers; up to %d bytes leased; namespace %s",
            layout.blocks,
            block_tokens,
            block,
            len(layout.entries),
            settings.max_leased_bytes,
            namespace,
        )
        return cache

    def close(self) -> None:
        """Ends the session; the caches must be closed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
