"""`swiftcache.engine` has what the adapters of all engines use, and imports no engine."""

from __future__ import annotations

import logging
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from swiftcache import engine
from swiftcache.engine import quiet
from swiftcache.engine.events import CLEARED, MEDIUM_HBM, MEDIUM_HOST, Change, Events
from swiftcache.engine.fingerprint import Ranks, namespace, weight_files
from swiftcache.engine.keys import KEY_BYTES, Keys
from swiftcache.engine.metrics import Meter, Tally
from swiftcache.engine.quiet import PERIOD_SECONDS, Quiet

MODULES = [module.name for module in pkgutil.iter_modules(engine.__path__, "swiftcache.engine.")]
IMPORT = """
import importlib, sys

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {"vllm", "sglang", "torch"} or name.startswith("swiftcache.vllm"):
            raise AssertionError(f"imports {name}")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def imported(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPORT, *names]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_module_of_it_imports_an_engine() -> None:
    assert len(MODULES) >= 9
    run = imported(*MODULES)
    assert run.returncode == 0, run.stderr
    # The twin: an adapter imports an engine, and this check notices it.
    assert "imports swiftcache.vllm" in imported("swiftcache.vllm").stderr


def test_keys_are_the_same_for_all_until_a_reset() -> None:
    hashes = [bytes([number]) * 32 for number in range(3)]
    one, other = Keys(), Keys()
    assert one.of(hashes) == other.of(hashes) and len(one.of(hashes)) == 3 * KEY_BYTES
    before = one.of(hashes)
    one.reset()
    assert len(one.of(hashes)) == 3 * KEY_BYTES and one.of(hashes) == one.of(hashes)
    parts = [one.of([of]) for of in hashes]
    assert b"".join(parts) == one.of(hashes) and not set(parts) & {other.of([of]) for of in hashes}
    one.reset()
    assert one.of(hashes) not in (before, b"".join(parts))


def test_a_salt_tells_blocks_of_equal_hash_apart_before_and_after_a_reset() -> None:
    hashes = [bytes([number]) * 32 for number in range(3)]
    keys = Keys()
    salts = (b"", b"\0\0", b"\0\1")
    before = [keys.of(hashes, salt) for salt in salts]
    assert before == [Keys().of(hashes, salt) for salt in salts]
    keys.reset()
    after = [keys.of(hashes, salt) for salt in salts]
    assert len({*before, *after}) == 6 and {len(of) for of in after} == {3 * KEY_BYTES}


def test_trouble_is_logged_once_a_period(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    trouble = Quiet(lambda: now[0])
    with caplog.at_level(logging.WARNING, logger=quiet.logger.name):
        for _ in range(5):
            trouble.trouble("kind", "what")
        trouble.trouble("other", "what")
        now[0] = PERIOD_SECONDS + 1
        trouble.trouble("kind", "what")
    assert len(caplog.messages) == 3 and "4 more" in caplog.messages[2]


def test_trouble_in_an_attempt_is_none_and_a_line(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Quiet()
    assert trouble.attempt("division", divmod, 7, 2) == (3, 1)
    assert trouble.attempt("division", divmod, 7, 0) is None
    assert len(caplog.messages) == 1 and "division" in caplog.messages[0]


def test_weights_are_told_by_their_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    first = weight_files(str(tmp_path), None)
    os.utime(weights, (1, 1))
    assert weight_files(str(tmp_path), None) != first
    assert weight_files("no/such-model", None) == []
    blob = tmp_path / "blobs" / "c0ffee"
    blob.parent.mkdir()
    blob.write_bytes(b"one")
    weights.unlink()
    weights.symlink_to(blob)
    assert weight_files(str(tmp_path), None) == [("model.safetensors", "c0ffee")]


def test_a_namespace_tells_facts_and_ranks_apart() -> None:
    facts = {"engine": "one", "pages": (1, 2)}
    names = {namespace(facts, Ranks()), namespace(facts | {"engine": "two"}, Ranks()), namespace(facts, Ranks(1, 2))}
    assert len(names) == 3 and all(len(name.encode()) <= 256 for name in names)
    assert namespace(dict(reversed(facts.items())), Ranks()) in names


class Index:
    """What is said of the named blocks when it is taken."""

    def __init__(self, namespaces: list[str]) -> None:
        self.namespaces, self.named, self.told, self.news, self.closed = namespaces, [], set(), [], False

    def name(self, hashes: bytes) -> None:
        self.named += [hashes[at : at + KEY_BYTES] for at in range(0, len(hashes), KEY_BYTES)]

    def say(self, *news: tuple[bytes, bool, bool]) -> None:
        self.news += news

    def take(self) -> list[tuple[bytes, bool, bool]]:
        news, self.news = self.news, []
        self.told |= {key for key, _, found in news if found}
        return news

    def forget(self, hashes: bytes) -> list[tuple[bytes, bool, bool]]:
        keys = [hashes[at : at + KEY_BYTES] for at in range(0, len(hashes), KEY_BYTES)]
        self.named = [key for key in self.named if key not in keys]
        return [(key, False, False) for key in keys if key in self.told]

    def close(self) -> None:
        self.closed = True


KEYS = [bytes([number]) * KEY_BYTES for number in range(6)]


def test_events_say_of_offered_blocks_what_the_index_says() -> None:
    events, indexes = Events(True), []
    events.offered(KEYS[0] + KEYS[1], lambda number: f"block {number}")
    assert events.take() == []

    def watch(namespaces) -> Index:
        indexes.append(Index(namespaces))
        return indexes[-1]

    # Ranks may share a namespace, and may say again who they are.
    events.follow(["one", "two", "one"], watch)
    events.follow(["one", "two"], watch)
    (index,) = indexes
    assert (index.namespaces, index.named) == (("one", "two"), KEYS[:2])
    events.offered(KEYS[1] + KEYS[2], lambda number: f"later {number}")
    assert index.named == KEYS[:3], "each is named once"
    index.say((KEYS[1], False, True), (KEYS[2], True, True), (KEYS[5], True, True), (KEYS[1], False, False))
    assert events.take() == [
        Change("block 1", MEDIUM_HBM, True),
        Change("later 1", MEDIUM_HOST, True),
        Change("block 1", MEDIUM_HBM, False),
    ]
    events.reset()
    index.say((KEYS[2], True, False))
    assert events.take() == [CLEARED] and index.named == [], "what was offered before a reset is no news after it"
    events.close()
    assert index.closed


def test_events_know_so_many_blocks_and_take_back_the_oldest() -> None:
    events, index = Events(True, most=2), Index([])
    events.follow(["one"], lambda namespaces: index)
    events.offered(KEYS[0] + KEYS[1], lambda number: number)
    index.say((KEYS[0], False, True))
    assert events.take() == [Change(0, MEDIUM_HBM, True)]
    events.offered(KEYS[2], lambda number: 2)
    assert events.take() == [Change(0, MEDIUM_HBM, False)]
    events.offered(KEYS[3], lambda number: 3)
    assert events.take() == [] and index.named == KEYS[2:4], "nobody was told of the next one"


def test_events_cost_nothing_where_nobody_listens() -> None:
    silent = Events(False)
    silent.follow(["one"], lambda namespaces: pytest.fail("nobody listens"))
    silent.offered(KEYS[0], lambda number: pytest.fail("nobody listens"))
    silent.reset()
    assert silent.take() == []


def test_a_meter_counts_what_was_added_and_starts_again_with_a_new_cache() -> None:
    meter, tally = Meter("0.0"), Tally()
    for total, added in ((3.0, 3), (4.0, 1), (4.0, 0), (1.0, 1)):
        tally.reset()
        meter.read({"stored_blocks": total, "loaded_nvlink_bytes": 2 * total, "leases": 2.0}, tally)
        assert tally.data["counters"].get("stored_blocks", 0) == added
        assert tally.data["counters"].get("loaded_bytes", 0) == 2 * added
        assert tally.gauges()["leases"] == 2
