"""The connector's halves with several KV cache groups, against made-up requests: what is found, loaded, kept, and when
another load is promised."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import stage
import torch
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

from swiftcache.engine.events import Events
from swiftcache.engine.fingerprint import Ranks
from swiftcache.engine.keys import Keys
from swiftcache.engine.settings import Settings
from swiftcache.vllm.groups import Group, Groups
from swiftcache.vllm.metadata import Handshake, LoadJob, StepMetadata, StoreJob, WorkerReport
from swiftcache.vllm.room import Room
from swiftcache.vllm.scheduler import ANSWER_SECONDS, SchedulerSide
from swiftcache.vllm.tracked import Tracked
from swiftcache.vllm.worker import WorkerSide

B = stage.BLOCK
WINDOW = 2 * B
"""A request that goes on after n blocks needs the last two of them."""
NAME = "m/tp0of1"
MOST = 4
FULL, TAIL = Group(0), Group(1, "sliding_window", WINDOW, most=MOST)
GROUPS = Groups([FULL, TAIL])
TABLES = ([11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26])


def key(request, group: Group, block: int) -> bytes:
    return Keys().of([request.block_hashes[block]], GROUPS.salt(group))


def keys(request, group: Group, blocks) -> bytes:
    return b"".join(key(request, group, block) for block in blocks)


class Stand:
    def __init__(self, native, groups: Groups = GROUPS, events: bool = False) -> None:
        self.native, self.tables, self.free, self.now = native, {}, 1000, 0.0
        self.side = SchedulerSide(
            Settings(),
            native.Connection("", name="test"),
            block_tokens=B,
            hashes_per_block=1,
            sync=False,
            recovers=True,
            workers=1,
            events=Events(events),
            groups=groups,
            clock=lambda: self.now,
        )
        self.side.meet([Handshake(NAME, bytes(16))])
        pool = SimpleNamespace(get_num_free_blocks=lambda: self.free)
        self.side.bind(SimpleNamespace(get_block_ids=lambda name: self.tables[name], block_pool=pool))

    def publish(self, request, group: Group, blocks) -> None:
        for block in blocks:
            self.native.published.setdefault(NAME, {})[key(request, group, block)] = []

    def publish_prefix(self, request, end: int) -> None:
        self.publish(request, FULL, range(end))
        self.publish(request, TAIL, range(end - 2, end))

    def admit(self, request, external: int = 0, computed: int = 0, tables=TABLES) -> None:
        self.side.on_new_request(request)
        assert self.side.matched_tokens(request, computed)[0] == external
        self.tables[request.request_id] = tables
        self.side.allocated(request, stage.allocation(*tables), external)

    def step(self, *scheduled: tuple) -> StepMetadata:
        """Requests of a step, with how many tokens each has computed after it."""
        counts, tables = {}, {}
        for request, tokens in scheduled:
            counts[request.request_id] = tokens - request.num_computed_tokens
            tables[request.request_id] = self.tables[request.request_id]
        step = self.side.metadata(stage.output(counts, tables))
        for request, tokens in scheduled:
            request.num_computed_tokens = tokens
        return step

    def report(self, **fields) -> None:
        received = fields.pop("received", None)
        report = WorkerReport(**fields)
        self.side.worker_output(stage.answer(kv_connector_worker_meta=report, finished_recving=received))


@pytest.fixture
def stand(native):
    return Stand(native)


def kept(step: StepMetadata) -> dict[bytes, int]:
    """What a step stores, by key."""
    found = {}
    for job in step.stores:
        assert len(job.keys) == 16 * len(job.blocks)
        found |= {job.keys[16 * at : 16 * at + 16]: block for at, block in enumerate(job.blocks)}
    return found


def test_what_a_window_reaches() -> None:
    assert [TAIL.first(end, B) for end in range(6)] == [0, 0, 0, 1, 2, 3]
    assert Group(1, window=WINDOW + 1).first(4, B) == 2 and Group(1, window=WINDOW + 2).first(4, B) == 1
    assert Group(1, window=WINDOW, extra=1).first(4, B) == 2
    assert FULL.first(4, B) == 0


def test_the_window_is_that_of_vllm() -> None:
    """vLLM has blocks exactly where this says that a request needs them."""
    for window in range(1, 30):
        group, manager = Group(1, window=window), SimpleNamespace(sliding_window=window, extra_retained_tokens=0)
        contiguous = SlidingWindowManager._contiguous_blocks_for_hit(window, B, False)
        for end in range(1, 9):
            skipped = SlidingWindowManager.get_num_skipped_tokens(manager, end * B)
            assert group.first(end, B) == skipped // B
            assert end - group.first(end, B) == min(contiguous, end)


def test_a_hit_needs_the_tail_of_every_group(stand) -> None:
    request = stage.request("a", 17)
    stand.publish_prefix(request, 4)
    assert stand.side.matched_tokens(request, 0) == (16, True)
    assert [call[2] for call in stand.native.calls] == [4, 2], "two questions, whatever the length"
    del stand.native.published[NAME][key(request, TAIL, 2)]
    assert stand.side.matched_tokens(stage.request("b", 17), 0) == (0, False)


def test_of_what_is_computed_here_nothing_is_asked(stand) -> None:
    request = stage.request("a", 17)
    stand.publish(request, FULL, [3])
    stand.publish(request, TAIL, [3])
    assert stand.side.matched_tokens(request, 12) == (4, True)


def test_every_full_attention_group_has_to_have_a_block(native) -> None:
    stand = Stand(native, Groups([FULL, TAIL, Group(2)]))
    request = stage.request("a", 17)
    stand.publish_prefix(request, 4)
    stand.publish(request, Group(2), range(3))
    stand.publish(request, TAIL, [1])
    assert stand.side.matched_tokens(request, 0) == (12, True)


def test_blocks_of_equal_hash_have_a_key_for_each_group(stand) -> None:
    request = stage.request("a", 17)
    stand.publish(request, FULL, range(4))
    of_one = Keys().of(request.block_hashes[:4])
    assert len({key(request, FULL, 0), key(request, TAIL, 0), of_one[:16]}) == 3


def test_a_load_is_of_the_blocks_that_vllm_has(stand) -> None:
    request = stage.request("a", 17)
    stand.publish_prefix(request, 4)
    stand.admit(request, 16, tables=([11, 12, 13, 14], [0, 0, 23, 24]))
    (job,) = stand.step().loads
    assert job.blocks == [11, 12, 13, 23, 14, 24] and not job.sync
    want = [(FULL, 0), (FULL, 1), (FULL, 2), (TAIL, 2), (FULL, 3), (TAIL, 3)]
    assert job.keys == b"".join(key(request, group, block) for group, block in want)


def test_a_prompt_is_kept_with_the_tail_at_its_end(stand) -> None:
    request = stage.request("a", 19)
    stand.admit(request)
    first = stand.step((request, 12))
    assert kept(first) == {key(request, FULL, block): TABLES[0][block] for block in range(3)}
    last = stand.step((request, 19))
    assert kept(last) == {key(request, FULL, 3): 14, key(request, TAIL, 2): 23, key(request, TAIL, 3): 24}


def test_a_prompt_of_whole_blocks_has_two_ends(stand) -> None:
    """The same prompt again leaves its last block to compute."""
    request = stage.request("a", 16)
    stand.admit(request)
    tails = {key(request, TAIL, block): TABLES[1][block] for block in (1, 2, 3)}
    assert kept(stand.step((request, 16))).items() >= tails.items()


def test_where_a_tail_was_missing_it_is_kept_when_somebody_comes_there(stand) -> None:
    request = stage.request("a", 23)
    stand.publish(request, FULL, range(3))
    stand.admit(request)
    assert kept(stand.step((request, 12))).items() >= {key(request, TAIL, 1): 22, key(request, TAIL, 2): 23}.items()


def test_what_vllm_found_itself_gets_its_tail(stand) -> None:
    request = stage.request("a", 23)
    request.num_computed_tokens = 12
    stand.admit(request, computed=12, tables=([11, 12, 13, 14, 15, 16], [0, 22, 23, 24, 25, 26]))
    assert kept(stand.step((request, 16))).items() >= {key(request, TAIL, 1): 22, key(request, TAIL, 2): 23}.items()


def test_an_answer_is_kept_at_its_end_with_its_tail(stand) -> None:
    request = stage.request("a", 9)
    stand.admit(request)
    stand.step((request, 9))
    stage.grow(request, 12)
    assert stand.step((request, 20)).stores == [], "a prefix without its tail could not be used"
    moved = (TABLES[0], [0, 0, 23, 24, 25])
    assert stand.side.request_finished(request, moved)
    want = {key(request, FULL, block): TABLES[0][block] for block in (2, 3, 4)}
    want |= {key(request, TAIL, block): TABLES[1][block] for block in (3, 4)}
    assert kept(stand.step()) == want


def test_an_answer_whose_tail_is_gone_is_not_kept(stand) -> None:
    """Otherwise it would be found, with nothing to go on from, where the end of the prompt could be gone on from."""
    request = stage.request("a", 9)
    stand.admit(request)
    stand.step((request, 9))
    stage.grow(request, 12)
    stand.step((request, 20))
    stand.side.request_finished(request, (TABLES[0], [0, 0, 0, 0, 25]))
    assert stand.step().stores == []


def test_stores_of_blocks_that_the_window_has_left_are_waited_for(stand) -> None:
    request = stage.request("a", 17)
    stand.admit(request)
    tail = next(job for job in stand.step((request, 17)).stores if job.blocks == [23, 24])
    stage.grow(request, 4)
    assert stand.step((request, 18)).fence == [], "they are all there"
    stand.tables["a"] = (TABLES[0], [0, 0, 0, 24, 25])
    assert stand.step((request, 21)).fence == [tail.number]


def test_a_store_that_is_over_is_not_waited_for(stand) -> None:
    request = stage.request("a", 17)
    stand.admit(request)
    stand.report(done={job.number: 1 for job in stand.step((request, 17)).stores})
    stand.tables["a"] = (TABLES[0], [0, 0, 0, 24, 25])
    assert stand.step((request, 18)).fence == []


def test_the_window_of_a_request_that_ends_may_move_on_too(stand) -> None:
    request = stage.request("a", 17)
    stand.admit(request)
    tail = next(job for job in stand.step((request, 17)).stores if job.blocks == [23, 24])
    stand.tables["a"] = (TABLES[0], [0, 0, 0, 24, 25])
    stand.side.request_finished(request, stand.tables["a"])
    assert stand.step().fence == [tail.number]


def test_events_name_the_group(native) -> None:
    stand = Stand(native, events=True)
    request = stage.request("a", 17)
    stand.admit(request)
    stand.report(done={job.number: 1 for job in stand.step((request, 17)).stores})
    found = {
        (event.group_idx, event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window)
        for event in stand.side.take_events()
    }
    assert found == {(0, "full_attention", None), (1, "sliding_window", WINDOW)}


# Loads that fail.


def loading(stand, *names: str) -> list:
    requests = [stage.request(name, 17, start=100 * number) for number, name in enumerate(names)]
    for request in requests:
        stand.publish_prefix(request, 4)
        stand.admit(request, 16)
    stand.step()
    return requests


def test_a_load_is_promised_if_there_is_room_for_all_who_wait_with_one(stand) -> None:
    first, late = stage.request("a", 17), stage.request("b", 17, start=900)
    stand.publish_prefix(first, 4)
    stand.publish_prefix(late, 4)
    stand.free = 0
    stand.admit(first, 16)  # alone: vLLM waits until there is room for it
    # Each takes 4 blocks, and 2 of its window; a whole request is 6 blocks of full attention, and MOST of a window.
    stand.free = (2 + 2) + (4 + 2) + (2 + 2) - 1
    assert stand.side.matched_tokens(late, 0) == (None, False)
    stand.free += 1
    assert stand.side.matched_tokens(late, 0) == (16, True)


def test_a_failed_load_needs_the_window_from_the_beginning(native) -> None:
    """Where a window takes long to fill, what a request needs from nothing is more than what it needs from its tail."""
    wide = Group(1, "sliding_window", 4 * B, most=8)
    room = Room(Groups([FULL, wide]), B)
    one, other = (Tracked(stage.request(name, 7 * B - 1)) for name in "ab")
    one.promised = 6
    # Full attention: 8 - 6. The window: 8 from nothing, less the 4 of the tail.
    need = (2 + 4) + (6 + 4) + (2 + 4)
    assert not room.allows(other, 6, [one, other], need - 1)
    assert room.allows(other, 6, [one, other], need)


def test_who_waits_for_room_is_next(stand) -> None:
    loading(stand, "a")
    late, small = stage.request("late", 17, start=900), stage.request("small", 9, start=800)
    stand.publish_prefix(late, 4)
    stand.publish_prefix(small, 2)
    stand.free = 3
    assert stand.side.matched_tokens(late, 0) == (None, False)
    stand.free = 1000
    assert stand.side.matched_tokens(small, 0) == (None, False), "late is first"
    assert stand.side.matched_tokens(stage.request("cold", 17, start=700), 0) == (0, False)
    assert stand.side.matched_tokens(late, 0) == (16, True)
    assert stand.side.matched_tokens(small, 0) == (8, True)


@pytest.mark.parametrize("how", ["aborted", "gone"])
def test_who_waits_for_room_and_wants_it_no_more_is_not_waited_for(stand, how) -> None:
    loading(stand, "a")
    late, small = stage.request("late", 17, start=900), stage.request("small", 9, start=800)
    stand.publish_prefix(late, 4)
    stand.publish_prefix(small, 2)
    stand.free = 3
    assert stand.side.matched_tokens(late, 0) == (None, False)
    stand.free = 1000
    if how == "aborted":
        stand.side.request_finished(late, ())
    else:
        stand.native.published.clear()
        stand.publish_prefix(small, 2)
        stand.now += 2 * ANSWER_SECONDS
        assert stand.side.matched_tokens(late, 0) == (0, False)
    assert stand.side.matched_tokens(small, 0) == (8, True)


def test_a_request_that_is_scheduled_waits_no_more(stand) -> None:
    (request,) = loading(stand, "a")
    late = stage.request("late", 17, start=900)
    stand.publish_prefix(late, 4)
    stand.free = 0
    stand.report(received={"a"})
    assert stand.side.matched_tokens(late, 0) == (None, False)
    stand.step((request, 17))
    assert stand.side.matched_tokens(late, 0) == (16, True)


def test_a_failed_request_does_not_try_again(stand) -> None:
    (request,) = loading(stand, "a")
    stand.report(failed={"a": 0}, received={"a"})
    assert stand.side.matched_tokens(request, 0) == (0, False)


# A worker.


@pytest.fixture
def worker(native):
    kv = stage.hybrid()
    kv.kv_cache_tensors = []
    side = WorkerSide(
        stage.config(),
        Settings(),
        kv,
        block_tokens=B,
        sync=False,
        publish_outcome=False,
        ranks=Ranks(),
        clock=lambda: 0.0,
    )
    pages = stage.caches(layers=2)
    # The layers of the second group lie over those of the first.
    first, second = pages.values()
    side.register(pages | {"model.layers.2.self_attn.attn": first, "model.layers.3.self_attn.attn": second})
    side.pages = pages
    return side


def test_layers_that_lie_over_each_other_are_copied_once(worker) -> None:
    assert len(worker._cache.layer_bytes) == 2


def run(worker, step: StepMetadata) -> SimpleNamespace:
    worker.before_overwriting(step)
    worker.bind(step)
    worker.start_loads()
    worker.start_stores()
    _, received, failed = worker.finished()
    invalid, report = worker.invalid_blocks(), worker.report()
    worker.bind(None)
    return SimpleNamespace(received=received, failed=failed, invalid=invalid, report=report)


def test_a_worker_names_requests_and_not_blocks(worker, native) -> None:
    run(worker, StepMetadata(stores=[StoreJob(0, "w", bytes(16) + bytes([1]) * 16, [1, 2])]))
    want = {name: cache[1:2].clone() for name, cache in worker.pages.items()}
    native.lose.append(1)
    loads = [LoadJob("a", 0, bytes(16) + bytes([1]) * 16, [5, 6], False), LoadJob("b", 0, bytes(16), [7], False)]
    done = run(worker, StepMetadata(loads=loads))
    assert (done.received, done.failed, done.invalid) == ({"a", "b"}, {"a"}, set())
    assert done.report.failed == {"a": 0}
    for name, cache in worker.pages.items():
        assert torch.equal(cache[7:8], want[name])
    assert run(worker, StepMetadata()).failed == set()


def test_a_load_that_could_not_start_is_a_failed_one(worker, monkeypatch) -> None:
    monkeypatch.setattr(worker, "_cache", None)
    done = run(worker, StepMetadata(loads=[LoadJob("a", 0, bytes(16), [5], False)]))
    assert (done.received, done.failed, done.invalid) == ({"a"}, {"a"}, set())


def test_the_namespace_tells_groupings_apart(native) -> None:
    def name(kv) -> str:
        side = WorkerSide(
            stage.config(), Settings(), kv, block_tokens=B, sync=False, publish_outcome=False, ranks=Ranks()
        )
        side.register(stage.caches(layers=4))
        return side.namespace

    one = stage.kv_config(layers=4)
    assert len({name(one), name(stage.hybrid()), name(stage.hybrid(stage.window(sliding_window=3 * B)))}) == 3
