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
from swiftcache.engine.events import Events
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


def test_events_are_there_when_blocks_are_kept_and_only_if_somebody_listens() -> None:
    events = Events(True)
    for number in range(3):
        events.offered(number, lambda number=number: f"stored {number}")
    events.kept(1)
    events.gone(2)
    events.kept(2)
    events.removed(lambda: "removed")
    assert events.take() == ["stored 1", "removed"] and events.take() == []
    silent = Events(False)
    silent.offered(0, lambda: pytest.fail("nobody listens"))
    silent.kept(0)
    silent.removed(lambda: pytest.fail("nobody listens"))
    assert silent.take() == []


def test_a_meter_counts_what_was_added_and_starts_again_with_a_new_cache() -> None:
    meter, tally = Meter("0.0"), Tally()
    for total, added in ((3.0, 3), (4.0, 1), (4.0, 0), (1.0, 1)):
        tally.reset()
        meter.read({"stored_blocks": total, "loaded_nvlink_bytes": 2 * total, "leases": 2.0}, tally)
        assert tally.data["counters"].get("stored_blocks", 0) == added
        assert tally.data["counters"].get("loaded_bytes", 0) == 2 * added
        assert tally.gauges()["leases"] == 2
