"""The connector's halves with several KV cache groups, against made-up requests: what is found, loaded, kept, and when
another load is promised."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import stage
import torch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.core.sched import output
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    MambaManager,
    SlidingWindowManager,
)

from swiftcache.engine.events import Events
from swiftcache.engine.fingerprint import Ranks
from swiftcache.engine.keys import Keys
from swiftcache.engine.settings import Settings
from swiftcache.vllm import ends, junction
from swiftcache.vllm.ends import QUESTIONS
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
    def __init__(self, native, groups: Groups = GROUPS, events: bool = False, workers: int = 1, unit: int = B) -> None:
        self.native, self.tables, self.free, self.now = native, {}, 1000, 0.0
        self.groups = groups
        self.side = SchedulerSide(
            Settings(),
            native.Connection("", name="test"),
            block_tokens=unit,
            hashes_per_block=unit // B,
            sync=False,
            recovers=True,
            workers=workers,
            events=Events(events),
            groups=groups,
            clock=lambda: self.now,
        )
        self.side.meet([Handshake(NAME, bytes(16))])
        self.pinned: list[int] = []
        pool = SimpleNamespace(
            get_num_free_blocks=lambda: self.free,
            blocks=range(100),
            touch=self.pinned.extend,
            free_blocks=lambda blocks: [self.pinned.remove(block) for block in blocks],
        )
        self.side.bind(SimpleNamespace(get_block_ids=lambda name: self.tables[name], block_pool=pool))

    def publish(self, request, group: Group, blocks) -> None:
        for block in blocks:
            self.native.published.setdefault(NAME, {})[key(request, group, block)] = []

    def publish_stored(self, step: StepMetadata) -> None:
        for one in kept(step):
            self.native.published.setdefault(NAME, {})[one] = []

    def publish_prefix(self, request, end: int) -> None:
        self.publish(request, FULL, range(end))
        self.publish(request, TAIL, range(end - 2, end))

    def admit(self, request, external: int = 0, computed: int = 0, tables=TABLES) -> None:
        self.side.on_new_request(request)
        assert self.side.matched_tokens(request, computed)[0] == external
        self.tables[request.request_id] = tables
        self.side.allocated(request, stage.allocation(*tables), external)

    def step(self, *scheduled: tuple, **more) -> StepMetadata:
        """Requests of a step, with how many tokens each has computed after it."""
        counts, tables = {}, {}
        for request, tokens in scheduled:
            counts[request.request_id] = tokens - request.num_computed_tokens
            tables[request.request_id] = self.tables[request.request_id]
        step = self.side.metadata(stage.output(counts, tables, **more))
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


def test_the_chunk_is_that_of_vllm() -> None:
    """vLLM has blocks exactly where this says that a request needs them, and finds a prefix by these alone."""
    for chunk in (B, 2 * B, 3 * B, 5 * B):
        group, manager = Group(1, chunk=chunk), SimpleNamespace(attention_chunk_size=chunk)
        for end in range(1, 12):
            assert group.first(end, B) == ChunkedLocalAttentionManager.get_num_skipped_tokens(manager, end * B) // B
            asked = []

            def cached(name, groups, asked=asked):
                asked.append(name)
                return [SimpleNamespace(block_id=7)]

            pool = SimpleNamespace(hash_block_size=B, null_block=None, get_cached_block=cached)
            spec = stage.chunks(attention_chunk_size=chunk)
            ChunkedLocalAttentionManager.find_longest_cache_hit(range(20), end * B, [1], pool, spec, False, B)
            assert asked == list(range(group.first(end, B), end))


def test_where_a_chunk_ends_a_prefix_needs_no_tail(native) -> None:
    """The next token's chunk is empty."""
    stand = Stand(native, Groups([FULL, Group(1, "chunked_local_attention", most=MOST, chunk=2 * B)]))
    request = stage.request("a", 4 * B + 1)
    stand.publish(request, FULL, range(4))
    assert stand.side.matched_tokens(request, 0) == (4 * B, True)
    other = stage.request("b", 5 * B + 1)
    stand.publish(other, FULL, range(5))
    assert stand.side.matched_tokens(other, 0) == (0, False), "here it is one block"
    stand.publish(other, Group(1), [4])
    again = stage.request("c", 5 * B + 1)
    stand.admit(again, 5 * B, tables=([11, 12, 13, 14, 15], [0, 0, 0, 0, 25]))
    (job,) = stand.step().loads
    assert job.blocks == [11, 12, 13, 14, 15, 25]


def test_a_chunk_is_kept_at_the_ends_of_a_prompt(native) -> None:
    stand = Stand(native, Groups([FULL, Group(1, "chunked_local_attention", most=MOST, chunk=2 * B)]))
    request = stage.request("a", 6 * B)
    stand.admit(request)
    step = stand.step((request, 6 * B))
    assert sorted(job.blocks for job in step.stores) == [[11, 12, 13, 14, 15, 16], [25]], "5 blocks end within a chunk"


def test_a_hit_needs_the_tail_of_every_group(stand) -> None:
    request = stage.request("a", 17)
    stand.publish_prefix(request, 4)
    assert stand.side.matched_tokens(request, 0) == (16, True)
    assert [call[2] for call in stand.native.calls] == [4, 2], "two questions, whatever the length"
    del stand.native.published[NAME][key(request, TAIL, 2)]
    assert stand.side.matched_tokens(stage.request("b", 17), 0) == (0, False)


def test_an_earlier_tail_is_found_where_the_end_has_none(stand) -> None:
    """A prompt is kept. The end of what full attention has of it is evicted: its tail cannot be used any more."""
    request = stage.request("a", 17)
    stand.admit(request)
    stand.step((request, 9))
    request.shared_prefix_boundary = 0
    first = stage.request("first", 9)
    stand.admit(first)
    stand.step((first, 9))
    stand.publish(request, FULL, range(3))
    stand.publish(request, TAIL, [0, 1])
    again = stage.request("b", 17)
    assert stand.side.matched_tokens(again, 0) == (8, True)
    stand.admit(stage.request("c", 17), 8)
    late = stand.side._tracked["c"]
    assert 3 in late.ends, "the next one finds a tail at the end"


def test_an_earlier_tail_that_is_gone_is_asked_for_once(stand) -> None:
    first = stage.request("first", 9)
    stand.admit(first)
    stand.step((first, 9))
    request = stage.request("a", 17)
    stand.publish(request, FULL, range(3))
    for asked in (3, 2):
        stand.native.calls.clear()
        stand.now += 2 * ANSWER_SECONDS
        assert stand.side.matched_tokens(request, 0) == (0, False)
        assert len(stand.native.calls) == asked


def test_a_lookup_asks_for_few_earlier_tails(stand) -> None:
    long = stage.request("long", 81)
    for end in range(1, 20):
        stand.side._finder.has_tail(long, end)
    stand.publish(long, FULL, range(20))
    assert stand.side.matched_tokens(long, 0) == (0, False)
    assert len(stand.native.calls) == 2 + QUESTIONS


def test_after_a_reset_no_earlier_tail_is_found(stand) -> None:
    request = stage.request("a", 17)
    stand.side._finder.has_tail(request, 2)
    assert list(stand.side._finder._ends._known)
    stand.side.reset()
    assert not stand.side._finder._ends._known


def test_the_oldest_ends_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(ends, "ENDS", 2)
    known = ends.Ends()
    for name in (b"a", b"b", b"a", b"c"):
        known.add(name)
    assert list(known.before(iter([(3, b"c"), (2, b"b"), (1, b"a")]))) == [3, 1]


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
    stand.side.request_finished(request, moved)
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
    stand.publish_stored(stand.step((request, 17)))
    found = {
        (event.group_idx, event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window)
        for event in stand.side.take_events()
    }
    assert found == {(0, "full_attention", None), (1, "sliding_window", WINDOW)}


# State.

STATE = Group(1, "mamba", most=4, state=True)
STATES = Groups([FULL, STATE])


@pytest.fixture
def stateful(native):
    return Stand(native, STATES, workers=2)


def publish_state(stand, request, end: int) -> None:
    stand.publish(request, FULL, range(end))
    stand.publish(request, STATE, [end - 1])


def test_the_state_is_where_vllm_looks_for_it() -> None:
    """vLLM's own finder and its table of a request with a prefix that is loaded: the last block, and no other."""
    spec = stage.state()
    for end in range(1, 6):
        asked = []

        def cached(name, groups, asked=asked, last=end - 1):
            asked.append(name)
            return [SimpleNamespace(block_id=7)] if name == last else None

        pool = SimpleNamespace(hash_block_size=B, null_block=None, get_cached_block=cached)
        (blocks,), tokens = MambaManager.find_longest_cache_hit(range(8), 8 * B, [1], pool, spec, False, B)
        assert (len(blocks), tokens, asked[-1]) == (end, end * B, STATE.first(end, B))
        skipped = MambaManager.get_num_skipped_tokens(SimpleNamespace(), end * B)
        assert skipped // B == STATE.first(end, B)


def test_a_hit_needs_the_state_at_its_end(stateful) -> None:
    request = stage.request("a", 17)
    publish_state(stateful, request, 4)
    assert stateful.side.matched_tokens(request, 0) == (16, True)
    assert request.shared_prefix_boundary == 0
    del stateful.native.published[NAME][key(request, STATE, 3)]
    stateful.publish(request, STATE, range(3))
    again = stage.request("b", 17)
    assert stateful.side.matched_tokens(again, 0) == (0, False)
    assert again.shared_prefix_boundary == 16, "vLLM is to keep one there"


def test_what_vllm_found_of_a_junction_itself_stays(stateful) -> None:
    request = stage.request("a", 17)
    stateful.publish(request, FULL, range(2))
    request.shared_prefix_boundary = 12
    stateful.side.matched_tokens(request, 0)
    assert request.shared_prefix_boundary == 12


def test_a_state_is_loaded_into_the_block_that_vllm_has(stateful) -> None:
    request = stage.request("a", 17)
    publish_state(stateful, request, 4)
    stateful.admit(request, 16, tables=([11, 12, 13, 14], [0, 0, 0, 24]))
    (job,) = stateful.step().loads
    assert job.blocks == [11, 12, 13, 14, 24]
    assert job.keys == keys(request, FULL, range(4)) + key(request, STATE, 3)


def test_a_state_is_kept_when_vllm_offers_it_and_pinned_until_all_workers_are_through(stateful) -> None:
    request = stage.request("a", 19)
    stateful.admit(request)
    step = stateful.step((request, 16), states={"a": [(1, 57, 16)]})
    assert kept(step) == {key(request, FULL, block): TABLES[0][block] for block in range(4)} | {
        key(request, STATE, 3): 57
    }, "not the block in the table"
    assert stateful.pinned == [57]
    (number,) = [job.number for job in step.stores if job.blocks == [57]]
    stateful.report(done={number: 1})
    assert stateful.pinned == [57] and stateful.side.frees_pending()
    stateful.report(done={number: 1})
    assert stateful.pinned == [] and not stateful.side.frees_pending()


def test_a_pin_outlives_its_request(stateful) -> None:
    request = stage.request("a", 19)
    stateful.admit(request)
    step = stateful.step((request, 16), states={"a": [(1, 57, 16)]})
    again = stateful.side.metadata(stage.output({}, {}, preempted=("a",)))
    numbers = {job.number: job.blocks for job in step.stores}
    assert [numbers[number] for number in again.fence] == [TABLES[0][:4]], "pinned blocks need not be waited for"
    stateful.side._drop("a")
    assert stateful.pinned == [57]
    stateful.report(done=dict.fromkeys(numbers, 2))
    assert stateful.pinned == []


@pytest.mark.parametrize(
    "offers",
    [
        [(1, 57, 14)],  # within a block: for those who find prefixes of parts of one
        [(1, 57, 20)],  # not computed after this step
        [],
    ],
)
def test_what_is_no_state_at_an_end_is_not_kept(stateful, offers) -> None:
    request = stage.request("a", 23)
    stateful.admit(request)
    assert key(request, STATE, 3) not in kept(stateful.step((request, 16), states={"a": offers}))
    assert stateful.pinned == []


def test_a_state_that_was_loaded_is_not_kept_again(stateful) -> None:
    request = stage.request("a", 23)
    publish_state(stateful, request, 4)
    stateful.admit(request, 16)
    stateful.step()
    assert kept(stateful.step((request, 20), states={"a": [(1, 57, 16), (1, 58, 20)]})) == {
        key(request, FULL, 4): 15,
        key(request, STATE, 4): 58,
    }


def test_states_of_every_group_are_kept_or_of_none(native) -> None:
    stand = Stand(native, Groups([FULL, STATE, Group(2, "mamba", most=4, state=True)]))
    request = stage.request("a", 19)
    stand.admit(request, tables=(*TABLES, TABLES[1]))
    assert all(job.blocks != [57] for job in stand.step((request, 12), states={"a": [(1, 57, 12)]}).stores)
    step = stand.step((request, 16), states={"a": [(1, 58, 16), (2, 68, 16)]})
    assert sorted(job.blocks for job in step.stores if len(job.blocks) == 1)[-2:] == [[58], [68]]


def test_full_attention_is_not_kept_beyond_the_last_state(stateful) -> None:
    """A prompt of whole blocks has its state a block before its end; what is decoded has none at all."""
    request = stage.request("a", 16)
    stateful.admit(request)
    stateful.step((request, 12), states={"a": [(1, 57, 12)]})
    stage.grow(request, 8)
    assert stateful.step((request, 16)).stores == [] and stateful.step((request, 24)).stores == []
    stateful.side.request_finished(request, TABLES)
    assert stateful.step().stores == []


def test_where_a_state_was_missing_it_is_kept_when_somebody_comes_there(stateful) -> None:
    request = stage.request("a", 23)
    stateful.publish(request, FULL, range(3))
    stateful.admit(request)
    assert request.shared_prefix_boundary == 12
    step = stateful.step((request, 12), states={"a": [(1, 57, 12)]})
    assert kept(step)[key(request, STATE, 2)] == 57
    late = stage.request("b", 23)
    stateful.publish(request, STATE, [2])
    assert stateful.side.matched_tokens(late, 0) == (12, True)


def test_windows_and_states_together(native) -> None:
    stand = Stand(native, Groups([FULL, TAIL, Group(2, "mamba", most=4, state=True)]))
    request = stage.request("a", 19)
    stand.admit(request, tables=(*TABLES, [0] * 6))
    step = stand.step((request, 16), states={"a": [(2, 57, 16)]})
    assert sorted(job.blocks for job in step.stores) == [[11, 12, 13, 14], [23, 24], [57]]


def test_events_of_states_name_their_kind(native) -> None:
    stand = Stand(native, STATES, events=True)
    request = stage.request("a", 19)
    stand.admit(request)
    stand.publish_stored(stand.step((request, 16), states={"a": [(1, 57, 16)]}))
    (event,) = [event for event in stand.side.take_events() if event.group_idx == 1]
    assert (event.kv_cache_spec_kind, event.block_hashes) == (
        "mamba",
        [maybe_convert_block_hash(request.block_hashes[3])],
    )


def test_room_counts_states(native) -> None:
    """One is loaded, and a request has several at a time."""
    room = Room(STATES, B)
    one, other = (Tracked(stage.request(name, 7 * B - 1)) for name in "ab")
    one.promised = 6
    need = (2 + 3) + (6 + 1) + (2 + 3)
    assert not room.allows(other, 6, [one, other], need - 1)
    assert room.allows(other, 6, [one, other], need)


def test_this_vllm_keeps_states_where_it_is_told_to() -> None:
    junction.check()


@pytest.mark.parametrize("number", range(len(junction.READERS)))
def test_a_vllm_that_keeps_states_otherwise_is_refused_by_name(monkeypatch, number) -> None:
    owner, method, name = junction.READERS[number]
    monkeypatch.setattr(owner, method, lambda *arguments: None)
    with pytest.raises(ValueError, match=rf"{name} in {owner.__name__}.{method}"):
        junction.check()


def test_a_vllm_that_offers_no_states_is_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr(output, "KVConnectorBlockState", dataclasses.make_dataclass("State", ["req_ids"]))
    with pytest.raises(ValueError, match="boundary_state_offloads of KVConnectorBlockState"):
        junction.check()


# Blocks of different sizes.


def test_groups_with_blocks_of_different_sizes(native) -> None:
    """A unit is a block of full attention and two of the window."""
    half = Group(1, "sliding_window", WINDOW, most=MOST, per_unit=2)
    stand = Stand(native, Groups([FULL, half]), unit=2 * B)
    tables = ([11, 12, 13], [21, 22, 23, 24, 25, 26])
    request = stage.request("a", 5 * B + 1)
    stand.admit(request, tables=tables)
    step = stand.step((request, 5 * B + 1))
    hashes = request.block_hashes
    of = {0: [hashes[1], hashes[3]], 1: [hashes[2], hashes[3]]}
    want = [Keys().of(of[group.number], stand.groups.salt(group)) for group in stand.groups.all]
    stored = {job.keys: job.blocks for job in step.stores}
    assert stored == {want[0]: [11, 12], want[1]: [23, 24]}
    for joined in want:
        for at in range(0, len(joined), 16):
            stand.native.published.setdefault(NAME, {})[joined[at : at + 16]] = []
    again = stage.request("b", 5 * B + 1)
    stand.admit(again, 4 * B, tables=([31, 32], [0, 0, 43, 44]))
    (job,) = stand.step().loads
    assert job.blocks == [31, 32, 43, 44]
    assert job.keys == want[0] + want[1]


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
    received, failed = worker.finished()
    invalid, report = worker.invalid_blocks(), worker.report()
    worker.bind(None)
    return SimpleNamespace(received=received, failed=failed, invalid=invalid, report=report)


def test_states_over_attention_are_one_run(native) -> None:
    """A state is shorter than the page that it lies over."""
    kv = stage.hybrid(stage.state())
    side = WorkerSide(stage.config(), Settings(), kv, block_tokens=B, sync=False, publish_outcome=False, ranks=Ranks())
    pages = stage.caches(layers=2)
    raw = next(iter(pages.values())).view(torch.int8)
    blocks, page = len(raw), raw[0].numel()
    storage = torch.tensor([], dtype=torch.int8).set_(raw.untyped_storage())
    states = {
        f"model.layers.{2 + layer}.mamba": storage.as_strided((blocks, page - 40), (page, 1), layer * blocks * page)
        for layer in range(2)
    }
    side.register(pages | states)
    assert side._cache.layer_bytes == [page, page]
    assert side._layout.by_layer["model.layers.3.mamba"] == side._layout.by_layer["model.layers.1.self_attn.attn"]


def test_a_page_that_layers_share_is_marked_by_the_last_one(worker, monkeypatch) -> None:
    """Layers with a state do not say when they are computed."""
    monkeypatch.setattr(worker, "_cuda", True)
    monkeypatch.setattr(worker, "_mark", object)
    monkeypatch.setattr("swiftcache.vllm.worker.MARKED_BYTES", 0)
    names = [name for layer in range(4) for name in worker._layout.by_layer if f".{layer}." in name]
    worker.bind(StepMetadata(stores=[StoreJob(0, "w", bytes(16), [1])]))
    for name in names[:2]:
        worker.layer_computed(name)
    assert worker._marks == {}
    worker.layer_computed(names[3])
    assert list(worker._marks) == list(worker._layout.by_layer[names[3]])


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
