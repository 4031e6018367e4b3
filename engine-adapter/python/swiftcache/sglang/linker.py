"""The linker: SGLang's eleven hooks in, calls of `engine/` and the native module out.

SGLang makes one for every rank, in the process of its scheduler, so that what looks up is what loads. Ranks must answer
alike: what a rank can load is reduced over ranks by SGLang, whether it did is reduced here.

After `load` has returned True, SGLang can only end the request (503) if the load fails. So True is said when that
cannot happen: every block is own, none is missing and its copies are queued, which a donor that wants its memory back
waits for; or the load is over, and checked. `load: wait` has all loads be of the second kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from swiftcache.engine.fingerprint import namespace
from swiftcache.engine.keys import Keys
from swiftcache.engine.opener import CacheOpener
from swiftcache.engine.quiet import Quiet, logger
from swiftcache.engine.settings import Settings
from swiftcache.sglang import safety, waits, weights
from swiftcache.sglang.facts import facts, groups, ranks_here
from swiftcache.sglang.gate import LayerGate
from swiftcache.sglang.hits import Hits
from swiftcache.sglang.layout import gates, layout_of
from swiftcache.sglang.metrics import Shown
from swiftcache.sglang.offloads import Job, Offloads
from swiftcache.sglang.waits import DiskWaits

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import PoolTransfer

    from swiftcache._native import Load, Mark, Store

WHERE = "linker_extra_config in --unified-cache-external-linker-config"
LOADS = ("auto", "wait")
LOCKED_SHARE = 4
"""What is on its way to donors locks one in so many pages of the pool at most."""


class SwiftCacheLinker(UnifiedCacheLinker):
    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        settings = Settings.read(WHERE, extra_config, loads=LOADS)
        if settings.lend:
            raise ValueError(
                f"{WHERE}: lend is not served under SGLang. Give the engine a smaller --mem-fraction-static, and lend "
                "what is left beside it: swiftcache donate --elastic"
            )
        if settings.stream_bytes:
            raise ValueError(
                f"{WHERE}: stream_bytes is not served under SGLang: its KV cache is local memory only. Drop it"
            )
        # As SGLang has resolved them; the record itself keeps what was said on the command line.
        server_args = resolving_view(server_args)
        safety.check(server_args, params, components)
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        device = torch.device(pool.device)
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"SwiftCache serves CUDA and CPU engines, not --device {device.type}")
        self.pools = {PoolName.KV: pool}
        self.forward_stream = forward_stream
        self._cuda, self._page, self._waits = device.type == "cuda", params.page_size, settings.load == "wait"
        self._groups, ranks = groups(params), ranks_here(params)
        self._quiet, self._keys = Quiet(), Keys()
        self._attempt = self._quiet.attempt
        layout = layout_of(pool, self._page)
        known = facts(server_args, settings, pool, layout, page=self._page, ranks=ranks)
        if not weights.watch(self):
            known["weights"] = self._keys.private()
            logger.warning(
                "SwiftCache: this SGLang does not say when weights are updated: no blocks are shared with other engines"
            )
        self._opener = CacheOpener(settings, f"sglang-tp{ranks.tp}", promises=True)
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if self._cuda else None
        self._cache = self._opener.open(namespace(known, ranks), layout, owner=pool, gpu=gpu, block_tokens=self._page)
        self._entries = len(layout.entries)
        labels = {"model_name": str(server_args.served_model_name), "tp_rank": str(ranks.tp)}
        self._shown = Shown(labels, enabled=params.enable_metrics)
        self._hits = Hits(self._cache, self._keys, self._quiet, patience=settings.lookup_ms / 1e3)
        self.waits: DiskWaits | None = None
        """Requests that wait for a disk."""
        if settings.disk_ms and settings.share:
            self.waits = self._waits_for_disk(settings.disk_ms)
        self.layer_done_counter = LayerGate(gates(layout), self._computing, self._quiet)
        # For copies of indices: the engine's own streams may be busy for long.
        self._aside = torch.cuda.Stream(device) if self._cuda else None
        # It waits for all of the engine's streams, so that a mark on it is one on all of them.
        self._behind = torch.cuda.Stream(device) if self._cuda else None
        self._offloads = Offloads(
            self._store, self._quiet, most_pages=max(1, layout.blocks // LOCKED_SHARE), tick=self._show
        )
        self._queued: dict[str, tuple[Load, bool]] = {}
        """Loads that no batch has started with yet, and whether each may still run when one does."""
        self._used = False
        # It compiles C++ the first time, for seconds: better now than in the first request.
        get_native_hash([1], None, 1)
        logger.info("SwiftCache: loads are %s", "waited for" if self._waits else "layer by layer where that is safe")

    # Loads.

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        (transfer,) = transfers
        found, anew = self._attempt("a lookup failed", self._hits.lookup, rid, transfer.keys) or (0, False)
        if anew:
            self._shown.count("lookups")
            self._shown.count("lookup_tokens", len(transfer.keys) * self._page)
        return list(range(1, found + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        (transfer,) = transfers
        self._used = True
        started = self._attempt("a load could not start", self._start, rid, transfer)
        load, runs = started or (None, False)
        good = load is not None and (runs or self._attempt("a load did not end", load.finish) == [])
        if not self._all_ranks(good):
            if load is not None:
                # The slots go back to SGLang: nothing may still be on its way to them.
                self._attempt("a load did not end", load.finish)
            self._shown.count("failed_loads")
            self._quiet.trouble("blocks were gone or lost before they were read", "they are computed")
            return False
        self.cancel_queued_load(rid)
        self._queued[rid] = (load, runs)
        self._shown.count("promised_tokens", len(transfer.keys) * self._page)
        self._shown.count("layer_wise_loads" if runs else "waited_loads")
        return True

    def _start(self, rid: str, transfer: PoolTransfer) -> tuple[Load, bool] | None:
        """Queues the copies. Returns the load, and whether it may run on while its batch does."""
        hit = self._hits.take(rid, transfer.keys)
        if len(hit) < len(transfer.keys):
            return None
        # The slots may have been another request's until now, whose forward still runs.
        load = hit.load(self._blocks(transfer.device_indices), self._mark())
        safe = hit.own_blocks >= len(transfer.keys) and not load.missing()
        return load, safe and not self._waits and self.layer_done_counter.proven

    def _all_ranks(self, good: bool) -> bool:
        return self._reduced([int(good)], dist.ReduceOp.MIN) == [1]

    def _reduced(self, numbers: list[int], by: Any) -> list[int]:
        if not self._groups:
            return numbers
        reduced = torch.tensor(numbers, dtype=torch.int)
        for group in self._groups:
            dist.all_reduce(reduced, op=by, group=group)
        return reduced.tolist()

    def _waits_for_disk(self, disk_ms: int) -> DiskWaits | None:
        if not waits.serve(SwiftCacheLinker):
            logger.warning(
                "SwiftCache: this SGLang forms its batches in another way: no request waits for pages on a disk"
            )
            return None
        return DiskWaits(
            self._hits.coming,
            disk_ms=disk_ms,
            together=lambda numbers: self._reduced(numbers, dist.ReduceOp.MAX),
        )

    def ask_anew(self, rid: str) -> None:
        """The next lookup of a request is not answered by what was found a moment ago."""
        self._hits.drop(rid)

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        queued, self._queued = list(self._queued.values()), {}
        layer_wise = any(runs for _, runs in queued)
        return self.layer_done_counter.begin([load for load, _ in queued], layer_wise=layer_wise)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        landed = self.layer_done_counter.finish(counter_index)
        if not landed:
            self._shown.count("aborted_loads")
        return landed

    def cancel_queued_load(self, rid: str) -> bool:
        load, _ = self._queued.pop(rid, (None, False))
        if load is not None:
            self._attempt("a load did not end", load.finish)
        return load is not None

    # Offloads. All ranks say that they have taken one, whatever comes of it: the results come in order on each.

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        (transfer,) = transfers
        self._used = True
        mark = self._attempt("the engine's stream could not be marked", self._mark)
        ready = self._attempt("the engine's stream could not be marked", self.record_offload_ready)
        keys = self._keys.of(map(bytes.fromhex, transfer.keys))
        # The first event: what to offload is known. That it is computed is what the mark says.
        if ready is None:
            mark, ready = None, []
        self._offloads.add(Job(keys, len(transfer.keys), transfer.device_indices, mark, ready[:1]))
        return True

    def _store(self, job: Job) -> Store:
        """On the thread of the offloads."""
        for event in job.ready:
            event.synchronize()
        with torch.cuda.stream(self._aside):
            blocks = self._blocks(job.slots)
        return self._cache.store(job.keys, blocks, [job.mark] * self._entries)

    def num_completed_offloads(self) -> int:
        # SGLang asks at every step.
        self._hits.let_go()
        return self._offloads.done

    def pop_completed_offload(self) -> bool:
        return self._offloads.take()

    # Life.

    def reset(self) -> None:
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        self.layer_done_counter.reset()
        self._offloads.drain()
        self._forget()

    def weights_changed(self) -> None:
        self._used = True
        self._forget()

    def _forget(self) -> None:
        """What was stored until now is found no more. An engine that has done nothing yet has nothing to forget, and
        still shares with others after that."""
        self._hits.forget()
        if self._used:
            self._keys.reset()

    def close(self) -> None:
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        self.layer_done_counter.reset()
        self._offloads.close()
        self._hits.forget()
        self._attempt("the counters could not be read", self._show, True)
        self._cache.close()
        self._opener.close()

    def _show(self, now: bool = False) -> None:
        self._shown.set_total("dropped_pages", self._offloads.dropped_pages)
        self._shown.set_total("unwaited_batches", self.layer_done_counter.unwaited_batches)
        self._shown.show(self._cache.stats, now=now)

    # Streams and slots.

    def _computing(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self._cuda else 0

    def _mark(self) -> Mark:
        """The present end of the engine's work, on whichever stream its forwards run: that depends on how it schedules.
        On CPUs it is always over."""
        if self._behind is None:
            return self._cache.mark(0)
        self._behind.wait_stream(torch.cuda.current_stream())
        if self.forward_stream is not None:
            self._behind.wait_stream(self.forward_stream)
        return self._cache.mark(self._behind.cuda_stream)

    def _blocks(self, slots: torch.Tensor) -> list[int]:
        """The block of each page, from the slots of its tokens."""
        return (slots[:: self._page].cpu() // self._page).tolist()
