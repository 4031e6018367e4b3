"""The one place where SGLang's code is wrapped: whoever watches is told of every attempt to update weights."""

from __future__ import annotations

import contextlib
import gc

import pytest
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Updater

from swiftcache.sglang import weights


class Listener:
    def __init__(self) -> None:
        self.told = 0

    def weights_changed(self) -> None:
        self.told += 1


class Manager:
    """Of SGLang's manager, what the updates use."""

    metrics_collector = None


def test_every_attempt_is_told_and_nothing_is_wrapped_twice() -> None:
    listener = Listener()
    assert weights.watch(listener)
    wrapped = Updater._observe_weight_load
    assert weights.watch(listener) and Updater._observe_weight_load is wrapped
    with Updater._observe_weight_load(Manager(), "disk"):
        assert listener.told == 0
    assert listener.told == 1
    with contextlib.suppress(RuntimeError), Updater._observe_weight_load(Manager(), "tensor"):
        raise RuntimeError("half of them are new")
    assert listener.told == 2


def test_who_is_gone_is_not_kept() -> None:
    listener = Listener()
    weights.watch(listener)
    del listener
    gc.collect()
    assert len(weights._listeners) == 0 or all(isinstance(one, Listener) for one in weights._listeners)


def test_an_sglang_that_does_not_say_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Updater, "_observe_weight_load")
    assert not weights.watch(Listener())
