"""The parts of the stitched pool against made-up parts of vLLM: what is refused, placed, staged, merged and guarded."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stage
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import KVCacheTensor, SlidingWindowSpec

from swiftcache.engine.fingerprint import Ranks
from swiftcache.engine.settings import Settings
from swiftcache.engine.stitch import Shape
from swiftcache.vllm import SwiftCacheConnector
from swiftcache.vllm.stream import inside, refusals
from swiftcache.vllm.stream import pool as stitched
from swiftcache.vllm.stream import worker as workers
from swiftcache.vllm.stream.gather import Span, as_words, gather
from swiftcache.vllm.stream.placement import LocalFirst, Placement
from swiftcache.vllm.stream.pool import StitchedPool
from swiftcache.vllm.stream.segments import Parts, Segmented
from swiftcache.vllm.stream.staging import Side, Staging

PAGE = 256
"""Bytes of a block in each of the two layers of `stage`."""
STREAMING = {"stream_bytes": 32768, "stream_window_bytes": 8 * PAGE}
LOCAL = 40 * 2 * PAGE
"""Bytes of the worker's own memory: 40 blocks, of which two windows take eight."""


@pytest.fixture
def alone(monkeypatch):
    """No stitched pool is left behind."""
    monkeypatch.setattr("swiftcache.vllm.worker.ranks_here", Ranks)
    monkeypatch.setattr(workers, "ranks_here", Ranks)
    yield
    stitched.use(None)


def configured(**fields: Any) -> SimpleNamespace:
    made = stage.config(
        kv_transfer_config__kv_connector_extra_config=dict(STREAMING),
        model_config__max_model_len=400,
        model_config__enable_sleep_mode=False,
        **fields,
    )
    made.cache_config.get_resolved_kv_cache_layout = lambda: SimpleNamespace(is_block_outermost=False)
    return made


class Platform:
    """A worker as vLLM's are, of two layers, on CPU."""

    def __init__(self, vllm_config: Any, rank: int = 0) -> None:
        self.vllm_config, self.rank, self.device = vllm_config, rank, torch.device("cpu")
        self.seen: list[int] = []

    def determine_available_memory(self) -> int:
        return LOCAL

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return {f"model.layers.{number}.self_attn.attn": stage.spec() for number in range(2)}

    def compile_or_warm_up_model(self) -> str:
        return self._run("warm")

    def execute_model(self, output: str) -> str:
        return self._run(output)

    def sample_tokens(self, output: str) -> str:
        return self._run(output)

    def execute_dummy_batch(self) -> None:
        self._run("dummy")

    def _run(self, output: str) -> str:
        self.seen.append(self._stream_pool.native.inside)
        return output

    def shutdown(self) -> None:
        self.seen.append(-1)


def opened(native) -> tuple[Any, int]:
    worker = workers.over(Platform)(configured(), rank=3)
    return worker, worker.determine_available_memory()


def allocated(worker: Any, total: int) -> tuple[SwiftCacheConnector, dict[str, torch.Tensor], int]:
    """What vLLM does next: makes the connector, and allocates one tensor in its context."""
    blocks = total // (2 * PAGE)
    size = blocks * 2 * PAGE
    names = list(worker.get_kv_cache_spec())
    config = stage.kv_config(blocks=blocks)
    placed = KVCacheTensor(size=size, layers=names, layer_stride=blocks * PAGE, block_stride=PAGE)
    config.kv_cache_tensors.append(placed)
    connector = SwiftCacheConnector(worker.vllm_config, KVConnectorRole.WORKER, config)
    with connector.get_mem_pool_context():
        raw = torch.zeros(size, dtype=torch.int8, device=torch.device("cpu"))
        assert torch.zeros(3, dtype=torch.int32).shape == (3,), "what is not the KV cache is left alone"
    views = raw.view(torch.float32).view(2, blocks, 2, stage.BLOCK, 8)
    return connector, dict(zip(names, views, strict=True)), blocks


# From the worker to the KV cache.


def test_the_worker_reports_local_and_leased_bytes_and_the_kv_cache_is_the_pool(native, alone, caplog) -> None:
    worker, total = opened(native)
    # Two windows come off; four slabs of 4 KiB make rows of two; and something is kept for rounding.
    assert total == LOCAL - 2 * 8 * PAGE + 8 * 4096 - 256
    with caplog.at_level(logging.INFO, "swiftcache"):
        connector, caches, blocks = allocated(worker, total)
        connector.register_kv_caches(caches)
    pool = worker._stream_pool
    assert pool.layout.local_blocks == 31 and len(pool.layout.units) == 8
    native_memory = stitched.ctypes.addressof(pool.native.memory)
    assert next(iter(caches.values())).data_ptr() == native_memory
    assert connector.worker._cache.stream_pool is pool.native
    assert connector.get_handshake_metadata().local_blocks == 31
    said = next(record.getMessage() for record in caplog.records if "stitched pool" in record.getMessage())
    assert f"{(blocks - 1) * stage.BLOCK} tokens fit" in said and f"the {30 * stage.BLOCK} that are local" in said
    # 400 tokens are 100 blocks, more than there are: all but the local ones are read from neighbours.
    assert f"reads {(blocks - 31) * 2 * PAGE} bytes" in said and "GB/s" in said and "(32768) are held" in said
    connector.shutdown()
    worker.shutdown()
    assert worker.seen[-1] == -1 and stitched.stitched_pool(Settings()) is None


def test_the_guard_is_held_over_everything_that_computes(native, alone) -> None:
    worker, _ = opened(native)
    pool = worker._stream_pool.native
    assert worker.execute_model("a") == "a" and worker.sample_tokens("b") == "b"
    assert worker.compile_or_warm_up_model() == "warm"
    worker.execute_dummy_batch()
    assert worker.seen == [1, 1, 1, 1] and pool.inside == 0
    # An exception of the engine's does not leave it held, and one of the pool's stops the engine.
    worker._run = lambda output: 1 / 0
    with pytest.raises(ZeroDivisionError):
        worker.execute_model("a")
    assert pool.inside == 0
    pool.broken = True
    with pytest.raises(RuntimeError, match="mapped nowhere"):
        worker.execute_model("a")
    worker.shutdown()
    assert pool.closed


def test_an_engine_that_allocates_otherwise_is_refused(native, alone) -> None:
    worker, total = opened(native)
    connector, *_ = allocated(worker, total)
    for size, dtype in [(total + 512, torch.int8), (total, torch.uint8)]:
        with pytest.raises(RuntimeError, match="did not allocate its KV cache"), connector.get_mem_pool_context():
            torch.zeros(size, dtype=dtype)
    with pytest.raises(RuntimeError, match="twice"), connector.get_mem_pool_context():
        torch.zeros(connector._kv_bytes, dtype=torch.int8)


def test_counters_of_the_pool_reach_the_metrics(native, alone) -> None:
    worker, total = opened(native)
    connector, caches, _ = allocated(worker, total)
    connector.register_kv_caches(caches)
    worker._stream_pool.native.due = 3
    worker.execute_model("a")
    found = connector.get_kv_connector_stats()
    assert found.data["counters"]["stitched_moves"] == 3
    assert found.reduce()["stitched_leased_bytes"] == 32768 and found.reduce()["stitched_floor_bytes"] == 4096


# Refusals.


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_config__enable_sleep_mode": True}, "enable-sleep-mode"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel_config__enable_elastic_ep": True}, "elastic"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields, named) -> None:
    settings = Settings(stream_bytes=1 << 30)
    refusals.check(stage.config(), settings, {})
    with pytest.raises(ValueError, match=named):
        refusals.check(stage.config(**fields), settings, {})


def test_lending_and_mig_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="together with lend"):
        refusals.check(stage.config(), Settings(stream_bytes=1, lend=0.5), {})
    with pytest.raises(ValueError, match="MIG"):
        refusals.check(stage.config(), Settings(stream_bytes=1), {"CUDA_VISIBLE_DEVICES": "MIG-1234"})


def test_the_worker_and_the_setting_need_each_other(native, alone) -> None:
    extra = "kv_transfer_config__kv_connector_extra_config"
    with pytest.raises(ValueError, match="needs stream_bytes"):
        workers.over(Platform)(stage.config(**{extra: {}}))
    with pytest.raises(ValueError, match="not MultiConnector"):
        workers.over(Platform)(stage.config(kv_transfer_config__kv_connector="MultiConnector"))
    with pytest.raises(ValueError, match="not none"):
        workers.over(Platform)(stage.config(kv_transfer_config=None))
    with pytest.raises(ValueError, match="--worker-cls swiftcache"):
        SwiftCacheConnector(configured(), KVConnectorRole.WORKER, stage.kv_config())


def test_layers_that_keep_different_things_are_refused() -> None:
    specs = {"a": stage.spec(), "b": stage.spec()}
    assert refusals.page_of(specs) == PAGE
    window = SlidingWindowSpec(block_size=4, num_kv_heads=2, head_size=4, dtype=torch.float32, sliding_window=8)
    with pytest.raises(ValueError, match="SlidingWindowSpec"):
        refusals.page_of(specs | {"c": window})
    with pytest.raises(ValueError, match="blocks of one size"):
        refusals.page_of(specs | {"c": stage.spec(head_size=8)})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stream_window_bytes": PAGE - 1}, "stream_window_bytes"),
        ({"stream_window_bytes": LOCAL}, "stream_window_bytes"),
        ({"stream_bytes": 4096}, "Set stream_bytes to 8192"),
        ({"stream_window_bytes": (LOCAL // 2 // PAGE - 1) * PAGE}, "no block would be local"),
    ],
)
def test_sizes_that_cannot_work_name_the_setting(native, alone, settings, named) -> None:
    pool = StitchedPool(Settings(**(STREAMING | settings)), name="n", namespace="m/stream")
    with pytest.raises(ValueError, match=named):
        pool.open(LOCAL, Shape(2, PAGE), page=PAGE, device=torch.device("cpu"))
    assert pool._native is None or pool._native.closed, "nothing is held"


def test_another_platform_and_another_list_of_free_blocks_are_refused(monkeypatch) -> None:
    other = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="tpu")
    monkeypatch.setattr(inside, "current_platform", other)
    with pytest.raises(inside.Unsupported, match="not on tpu"):
        inside.platform_worker()
    pool = BlockPool(8, True, stage.BLOCK)
    inside.FreeBlocks(pool)
    monkeypatch.setattr(inside.FreeKVCacheBlockQueue, "shuffle", lambda self: None, raising=False)
    with pytest.raises(inside.Unsupported, match="also has shuffle"):
        inside.FreeBlocks(pool)
    with pytest.raises(inside.Unsupported, match="lacks popleft"):
        inside.FreeBlocks(SimpleNamespace(free_block_queue=object()))


# Placement.


class Blocks:
    """vLLM's own pool of 12 blocks, of which the first 6 are local."""

    def __init__(self) -> None:
        self.pool = BlockPool(12, True, stage.BLOCK)
        self.placement = Placement(inside.FreeBlocks(self.pool), 6)

    def take(self, count: int) -> list[Any]:
        return self.pool.get_new_blocks(count)

    def cache(self, blocks: list[Any], name: str) -> list[Any]:
        """Has the blocks hold a prefix."""
        request = stage.request(name, len(blocks) * stage.BLOCK, start=hash(name) % 1000)
        request.request_id, request.session_id = name, None
        self.pool.cache_full_blocks(request, blocks, 0, len(blocks), stage.BLOCK, 0)
        return blocks

    def next(self) -> list[int]:
        return ids(self.pool.free_block_queue.get_all_free_blocks())


def ids(blocks: list[Any]) -> list[int]:
    return [block.block_id for block in blocks]


def test_local_blocks_come_first_however_they_were_given_back() -> None:
    of = Blocks()
    assert of.next() == list(range(1, 12))
    taken = of.take(8)
    assert ids(taken) == list(range(1, 9))
    # vLLM's own list would have given away 8, 7, 6 first.
    of.pool.free_blocks(reversed(taken))
    assert ids(of.take(5)) == [5, 4, 3, 2, 1] and of.pool.get_num_free_blocks() == 6


def test_a_local_block_that_is_kept_elsewhere_goes_before_a_leased_one_and_another_does_not() -> None:
    of = Blocks()
    cached = of.cache(of.take(5), "prefix")
    kept = of.placement.holding(ids(cached[:2]))
    of.pool.free_blocks(reversed(cached))
    assert of.next()[0] == 6, "what is kept nowhere else stays"
    of.placement.kept_elsewhere(kept)
    assert of.next() == [1, 2, *range(6, 12), 5, 4, 3]
    # The other order: known before it is given back.
    again = of.take(2)
    assert ids(again) == [1, 2] and again[0].block_hash is None, "what it held is forgotten here"
    of.cache(again, "other")
    of.pool.free_blocks(again)
    assert of.next()[0] == 6, "it was something else that is kept"


def test_what_a_block_held_before_says_nothing_about_what_it_holds() -> None:
    of = Blocks()
    cached = of.cache(of.take(2), "prefix")
    kept = of.placement.holding(ids(cached))
    of.pool.free_blocks(cached)
    of.pool.evict_blocks({1, 2})
    of.placement.kept_elsewhere(kept)
    assert of.pool.get_num_free_blocks() == 11 and sorted(of.next()) == list(range(1, 12))


def test_after_a_reset_local_blocks_come_first_again() -> None:
    of = Blocks()
    of.pool.free_blocks(of.cache(of.take(5), "prefix"))
    assert of.next()[0] == 6
    assert of.pool.reset_prefix_cache() and sorted(of.next()[:5]) == [1, 2, 3, 4, 5]


def test_blocks_are_found_taken_out_and_counted_in_every_list() -> None:
    of = Blocks()
    cached = of.cache(of.take(7), "prefix")
    of.pool.free_blocks(cached)
    of.placement.kept_elsewhere(of.placement.holding([3]))
    queue = of.pool.free_block_queue
    assert isinstance(queue, LocalFirst) and queue.num_free_blocks == 11
    order = of.next()
    for position, block in enumerate(order):
        assert ids(queue.iter_blocks_after(of.pool.blocks[block])) == order[position + 1 :]
    # A prefix hit takes blocks out of the middle.
    of.pool.touch([of.pool.blocks[number] for number in (3, 7, 9)])
    assert of.next() == [number for number in order if number not in (3, 7, 9)]
    assert len({queue.popleft().block_id for _ in range(8)}) == 8
    with pytest.raises(ValueError, match="No free blocks"):
        queue.popleft()


def test_pools_of_vllm_behave_alike_but_for_the_order() -> None:
    """Blocks taken, cached, hit, evicted and given back at random: never one twice, never one lost."""
    import random

    for seed in range(30):
        source, of, held = random.Random(seed), Blocks(), []
        for number in range(60):
            free = of.pool.get_num_free_blocks()
            assert sorted(of.next() + ids(held)) == list(range(1, 12)), (seed, number)
            if held and source.random() < 0.5:
                block = held.pop(source.randrange(len(held)))
                if source.random() < 0.6 and block.block_hash is None:
                    of.cache([block], f"{seed}-{number}")
                    if source.random() < 0.5:
                        of.placement.kept_elsewhere(of.placement.holding([block.block_id]))
                of.pool.free_blocks([block])
            elif free:
                held += of.take(source.randint(1, free))
            if source.random() < 0.1:
                of.pool.evict_blocks({source.randrange(1, 12)})


# Gathering.


def spans(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, Span]:
    """Pages that say their number; a table of two requests; the second and third block of the first, all of the
    second."""
    pages = torch.arange(20, dtype=torch.int32, device=device).repeat_interleave(1500).view(20, 1500).contiguous()
    table = torch.tensor([[7, 3, 19, 0], [4, 4, 1, 2]], dtype=torch.int32, device=device)
    number = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    return pages, table, Span(number(1, 0), number(3, 3), number(-1, 2), 3)


def test_blocks_go_side_by_side() -> None:
    pages, table, span = spans()
    window = torch.full((6, 1500), -1, dtype=torch.int32)
    gather(window, pages, table, span)
    assert window[:, 0].tolist() == window[:, -1].tolist() == [3, 19, 4, 4, 1, -1]


def test_the_kernel_does_the_same_in_tritons_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    kernel = Path(inside.__file__).with_name("gather_kernel.py")
    code = (
        "import runpy, torch\n"
        f"launch = runpy.run_path({str(kernel)!r})['launch']\n"
        "number = lambda *values: torch.tensor(values, dtype=torch.int32)\n"
        "pages = number(*range(20)).repeat_interleave(1500).view(20, 1500).contiguous()\n"
        "table = torch.tensor([[7, 3, 19, 0], [4, 4, 1, 2]], dtype=torch.int32)\n"
        "window = torch.full((6, 1500), -1, dtype=torch.int32)\n"
        "launch(window, pages, table, number(1, 0), number(3, 3), number(-1, 2), 3)\n"
        "assert (window == window[:, :1]).all()\n"
        "print(window[:, 0].tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("[3, 19, 4, 4, 1, -1]"), done.stderr


def test_words_of_a_page_whatever_its_type_and_order() -> None:
    raw = torch.arange(6 * 64, dtype=torch.int8)
    for view in (
        raw.view(torch.bfloat16).view(6, 2, 4, 4),
        raw.view(6, 4, 2, 8).transpose(1, 2),
        raw.view(torch.float32).view(3, 2, 16)[:, 1],
    ):
        words = as_words(view)
        assert words.data_ptr() == view.data_ptr() and words.shape == (view.shape[0], 16)
        assert words.stride(0) * 4 == view.stride(0) * view.element_size()
    with pytest.raises(ValueError, match="words"):
        as_words(raw.view(128, 3))


# Staging.


class Backend:
    forward_includes_kv_cache_update = False
    name = "CPU_ATTN"

    @classmethod
    def get_name(cls) -> str:
        return cls.name


class Step:
    """A step's forward over two layers of random pages, for requests of given new tokens and lengths."""

    TOKENS, HEADS, SIZE = 4, 2, 8

    def __init__(
        self, monkeypatch, requests: list[tuple[int, int]], *, pages: int = 64, backend: type = Backend
    ) -> None:
        source = torch.Generator().manual_seed(3)
        self.pool = torch.randn(2, pages, self.HEADS, self.TOKENS, 2 * self.SIZE, generator=source)
        queries, lengths = zip(*requests, strict=True)
        width = -(-max(lengths) // self.TOKENS) + 2
        table = torch.randperm(pages - 1, generator=source)[: width * len(requests)] + 1
        self.metadata = SimpleNamespace(
            block_table=table.view(len(requests), width).to(torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            query_start_loc=torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32),
            max_query_len=max(queries),
            max_seq_len=max(lengths),
            num_actual_tokens=sum(queries),
            causal=True,
        )
        self.names = ["layers.0", "layers.1"]
        self.layers = {
            name: SimpleNamespace(kv_cache=self.pool[number], attn_backend=backend, impl=SimpleNamespace(forward=None))
            for number, name in enumerate(self.names)
        }
        self.blocks = sum(-(-length // self.TOKENS) for length in lengths)
        context = SimpleNamespace(attn_metadata=dict.fromkeys(self.names, self.metadata), no_compile_layers=self.layers)
        monkeypatch.setattr(inside, "get_forward_context", lambda: context)
        monkeypatch.setattr("swiftcache.vllm.stream.staging.IN_PLACE_TOKENS", 3)

    def windows(self, room: int):
        return lambda pages: [torch.full((room, *pages.shape[1:]), float("nan")) for _ in range(2)]

    def read(self, name: str) -> list[torch.Tensor]:
        """What attention reads of each request, token after token."""
        layer, found = self.layers[name], []
        for row, length in zip(self.metadata.block_table, self.metadata.seq_lens, strict=True):
            pages = layer.kv_cache[row[: -(-int(length) // self.TOKENS)].long()]
            found.append(pages.transpose(1, 2).flatten(0, 1)[: int(length)])
        return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


MIXED = [(1, 30), (9, 9), (6, 23)]
"""New tokens and length: one that decodes, a new prompt, a prompt's second part."""


@pytest.mark.parametrize("ahead", [True, False])
def test_attention_reads_the_same_bytes_in_a_window(monkeypatch, ahead) -> None:
    step = Step(monkeypatch, MIXED)
    staging = Staging(step.names, 64, step.windows(step.blocks))
    staging.begin(step.blocks, ahead)
    for number, name in enumerate(step.names):
        # This step's new KV is written right before the layer reads.
        fresh = [*step.metadata.block_table[1, :3], *step.metadata.block_table[2, 4:6]]
        step.pool[number, torch.stack(fresh).long()] += 1
        home, table = step.layers[name].kv_cache, step.metadata.block_table
        want = step.read(name)
        staging.enter(name)
        assert step.layers[name].kv_cache.data_ptr() != home.data_ptr()
        assert same(step.read(name), want)
        staging.leave()
        assert step.layers[name].kv_cache is home and step.metadata.block_table is table
    assert staging.staged_layers == 2


def test_a_window_that_was_filled_for_another_layer_would_show(monkeypatch) -> None:
    """The twin: nothing is copied for the second layer."""
    step = Step(monkeypatch, MIXED)
    windows = step.windows(step.blocks)(step.pool[0])
    staging = Staging(step.names, 64, lambda pages: [windows[0], windows[0]])
    staging.begin(step.blocks, False)
    staging.enter("layers.0")
    staging.leave()
    want = step.read("layers.1")
    staging._fill = lambda *arguments: None
    staging.enter("layers.1")
    assert not same(step.read("layers.1"), want)


def test_old_blocks_copied_ahead_of_a_load_would_show(monkeypatch) -> None:
    """The twin of `ahead=False`: a load that runs layer by layer writes old blocks of the next layer later."""
    step = Step(monkeypatch, MIXED)
    for ahead in (False, True):
        staging = Staging(step.names, 64, step.windows(step.blocks))
        staging.begin(step.blocks, ahead)
        staging.enter("layers.0")
        staging.leave()
        step.pool[1] += 1
        want = step.read("layers.1")
        staging.enter("layers.1")
        assert same(step.read("layers.1"), want) != ahead
        staging.leave()


@pytest.mark.parametrize(
    ("requests", "blocks", "backend", "said"),
    [
        ([(1, 30), (3, 9)], None, Backend, ""),
        (MIXED, 0, Backend, ""),
        (MIXED, None, type("Own", (Backend,), {"name": "FLASHINFER"}), "FLASHINFER finds its KV"),
        (MIXED, None, type("Writes", (Backend,), {"forward_includes_kv_cache_update": True}), "writes to the KV cache"),
    ],
    ids=["few-new-tokens", "nothing-leased", "other-backend", "writing-backend"],
)
def test_what_is_read_in_place_stays_in_place(monkeypatch, caplog, requests, blocks, backend, said) -> None:
    step = Step(monkeypatch, requests, backend=backend)
    staging = Staging(step.names, 64, step.windows(step.blocks))
    for _ in range(2):
        staging.begin(step.blocks if blocks is None else blocks, True)
        for number, name in enumerate(step.names):
            staging.enter(name)
            assert step.layers[name].kv_cache.data_ptr() == step.pool[number].data_ptr()
            staging.leave()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said) and all(said in line for line in lines), "said once"


def test_a_block_that_a_kernel_cuts_in_two_counts_twice(monkeypatch) -> None:
    step = Step(monkeypatch, MIXED)
    staging = Staging(step.names, 32, step.windows(step.blocks + 1))
    staging.begin(-(-step.blocks // 2), True)
    staging.enter("layers.0")
    assert staging.staged_layers == 1


def test_contexts_longer_than_a_window_are_read_in_place_where_parts_cannot_be_merged(monkeypatch, caplog) -> None:
    step = Step(monkeypatch, MIXED)
    staging = Staging(step.names, 64, step.windows(step.blocks - 1))
    staging.begin(step.blocks, True)
    implementation = step.layers["layers.0"].impl
    staging.enter("layers.0")
    assert step.layers["layers.0"].kv_cache.data_ptr() == step.pool[0].data_ptr()
    assert step.layers["layers.0"].impl is implementation
    assert "CPU_ATTN does not say the log-sum-exp" in caplog.text


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"sinks": torch.ones(1)}, "attention sinks"),
        ({"sliding_window": (7, 0)}, "a sliding window"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "quantised"),
        ({"alibi_slopes": torch.ones(1)}, "alibi"),
        ({}, ""),
    ],
)
def test_what_cannot_be_merged_is_told(changed, named) -> None:
    backend = type("Flash", (Backend,), {"name": "FLASH_ATTN"})
    layer = SimpleNamespace(attn_backend=backend, impl=SimpleNamespace(**changed))
    reason = inside.why_unmerged(layer, SimpleNamespace(causal=True))
    assert named in reason and bool(named) == bool(reason)
    assert "not causal" in inside.why_unmerged(layer, SimpleNamespace(causal=False))


# Parts.


class Reference:
    """Attention in plain PyTorch that says the log-sum-exp of its scores, as FlashAttention's kernel does."""

    def attend(self, query, keys, values, mask) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - torch.where(lse.isinf(), torch.zeros_like(lse), lse)[..., None])
        return torch.einsum("hqk,khd->qhd", weights, values), lse

    def each(self, metadata, one) -> tuple[torch.Tensor, torch.Tensor]:
        starts = metadata.query_start_loc.tolist()
        found = [one(number, first, last) for number, (first, last) in enumerate(pairwise(starts))]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], dim=1)

    def among_new(self, query, key, value, metadata):
        def one(_, first, last):
            mask = torch.ones(last - first, last - first, dtype=torch.bool).tril()
            return self.attend(query[first:last], key[first:last], value[first:last], mask)

        return self.each(metadata, one)

    def over_pages(self, query, pages, metadata, table, lengths, longest):
        assert int(lengths.max()) <= longest

        def one(number, first, last):
            length, size = int(lengths[number]), pages.shape[2]
            found = pages[table[number, : -(-length // size)].long()].transpose(1, 2).flatten(0, 1)[:length]
            assert not found.isnan().any(), "a part of the window that was not filled"
            keys, values = found.split(query.shape[-1], dim=-1)
            return self.attend(query[first:last], keys, values, torch.ones(last - first, length, dtype=torch.bool))

        return self.each(metadata, one)

    def merge(self, one, other):
        lse = torch.logaddexp(one[1], other[1])
        weight = [torch.exp(of[1] - lse).transpose(0, 1)[..., None] for of in (one, other)]
        return one[0] * weight[0] + other[0] * weight[1], lse


def attention(step: Step, name: str, query, key, value) -> torch.Tensor:
    """All at once, over the pool."""
    kernel, contexts = Reference(), step.read(name)

    def one(number, first, last):
        length, new = int(step.metadata.seq_lens[number]), last - first
        keys, values = contexts[number].split(step.SIZE, dim=-1)
        keys, values = keys.clone(), values.clone()
        keys[length - new :], values[length - new :] = key[first:last], value[first:last]
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        return kernel.attend(query[first:last], keys, values, mask)

    return kernel.each(step.metadata, one)[0]


@pytest.mark.parametrize("room", [1, 2, 3, 5, 13])
def test_parts_merge_to_what_one_pass_gives(monkeypatch, room) -> None:
    step = Step(monkeypatch, MIXED)
    tokens = step.metadata.num_actual_tokens
    query, key, value = (torch.randn(tokens + 3, step.HEADS, step.SIZE) for _ in range(3))
    pages = step.pool[0]
    windows = step.windows(room)(pages)
    filled = []

    def fill(window, source, table, span) -> None:
        filled.append(span)
        gather(as_words(window), as_words(source), table, span)

    parts = Parts(windows, Side(torch.device("cpu")), fill, -(-step.blocks // room))
    output = torch.zeros(tokens + 3, step.HEADS, step.SIZE)
    other = SimpleNamespace(scale=0.5)
    segmented = Segmented(other, Reference(), parts)
    assert segmented.scale == 0.5
    segmented.forward(None, query, key, value, pages, step.metadata, output)
    want = attention(step, "layers.0", query[:tokens], key[:tokens], value[:tokens])
    assert torch.allclose(output[:tokens], want, atol=1e-5) and not output[tokens:].any()
    assert len(filled) == -(-step.blocks // room)
    # The twin: a part that is not copied would show.
    parts.fill = lambda *arguments: None
    windows[0].zero_()
    windows[1].zero_()
    segmented.forward(None, query, key, value, pages, step.metadata, output)
    assert not torch.allclose(output[:tokens], want, atol=1e-5)


def test_parts_take_the_place_of_the_layers_attention_for_one_step(monkeypatch) -> None:
    step = Step(monkeypatch, MIXED, backend=type("Flash", (Backend,), {"name": "FLASH_ATTN"}))
    monkeypatch.setattr(inside, "FlashParts", lambda impl: Reference())
    staging = Staging(step.names, 64, step.windows(3))
    staging.begin(step.blocks, True)
    implementation = step.layers["layers.0"].impl
    staging.enter("layers.0")
    layer = step.layers["layers.0"]
    assert isinstance(layer.impl, Segmented) and layer.kv_cache.data_ptr() == step.pool[0].data_ptr()
    tokens = step.metadata.num_actual_tokens
    query, key, value = (torch.randn(tokens, step.HEADS, step.SIZE) for _ in range(3))
    output = torch.zeros(tokens, step.HEADS, step.SIZE)
    layer.impl.forward(layer, query, key, value, layer.kv_cache, step.metadata, output=output)
    assert torch.allclose(output, attention(step, "layers.0", query, key, value), atol=1e-5)
    staging.leave()
    assert layer.impl is implementation


def test_flash_attention_is_called_as_vllm_calls_it_for_contexts_over_ranks(monkeypatch) -> None:
    """The kernel itself needs a GPU: here is what it is given."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.ops import merge_attn_states as merging

    seen: list[dict[str, Any]] = []

    def kernel(**given: Any) -> tuple[Any, Any]:
        seen.append(given)
        return given["q"], torch.zeros(2, len(given["q"]))

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", kernel, raising=False)
    monkeypatch.setattr(merging, "merge_attn_states", lambda out, *rest, output_lse: out.copy_(rest[0] + rest[2]))
    step = Step(monkeypatch, MIXED)
    impl = SimpleNamespace(scale=0.5, logits_soft_cap=0, vllm_flash_attn_version=3, head_size=step.SIZE)
    parts = inside.FlashParts(impl)
    query = torch.ones(step.metadata.num_actual_tokens, step.HEADS, step.SIZE)
    one = parts.among_new(query, query, query, step.metadata)
    lengths = torch.tensor([3, 0, 4])
    other = parts.over_pages(query, step.pool[0], step.metadata, step.metadata.block_table, lengths, 8)
    assert [given["causal"] for given in seen] == [True, False]
    assert all(given["return_softmax_lse"] and given["fa_version"] == 3 for given in seen)
    assert all(given["max_seqlen_q"] == 9 for given in seen)
    assert seen[0]["max_seqlen_k"] == 9 and "block_table" not in seen[0]
    assert seen[1]["seqused_k"] is lengths and seen[1]["max_seqlen_k"] == 8 and "cu_seqlens_k" not in seen[1]
    assert seen[1]["k"].shape == seen[1]["v"].shape == (64, step.TOKENS, step.HEADS, step.SIZE)
    merged, _ = parts.merge(one, other)
    assert (merged == 2).all()


# The scheduler's word.


def scheduler(native, monkeypatch, local: int = 6):
    config = configured()
    side = SwiftCacheConnector(config, KVConnectorRole.SCHEDULER, stage.kv_config(blocks=12))
    pool = BlockPool(12, True, stage.BLOCK)
    manager = SimpleNamespace(block_pool=pool, get_block_ids=lambda request: ([],), evict_blocks=pool.evict_blocks)
    side.bind_kv_cache_manager(manager)
    from swiftcache.vllm.metadata import Handshake

    assert not isinstance(pool.free_block_queue, LocalFirst), "nobody has said yet what is local"
    side.set_xfer_handshake_metadata_pp_aware(
        {(0, 0): Handshake("a", bytes(16), local + 2), (0, 1): Handshake("b", bytes(16), local)}
    )
    assert isinstance(pool.free_block_queue, LocalFirst)
    return side, pool


def test_the_workers_are_told_when_a_step_reads_leased_blocks(native, alone, monkeypatch) -> None:
    side, _ = scheduler(native, monkeypatch)
    near, far = stage.request("near", 9), stage.request("far", 30)
    for request, table in ((near, [1, 2, 3]), (far, [4, 5])):
        side.on_new_request(request)
        side.get_num_new_matched_tokens(request, 0)
        side.update_state_after_alloc(request, stage.allocation(table), 0)
    step = side.build_connector_meta(stage.output({"near": 9, "far": 8}, {"near": [1, 2, 3], "far": [4, 5]}))
    assert step.staged == 0, "both fit into local memory"
    near.num_computed_tokens, far.num_computed_tokens = 9, 8
    step = side.build_connector_meta(stage.output({"near": 1, "far": 8}, {"near": [1, 2, 3], "far": [4, 5, 6, 7]}))
    assert step.staged == 3 + 4, "block 6 is leased on one of the workers"
    far.num_computed_tokens = 16
    step = side.build_connector_meta(stage.output({"near": 1}, {"near": [1, 2, 3]}))
    assert step.staged == 0
    step = side.build_connector_meta(stage.output({"far": 1}, {"far": [4, 5, 6, 7, 8]}))
    assert step.staged == 5
    # Preempted and admitted again, it has other blocks.
    far.num_computed_tokens = 0
    side.get_num_new_matched_tokens(far, 0)
    side.update_state_after_alloc(far, stage.allocation([1, 2]), 0)
    step = side.build_connector_meta(stage.output({"far": 8}, {"far": [1, 2]}))
    assert step.staged == 0


def test_blocks_that_every_worker_has_stored_may_be_evicted_first(native, alone, monkeypatch) -> None:
    from swiftcache.vllm.metadata import WorkerReport

    side, pool = scheduler(native, monkeypatch)
    request = stage.request("a", 16)
    request.session_id = None
    side.on_new_request(request)
    side.get_num_new_matched_tokens(request, 0)
    blocks = pool.get_new_blocks(4)
    pool.cache_full_blocks(request, blocks, 0, 4, stage.BLOCK, 0)
    side.update_state_after_alloc(request, stage.allocation(ids(blocks)), 0)
    first = side.build_connector_meta(stage.output({"a": 8}, {"a": ids(blocks[:2])}))
    request.num_computed_tokens = 8
    second = side.build_connector_meta(stage.output({"a": 8}, {"a": ids(blocks)}))
    numbers = [job.number for step in (first, second) for job in step.stores]
    assert len(numbers) == 2
    pool.free_blocks(blocks)
    assert ids(pool.free_block_queue.get_all_free_blocks())[0] == 5
    # One worker of one is not all of them here: `workers` is TP times PP, which is 1 in this configuration.
    side.update_connector_output(
        stage.answer(kv_connector_worker_meta=WorkerReport(done=dict.fromkeys(numbers, 1), lost={numbers[1]}))
    )
    order = ids(pool.free_block_queue.get_all_free_blocks())
    assert order[:3] == [5, 1, 2] and order[-2:] == [3, 4], "the second store kept less than everything"
