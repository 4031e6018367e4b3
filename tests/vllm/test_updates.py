"""Weights and adapters that change in a running engine: what is not ordered, not carried out, and not found then."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import stage
from test_scheduler import Stand
from test_worker import load, made, run, store

from swiftcache.engine.fingerprint import Ranks, adapter, namespace
from swiftcache.engine.quiet import Quiet
from swiftcache.vllm import updates
from swiftcache.vllm.doubt import Doubt
from swiftcache.vllm.metadata import Adapter, StepMetadata, WorkerReport
from swiftcache.vllm.tracked import Tracked


@pytest.fixture
def worker(native):
    return made(stage.caches())


@pytest.fixture
def stand(native):
    return Stand(native, sync=False)


def updated(stand, times: int) -> None:
    report = WorkerReport(weights={(0, 0): times})
    stand.side.worker_output(stage.answer(kv_connector_worker_meta=report))


# The worker.


@pytest.mark.parametrize("sync", [True, False])
def test_what_was_ordered_before_an_update_was_known_is_not_done(native, sync) -> None:
    worker = made(stage.caches(), sync=sync)
    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    worker.weights_changed()
    done = run(worker, StepMetadata(loads=[load([4, 5], sync=sync)], stores=[store(1, [3])]), before=sync)
    again = run(worker, StepMetadata()) if not sync else done
    assert done.invalid | again.invalid == {4, 5}
    assert done.report.weights == {(0, 0): 1} and 1 in done.report.lost
    # What is ordered with that in mind is done.
    done = run(worker, StepMetadata(stores=[store(2, [3])], weights={(0, 0): 1}))
    assert done.report is None or 2 not in done.report.lost
    assert len(worker._cache.blocks) == 2


def test_a_load_that_was_under_way_has_failed(native) -> None:
    worker = made(stage.caches(), sync=False)
    run(worker, StepMetadata(stores=[store(0, [1, 2])]))
    native.hold_loads = True
    assert run(worker, StepMetadata(loads=[load([4, 5], sync=False)]), before=False).received == set()
    worker.weights_changed()
    worker._receiving["a"][1].held = False
    done = run(worker, StepMetadata(weights={(0, 0): 1}))
    assert done.received == {"a"} and done.invalid == {4, 5} and not worker._tainted


def test_ranks_count_for_themselves(native) -> None:
    worker = made(stage.caches(), ranks=Ranks(1, 2, 0, 1))
    worker.weights_changed()
    report = run(worker, StepMetadata(weights={(0, 0): 1})).report
    both = report.aggregate(WorkerReport(weights={(0, 0): 3}))
    assert both.weights == {(0, 1): 1, (0, 0): 3}


ONE, OTHER = Adapter(7, b"one" * 5), Adapter(7, b"other" * 3)


@pytest.mark.parametrize(("loaded", "kept"), [(ONE.files, True), (OTHER.files, False), (b"", False), (None, False)])
def test_blocks_of_an_adapter_are_kept_if_it_was_loaded_from_the_files_that_are_named(worker, loaded, kept) -> None:
    if loaded is not None:
        worker.adapter_loaded(7, loaded)
    job = store(0, [1])
    job.adapter = ONE
    report = run(worker, StepMetadata(stores=[job])).report
    assert (len(worker._cache.blocks) == 1) == kept
    assert kept or 0 in report.lost


def test_blocks_of_an_adapter_may_be_loaded_before_it_is(worker) -> None:
    run(worker, StepMetadata(stores=[store(0, [1])]))
    job = load([4])
    job.adapter = ONE
    assert run(worker, StepMetadata(loads=[job])).invalid == set()
    worker.adapter_loaded(7, OTHER.files)
    assert run(worker, StepMetadata(loads=[job])).invalid == {4}


# The scheduler.


def test_after_an_update_nothing_from_before_is_found_or_kept(stand) -> None:
    first = stage.request("a", 17)
    stand.publish(first, 4)
    assert stand.side.matched_tokens(first, 0) == (16, True)
    assert stand.side.metadata(stage.output({}, {})).weights == {}
    stand.admit(first, 0, [1, 2, 3, 4, 5])
    updated(stand, 2)
    assert stand.side.metadata(stage.output({}, {})).weights == {(0, 0): 2}
    assert stand.step(first, 17, [1, 2, 3, 4, 5]).stores == [], "it has begun with the old ones"
    assert stand.side.matched_tokens(stage.request("b", 17), 0) == (0, False)


def test_what_a_request_leaves_to_store_when_it_ends_is_not_stored_by_its_old_name(stand) -> None:
    """vLLM ends requests of a step before it hears what else the workers say of that step."""
    request = stage.request("a", 17)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2, 3, 4, 5])
    stand.step(request, 4, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 17
    stand.side.request_finished(request, ([1, 2, 3, 4, 5],))
    updated(stand, 1)
    assert stand.side.metadata(stage.output({}, {})).stores == []
    # The twin.
    request = stage.request("b", 17, start=100)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2, 3, 4, 5])
    stand.step(request, 4, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 17
    stand.side.request_finished(request, ([1, 2, 3, 4, 5],))
    assert len(stand.side.metadata(stage.output({}, {})).stores) == 1


class Manager:
    """Of vLLM's KV cache manager, what forgets."""

    def __init__(self) -> None:
        self.evicted: list[set[int]] = []
        self.tables: dict[str, list[int]] = {"a": [1, 2]}
        self.block_pool = SimpleNamespace(blocks=range(8))

    def get_block_ids(self, name: str) -> tuple[list[int]]:
        return (self.tables.setdefault(name, [100 + len(self.tables)]),)

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted.append(set(blocks))


def test_vllms_own_cache_forgets_what_it_has_and_what_old_requests_add(stand) -> None:
    manager = Manager()
    stand.side._doubt.bind(manager)
    request = stage.request("a", 17)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, [1, 2])
    stand.step(request, 4, [1, 2])
    updated(stand, 1)
    assert manager.evicted == [set(range(8))]
    stand.step(request, 4, [1, 2])
    assert manager.evicted[-1] == {1, 2}


def test_what_is_forgotten_stays_forgotten(stand) -> None:
    """A step takes no longer because of it. What a request registers later is forgotten, too."""
    manager = Manager()
    stand.side._doubt.bind(manager)
    table = manager.tables["a"] = [1, 2, 3, 4, 5, 6]
    request = stage.request("a", 17)
    stand.side.matched_tokens(request, 0)
    stand.admit(request, 0, table)
    stand.step(request, 16, table)
    request.num_computed_tokens = 16
    updated(stand, 1)
    manager.evicted.clear()
    forgotten = []
    for _ in range(8):
        stand.step(request, 1, table)
        forgotten.append(manager.evicted.pop() if manager.evicted else set())
        request.num_computed_tokens += 1
        stage.grow(request, 1)
    # vLLM registers the fifth block in the fourth of these steps, when its last token is known, or in the fifth. The
    # sixth block's last token is known in the last step.
    assert forgotten == [set(table), set(), set(), {5, 6}, {5, 6}, set(), set(), {6}]


def test_windows_that_have_moved_on_spoil_nobody(native) -> None:
    """What they have left is the same placeholder for all requests."""
    doubt = Doubt(recovers=True, block_tokens=stage.BLOCK, quiet=Quiet(), group=1)
    tables = {"old": ([0, 0, 5], [1, 2, 3]), "new": ([0, 0, 8], [6, 7, 9]), "under": ([0, 0, 8], [1, 7, 9])}
    manager = Manager()
    manager.get_block_ids = tables.__getitem__
    doubt.bind(manager)
    old, new, under = (Tracked(stage.request(name, 13)) for name in tables)
    doubt.distrust([old])
    for one in (new, under):
        doubt.admitted(one)
    doubt.contain([old, new, under], ["old", "new", "under"])
    assert (old.spoiled, new.spoiled, under.spoiled) == (0, None, 0)
    assert manager.evicted[-1] == {1, 2, 3, 7, 9}


def write(path, weights: str, config: str = "{}") -> None:
    path.mkdir(exist_ok=True)
    (path / "adapter_model.safetensors").write_text(weights)
    (path / "adapter_config.json").write_text(config)


def test_an_adapter_is_told_by_its_files(tmp_path) -> None:
    path = tmp_path / "adapter"
    assert adapter(str(path)) == b"" == adapter("no/such-adapter")
    write(path, "one")
    first = adapter(str(path))
    assert len(first) == 16 and first == adapter(str(path))
    os.utime(path / "adapter_model.safetensors", (1, 1))
    second = adapter(str(path))
    (path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert len({first, second, adapter(str(path))}) == 3
    (path / "adapter_config.json").unlink()
    assert adapter(str(path)) == b""


def test_adapters_of_one_path_in_turn_have_names_of_their_own(stand, tmp_path) -> None:
    manager, path = Manager(), tmp_path / "adapter"
    stand.side._doubt.bind(manager)

    def request(name: str, number: int, **more) -> SimpleNamespace:
        made = stage.request(name, 17)
        fields = {"lora_int_id": number, "lora_name": "x", "lora_path": str(path), "load_inplace": False}
        made.lora_request = SimpleNamespace(**(fields | more))
        stand.side.on_new_request(made)
        stand.side.matched_tokens(made, 0)
        stand.admit(made, 0, [1, 2, 3, 4, 5])
        return made

    def stored(of: SimpleNamespace):
        return [(job.keys, job.adapter) for job in stand.step(of, 17, [1, 2, 3, 4, 5]).stores]

    # Before there are any files nobody knows what it will be.
    assert stored(request("none", 1)) == []
    write(path, "one")
    ((first, known),) = stored(request("first", 1))
    assert known == Adapter(1, adapter(str(path)))
    ((plain, nothing),) = stored(stage_plain(stand))
    assert nothing is None and plain != first
    assert manager.evicted == []
    os.utime(path / "adapter_model.safetensors", (1, 1))
    ((same, _),) = stored(request("same", 1))
    assert same == first, "the engine still has the first one"
    old = request("old", 1)
    ((second, _),) = stored(request("second", 2))
    assert second != first
    assert manager.evicted[0] == set(range(8)), "vLLM takes it for the first one"
    assert stored(old) == []
    assert stored(request("at any time", 3, load_inplace=True)) == []


def stage_plain(stand) -> SimpleNamespace:
    made = stage.request("plain", 17)
    stand.side.matched_tokens(made, 0)
    stand.admit(made, 0, [1, 2, 3, 4, 5])
    return made


# What is wrapped.


class Listener:
    def __init__(self) -> None:
        self.heard: list[object] = []

    def weights_changed(self) -> None:
        self.heard.append("weights")

    def adapter_loaded(self, number: int, files: bytes) -> None:
        self.heard.append((number, files))

    def sleeps(self) -> None:
        self.heard.append("sleeps")

    def wakes(self) -> None:
        self.heard.append("wakes")


@pytest.fixture
def listener(monkeypatch):
    one = Listener()
    monkeypatch.setattr(updates, "_listeners", {one})
    return one


def test_an_update_that_fails_counts_too(listener) -> None:
    assert updates._update(lambda: 1)() == 1
    with pytest.raises(ZeroDivisionError):
        updates._update(lambda: 1 / 0)()
    assert listener.heard == ["weights", "weights"]


def test_files_that_change_while_they_are_loaded_are_no_adapter_of_a_name(listener, tmp_path) -> None:
    path = tmp_path / "adapter"
    request = SimpleNamespace(lora_int_id=5, lora_path=str(path))

    def fetch(_, __) -> str:
        write(path, "fetched")
        return "adapter"

    assert updates._load_adapter(fetch)(None, request) == "adapter"
    updates._load_adapter(lambda _, __: None)(None, request)

    def change(_, __) -> None:
        os.utime(path / "adapter_model.safetensors", (1, 1))

    updates._load_adapter(change)(None, request)
    known = listener.heard[0][1]
    assert len(known) == 16
    assert listener.heard == [(5, known), (5, known), (5, b"")]


def test_a_pool_is_let_go_before_it_sleeps_and_taken_up_when_it_is_back(listener) -> None:
    said = listener.heard
    updates._sleep(lambda _, level: said.append(level))(None, 1)
    for tags in (["weights"], ["kv_cache"], None):
        updates._wake_up(lambda _, tags: said.append(tags))(None, tags)
    assert said == ["sleeps", 1, ["weights"], ["kv_cache"], "wakes", None, "wakes"]


def test_a_sleeping_engine_copies_nothing(worker) -> None:
    run(worker, StepMetadata(stores=[store(0, [1])]))
    cache = worker._cache
    worker.sleeps()
    assert cache.closed and run(worker, StepMetadata(loads=[load([4])], stores=[store(1, [2])])).invalid == {4}
    worker.wakes()
    assert run(worker, StepMetadata(loads=[load([4])])).invalid == set()
    worker.close()
    worker.wakes()
    assert worker._cache is None, "an engine that has ended does not wake"


def test_engines_whose_hashes_have_other_seeds_are_told_apart_by_that() -> None:
    names = [namespace({"a": 1}, Ranks(), seed) for seed in (None, "", "42", "0", "x/y", "9" * 40)]
    assert len(set(names)) == 6
    digest, seed, *ranks = names[2].split("/")
    assert seed == "seed-42" and names[1] == "/".join([digest, "seed-none", *ranks])
    assert all(name.count("/") == 3 for name in names[1:]), "a seed is one part"
