"""The worker's half: loads into and stores out of this worker's pool, through the native client.

All copying is the client's, on its own threads and streams. Here is only the order of things: what a step's forward
needs is there before it reads, what a store reads is not overwritten before it is through, and whatever fails is
reported in the step that it concerns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from swiftcache.engine.fingerprint import Ranks, namespace
from swiftcache.engine.keys import Keys
from swiftcache.engine.layout import Layout
from swiftcache.engine.loans import WorkerLoans
from swiftcache.engine.metrics import Meter
from swiftcache.engine.opener import CacheOpener
from swiftcache.engine.quiet import Quiet, logger
from swiftcache.vllm.claims import Claims
from swiftcache.vllm.facts import backends, facts, group_facts, ranks_here
from swiftcache.vllm.landing import BrokenPromise, Landing
from swiftcache.vllm.layout import layout_of
from swiftcache.vllm.metadata import Handshake, LoadJob, StepMetadata, StoreJob, WorkerReport
from swiftcache.vllm.metrics import SwiftCacheStats
from swiftcache.vllm.stream.pool import StitchedPool
from swiftcache.vllm.updates import watch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from swiftcache._native import Cache, Claim, Load, Mark, Store
    from swiftcache.engine.settings import Settings
    from swiftcache.vllm.stream.staging import Staging

MARKED_BYTES = 64 << 20
"""Stores of at most so much in a step start when the forward is over: they take 0.2 ms over NVLink. Starting each
layer's part as soon as that is computed would save less than the marks cost."""
STATS_SECONDS = 1.0
"""Reading the client's counters each step would cost more than a step's hooks do."""


class WorkerSide:
    def __init__(
        self,
        config: VllmConfig,
        settings: Settings,
        kv: KVCacheConfig,
        *,
        block_tokens: int,
        sync: bool,
        publish_outcome: bool,
        promises: bool = False,
        reports_itself: bool = False,
        stitched: StitchedPool | None = None,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._settings, self._kv = config, settings, kv
        self._block_tokens = block_tokens
        self._sync = sync
        self._publish_outcome = publish_outcome
        self._promises = promises
        self._reports_itself = reports_itself
        self._stitched = stitched
        self._staging: Staging | None = None
        self._ranks = ranks or ranks_here()
        self._clock = clock
        self._quiet = Quiet()
        self._attempt = self._quiet.attempt
        self._loans = WorkerLoans(self._quiet)
        self._opener = CacheOpener(settings, f"vllm-tp{self._ranks.tp}-pp{self._ranks.pp}")
        self._cache: Cache | None = None
        self._layout: Layout | None = None
        self._caches: Mapping[str, torch.Tensor] = {}
        self._ends: dict[str, list[int]] = {}
        """Of each layer, the entries of the layout that no later layer has."""
        self._cuda = False
        self._streams: set[int] = set()
        """The engine's, of the steps that loaded or stored something: one. Asking in every step would take longer than
        all else that a step without orders does."""
        self._by_layer = False
        """Whether this step's stores start layer by layer."""
        self.namespace = ""
        self._step: StepMetadata | None = None
        self._loading: list[tuple[LoadJob, Load]] = []
        self._receiving: dict[str, tuple[LoadJob, Load | None]] = {}
        self._landing: Landing | None = None
        self._claims: Claims | None = None
        self._several = len(kv.kv_cache_groups) > 1
        self._lost: set[str] = set()
        """With several groups: requests with a failed load."""
        self._storing: dict[str, dict[int, tuple[StoreJob, Store]]] = {}
        self._marks: dict[int, Mark] = {}
        self._invalid: set[int] = set()
        self._tainted: set[str] = set()
        self._awaited = False
        self._report = WorkerReport()
        self._meter = Meter(f"{self._ranks.pp}.{self._ranks.tp}")
        self._next_stats = 0.0
        self._updates = 0
        """Of this worker's weights."""
        self._adapters: dict[int, bytes] = {}
        """Of each LoRA adapter, the digest of the files that it was loaded from."""
        self._outdated = False
        """The scheduler has ordered this step before it knew of the last update of weights."""
        self._private = Keys.private()
        self._watched = watch(self, config)

    # The pool.

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        if self._cache is not None:
            self.unregister()
        layout = layout_of(caches, self._kv.num_blocks, several=self._several)
        sample = next(iter(caches.values()))
        device = (sample[0] if isinstance(sample, (list, tuple)) else sample).device
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"SwiftCache serves CUDA and CPU engines, not {device.type}")
        self._cuda = device.type == "cuda"
        self._caches, self._layout = caches, layout
        last = {entry: name for name, entries in layout.by_layer.items() for entry in entries}
        self._ends = {}
        for entry, name in last.items():
            self._ends.setdefault(name, []).append(entry)
        known = facts(
            self._config,
            self._settings,
            layout,
            block_tokens=self._block_tokens,
            backends=backends(self._config, caches),
            ranks=self._ranks,
            groups=group_facts(self._kv) if self._several else None,
        )
        if not self._watched:
            known["weights"] = self._private
            logger.warning(
                "SwiftCache: this vLLM does not say when weights are updated: no blocks are shared with other engines"
            )
        seed = os.environ.get("PYTHONHASHSEED", "")
        self.namespace = namespace(known, self._ranks, seed)
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if self._cuda else None
        native = None
        if self._stitched is not None:
            native = self._stitched.native
            self._stitch(self._stitched, layout)
        self._cache = self._opener.open(
            self.namespace, layout, owner=caches, gpu=gpu, block_tokens=self._block_tokens, stitched=native
        )
        if self._promises:
            self._landing = Landing(layout.by_layer)
            self._claims = Claims(
                self._opener.borrower_id,
                self._landing,
                block_bytes=layout.block_bytes,
                may_claim=self._may_claim,
                claim=self._claim,
                begin=self._begin_early,
            )
        if self._reports_itself:
            self._report.met[self._ranks.pp, self._ranks.tp] = self._introduction()
        mode = "layer by layer" if self._sync else "asynchronous"
        if self._landing is not None:
            mode += ", and their ends layer by layer"
        logger.info(
            "SwiftCache: loads are %s; block hashes are %s with %s",
            mode,
            known["hash"],
            f"PYTHONHASHSEED={seed}" if seed else "no PYTHONHASHSEED",
        )

    def _stitch(self, stitched: StitchedPool, layout: Layout) -> None:
        from swiftcache.vllm.stream.staging import Staging

        assert stitched.layout is not None, "vLLM registers a KV cache that it has not allocated"
        speed = float("inf")
        if stitched.layout.units:
            # As the layer itself sees its pages: a kernel may cut a block into several.
            name = next(iter(layout.by_layer))
            layer = self._config.compilation_config.static_forward_context.get(name)
            pages = layer.kv_cache if layer is not None else self._caches[name]
            self._staging = Staging(list(layout.by_layer), layout.blocks, stitched.windows)
            self._staging.prepare(pages)
            with stitched.guarded():
                local = stitched.layout.local_blocks * (pages.shape[0] // layout.blocks)
                speed = self._staging.measure(pages, local)
        stitched.say(block_tokens=self._block_tokens, longest=self._config.model_config.max_model_len, speed=speed)

    def handshake(self) -> Handshake | None:
        """Who this worker is, unless its first report says it."""
        return None if self._reports_itself else self._introduction()

    def _introduction(self) -> Handshake:
        layout = self._stitched.layout if self._stitched is not None else None
        return Handshake(self.namespace, self._opener.borrower_id, layout.local_blocks if layout is not None else None)

    def unregister(self) -> None:
        """Lets go of the pool, when every copy is over: before vLLM frees or moves it."""
        self._wait_all()
        if self._claims is not None:
            self._claims.keep(())
            self._claims = None
        if self._cache is not None:
            self._cache.close()
            # What others still have when closing gives up waiting is never said to be back.
            self._back(self._loans.returned(self._cache))
            self._cache = None

    def restore(self) -> None:
        """Takes the pool up again, at the same tensors."""
        if self._cache is None and self._caches:
            self.register(self._caches)

    def close(self) -> None:
        self.unregister()
        self._caches = {}
        self._opener.close()

    def _wait_all(self) -> None:
        for _, load in [*self._loading, *self._receiving.values()]:
            if load is not None:
                self._attempt("a load did not end", load.finish)
        if self._landing is not None:
            self._landing.wait()
        for jobs in self._storing.values():
            for _, store in jobs.values():
                self._attempt("a store did not end", store.finish)

    # What changes in between (`updates`).

    def weights_changed(self) -> None:
        self._updates += 1
        self._report.weights[self._ranks.pp, self._ranks.tp] = self._updates
        # What is loaded now is of the old ones.
        self._tainted.update(job.request for job, _ in self._loading)
        self._tainted.update(self._receiving)

    def adapter_loaded(self, number: int, files: bytes) -> None:
        self._adapters[number] = files

    def sleeps(self) -> None:
        self.unregister()

    def wakes(self) -> None:
        self.restore()

    # What the scheduler does with the worker of its own process (`claims`).

    def _may_claim(self, weights: Mapping[tuple[int, int], int]) -> bool:
        """Whether a load of the next step is not behind others, and of weights that the scheduler knows."""
        return not self._receiving and weights.get((self._ranks.pp, self._ranks.tp), 0) == self._updates

    def _claim(self, keys: bytes, most_bytes: int) -> Claim | None:
        if self._cache is None:
            return None
        return self._attempt("blocks could not be claimed", self._cache.claim, keys, most_bytes)

    def _begin_early(self, claim: Claim, blocks: list[int]) -> Load | None:
        """Begins behind all that the engine has queued, unless a store still reads these blocks: the step has given
        them away, and waits for it first (`before_overwriting`). Loads into them are over, or nothing is claimed."""
        if stores := [store for jobs in self._storing.values() for store in jobs.values()]:
            written = set(blocks)
            if any(not written.isdisjoint(job.blocks) and not store.is_done() for job, store in stores):
                return None
        if not self._cuda:
            return claim.load(blocks)
        if len(self._streams) != 1 or self._cache is None:
            return None
        (stream,) = self._streams
        after = self._attempt("the engine's stream could not be marked", self._cache.mark, stream)
        return claim.load(blocks, after) if after is not None else None

    def _may_load(self, job: LoadJob) -> bool:
        """An adapter may be loaded after the blocks of its requests."""
        return not self._outdated and (
            job.adapter is None or self._adapters.get(job.adapter.number, job.adapter.files) == job.adapter.files
        )

    def _may_store(self, job: StoreJob) -> bool:
        return not self._outdated and (
            job.adapter is None or self._adapters.get(job.adapter.number) == job.adapter.files
        )

    # A step, in vLLM's order.

    def before_overwriting(self, step: StepMetadata) -> None:
        """Waits for the stores whose blocks this step gives to others, and for loads into blocks that it may give."""
        if self._landing is not None and step.arrived:
            self._landing.arrived(step.arrived)
        if not step.fence:
            return
        fence = set(step.fence)
        for jobs in self._storing.values():
            for number in fence.intersection(jobs):
                self._attempt("a store did not end", jobs[number][1].finish)

    def bind(self, step: StepMetadata | None) -> None:
        self._step = step
        self._marks.clear()
        if self._landing is not None and step is not None:
            self._landing.step()
        if self._staging is not None:
            ahead = step is not None and not any(job.sync for job in step.loads)
            self._staging.begin(step.staged if step is not None else 0, ahead)
        if step is not None:
            self._outdated = step.weights.get((self._ranks.pp, self._ranks.tp), 0) != self._updates
            self._report.settled = step.doubt
            if step.stores and self._cuda and self._layout is not None:
                blocks = sum(len(job.blocks) for job in step.stores)
                self._by_layer = blocks * self._layout.block_bytes > MARKED_BYTES
            self._lend(step)

    def is_quiet(self) -> bool:
        """Whether a step that has begun has nothing to do here, so that none of its other hooks need be called: nothing
        is ordered, under way or to be reported."""
        return (
            self._step is not None
            and self._step.orders_nothing()
            and not (self._storing or self._receiving or self._loading or self._invalid or self._loans.lends)
            and self._staging is None
            and (self._landing is None or self._landing.at_rest)
            and self._report.is_empty()
            and self._clock() < self._next_stats
        )

    def _lend(self, step: StepMetadata) -> None:
        """After the fence: blocks that were given up in this step may be lent in it."""
        if not step.lend and not step.take_back:
            return
        self._attempt("lent blocks could not be asked back", self._loans.take_back, step.take_back, self._cache)
        mark = self._mark if self._cuda else lambda: None
        back, refused = self._loans.lend(step.lend, self._cache, self._layout, mark)
        self._back(back)
        self._report.lend_refused = refused or self._report.lend_refused

    def _back(self, loans: list[int]) -> None:
        self._report.back.update(dict.fromkeys(loans, 1))

    def start_loads(self) -> None:
        step = self._step
        if step is None or not step.loads:
            return
        after = self._attempt("the engine's stream could not be marked", self._mark) if self._cuda else None
        # The forward waits for what is claimed, so that goes first.
        for job in sorted(step.loads, key=lambda job: not job.claimed):
            if job.claimed:
                self._load_claimed(job, after)
                continue
            load = None
            if self._cache is not None and (after is not None or not self._cuda) and self._may_load(job):
                load = self._attempt("a load could not start", self._cache.load, job.keys, job.blocks, after)
            if not job.sync:
                self._receiving[job.request] = (job, load)
            elif load is None:
                self._failed(job, range(len(job.blocks)))
            else:
                self._loading.append((job, load))

    def _load_claimed(self, job: LoadJob, after: Mark | None) -> None:
        load = None
        if self._claims is not None and (after is not None or not self._cuda):
            load = self._claims.load(job.request, job.blocks, after)
        if load is None or self._landing is None:
            raise BrokenPromise(
                "SwiftCache: a load cannot begin that vLLM was told cannot fail. The engine ends, since it would "
                "compute on KV that is not there"
            )
        self._landing.begin(load, job.computes)

    def wait_for_layer(self, name: str) -> None:
        """The layer has written its new KV and is about to read."""
        if self._loading:
            self._awaited = True
            for job, load in self._loading:
                # What fails to load is known, and reported, when the load is finished. What could not be waited for
                # may have been read too early, however the load ends.
                if self._attempt("a layer could not be waited for", _done, self._wait_for_load, name, load) is None:
                    self._tainted.add(job.request)
        if self._landing is not None:
            self._landing.wait_for_layer(name, lambda load: self._wait_for_load(name, load))
        if self._staging is not None:
            # What cannot be staged is read where it is.
            self._attempt("a layer's leased KV could not be staged", self._staging.enter, name)

    def _wait_for_load(self, name: str, load: Load) -> None:
        # A forward of few tokens takes as long as queueing it does, and having a stream wait for a layer 20 to 50 us of
        # that (docs/benchmarks.md): where everything has arrived, nothing waits.
        if self._layout is None or load.is_done():
            return
        stream = torch.cuda.current_stream().cuda_stream if self._cuda else 0
        for entry in self._layout.by_layer.get(name, ()):
            if self._cuda:
                load.gate_layer(entry, stream)
            else:
                load.wait_layer(entry)

    def layer_computed(self, name: str) -> None:
        """Lets this layer's write-back start while later layers compute."""
        if self._staging is not None:
            self._staging.leave()
        if not self._cuda or self._step is None or not self._step.stores or not self._by_layer:
            return
        mark = self._attempt("the engine's stream could not be marked", self._mark)
        # Pages of other layers may lie over this one's, and layers with a state say nothing when they are computed. So
        # a page is marked by the last layer that has it, or at the end of the forward.
        for entry in self._ends.get(name, ()):
            if mark is not None:
                self._marks[entry] = mark

    def start_stores(self) -> None:
        """After the forward, draft model included. Queues copies and returns."""
        step = self._step
        if step is None or not step.stores:
            return
        marks: list[Mark] = []
        if self._cuda and self._layout is not None:
            end = self._attempt("the engine's stream could not be marked", self._mark)
            if end is None:
                return self._give_up(step.stores)
            marks = [self._marks.get(entry, end) for entry in range(len(self._layout.entries))]
        for job in step.stores:
            cache, store = self._cache, None
            if cache is not None and self._may_store(job):
                store = self._attempt("a store could not start", cache.store, job.keys, job.blocks, marks)
            if store is None:
                self._give_up([job])
            else:
                self._storing.setdefault(job.request, {})[job.number] = (job, store)

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose load is over, and those of these of which vLLM is to compute everything again."""
        if self._storing:
            self._poll_stores()
        if self._loans.lends:
            self._back(self._attempt("lent blocks did not answer", self._loans.returned, self._cache) or [])
        received = set()
        if self._landing is not None:
            self._landing.forward_over()
        in_turn = True
        for request, (job, load) in list(self._receiving.items()):
            if load is None:
                self._failed(job, range(len(job.blocks)))
            elif self._attempt("a load did not answer", load.is_done) is not False:
                self._finish(job, load)
            elif in_turn and self._promised(job, load):
                in_turn = False
            else:
                in_turn = False
                continue
            del self._receiving[request]
            self._tainted.discard(request)
            received.add(request)
        failed, self._lost = self._lost, set()
        return received, failed

    def invalid_blocks(self) -> set[int]:
        """Blocks that this step's forward must not have relied on. Ends the loads it waited for."""
        if self._loading:
            if not self._awaited:
                self._quiet.trouble("vLLM ran a forward without waiting for its loads", "they are computed instead")
                self._tainted.update(job.request for job, _ in self._loading)
            for job, load in self._loading:
                self._finish(job, load)
            self._loading.clear()
            self._tainted.clear()
        self._awaited = False
        invalid, self._invalid = self._invalid, set()
        return invalid

    def report(self) -> WorkerReport | None:
        if self._report.is_empty():
            return None
        report, self._report = self._report, WorkerReport()
        return report

    def stats(self) -> SwiftCacheStats | None:
        now = self._clock()
        # What the last requests did is counted in the last step, or not before somebody asks again.
        last = self._step is not None and self._step.idle
        if self._cache is None or (now < self._next_stats and not last):
            return None
        self._next_stats = now + STATS_SECONDS
        totals = self._attempt("the client's counters could not be read", self._cache.stats)
        if totals is None:
            return None
        # The last stores are over, and the client's own thread may be about to count them.
        self._report.unsettled = last and bool(totals.get("unsettled_slabs"))
        if self._stitched is not None:
            totals |= self._attempt("the stitched pool's counters could not be read", self._stitched.totals) or {}
        if self._landing is not None:
            totals |= {"layer_wise_ends": self._landing.count, "claimed_loads": self._landing.claimed}
        stats = SwiftCacheStats()
        self._meter.read(totals, stats)
        return stats

    def reset_capture(self) -> None:
        """Capturing graphs runs the hooks of layers; nothing of that may reach a real step."""
        self._marks.clear()
        self._loading.clear()
        self._tainted.clear()
        self._awaited = False
        if self._landing is not None:
            self._landing.forget_capture()

    # Ends.

    def _poll_stores(self) -> None:
        for request, jobs in list(self._storing.items()):
            for number, (job, store) in list(jobs.items()):
                done = self._attempt("a store did not answer", store.is_done)
                if done is False:
                    continue
                lost = False
                # A store that did not answer may still read its blocks: they are free when it has ended.
                if done is None or self._publish_outcome:
                    outcome = self._attempt("a store did not end", store.finish) or {}
                    lost = outcome.get("stored", 0) + outcome.get("known", 0) < len(job.blocks)
                del jobs[number]
                self._over(number, lost)
            if not jobs:
                del self._storing[request]

    def _over(self, number: int, lost: bool) -> None:
        self._report.done[number] = 1
        if lost:
            self._report.lost.add(number)

    def _give_up(self, jobs: list[StoreJob]) -> None:
        for job in jobs:
            self._over(job.number, True)

    def _promised(self, job: LoadJob, load: Load) -> bool:
        if self._landing is None or job.request in self._tainted:
            return False
        return bool(self._attempt("a load did not answer", self._landing.promise, job.request, load))

    def _finish(self, job: LoadJob, load: Load) -> None:
        failed = self._attempt("a load did not end", load.finish)
        if failed is None or job.request in self._tainted:
            failed = list(range(len(job.blocks)))
        if failed:
            self._quiet.trouble(
                "blocks were gone or lost before they were read, and are computed",
                f"{len(failed)} of {len(job.blocks)}",
            )
            self._failed(job, failed)

    def _failed(self, job: LoadJob, positions: Any) -> None:
        positions = list(positions)
        if self._several:
            # vLLM cannot tell whose a block is.
            self._lost.add(job.request)
            first = job.first
        else:
            self._invalid.update(job.blocks[position] for position in positions)
            first = job.first + min(positions)
        self._report.failed[job.request] = min(first, self._report.failed.get(job.request, first))

    def _mark(self) -> Mark:
        assert self._cache is not None
        stream = torch.cuda.current_stream().cuda_stream
        self._streams.add(stream)
        return self._cache.mark(stream)


def _done(call: Callable[..., Any], *arguments: Any) -> bool:
    call(*arguments)
    return True
