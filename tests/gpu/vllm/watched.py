"""Connectors whose engine notes what it does for each request, for `bench --methods`. vLLM imports this module where it
schedules, and times its own methods from then on.

A note is a line: what, the request, when it began and how long it took in seconds, of the clock that all processes of a
machine share, and parts of that by name. Notes are written when the engine has nothing to do. They are made by two
threads: prompts are hashed beside what is scheduled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from meter import Meter
from methods import FILE
from nothing import NothingConnector
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from swiftcache.vllm import SwiftCacheConnector

METER = Meter()
"""Of the hooks of both halves."""
PARTS = {
    "schedule": {
        "lookup": "get_num_new_matched_tokens",
        "load begins": "update_state_after_alloc",
        "metadata": "build_connector_meta",
    },
    "forward": {
        "loads start": "start_load_kv",
        "layers wait": "wait_for_layer_load",
        "stores start": "wait_for_save",
    },
}
"""Which hooks are told apart in what they are part of."""

_notes: list[dict[str, Any]] = []
_forwards: list[tuple[dict[str, Any], Any, Any]] = []
"""With the events of the engine's stream before and after."""


class WatchedNothing(NothingConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        METER.around(self)


class WatchedSwiftCache(SwiftCacheConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        METER.around(self)


def _request(name: str) -> str:
    """vLLM makes the names that it is given unique."""
    return name.partition("-")[0]


def _noted(
    what: str, call: Callable[[], Any], requests: Callable[[Any], list[str]]
) -> tuple[Any, list[dict[str, Any]]]:
    """What the call returns, and what was noted of it."""
    before = {part: METER.by_hook.get(hook, 0.0) for part, hook in PARTS.get(what, {}).items()}
    began = time.perf_counter()
    result = call()
    took = time.perf_counter() - began
    parts = {part: METER.by_hook.get(PARTS[what][part], 0.0) - was for part, was in before.items()}
    notes = [
        {"what": what, "request": _request(name), "began": began, "took": took, "parts": parts}
        for name in requests(result)
    ]
    _notes.extend(notes)
    return result, notes


def _new(output: Any) -> list[str]:
    """The requests that compute first tokens in a step."""
    return [request.req_id for request in output.scheduled_new_reqs]


def _write() -> None:
    for note, before, after in _forwards:
        note["gpu"] = before.elapsed_time(after) / 1e3
    _forwards.clear()
    # More may come from the other thread meanwhile.
    notes = _notes[:]
    del _notes[: len(notes)]
    if notes:
        with open(os.environ[FILE], "a") as file:
            file.writelines(json.dumps(note) + "\n" for note in notes)


def _watch() -> None:
    hashed, schedule = EngineCoreProc.preprocess_add_request, Scheduler.schedule
    step = EngineCoreProc._process_engine_step

    def preprocess_add_request(self: Any, request: Any) -> Any:
        return _noted("hashed", lambda: hashed(self, request), lambda _: [request.request_id])[0]

    def scheduled(self: Any, *arguments: Any, **named: Any) -> Any:
        return _noted("schedule", lambda: schedule(self, *arguments, **named), _new)[0]

    def process_engine_step(self: Any) -> Any:
        result = step(self)
        if not result and not self.scheduler.has_unfinished_requests():
            _write()
        return result

    EngineCoreProc.preprocess_add_request = preprocess_add_request
    EngineCoreProc._process_engine_step = process_engine_step
    Scheduler.schedule = scheduled
    # Workers that are processes of their own compute behind what is seen here.
    for executor in (UniProcExecutor, MultiprocExecutor):
        executor.execute_model = _watched_forward(executor.execute_model)


def _event() -> torch.cuda.Event | None:
    """The present end of the engine's stream, where it has one."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _watched_forward(execute: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, output: Any, *arguments: Any, **named: Any) -> Any:
        new = _new(output)
        if not new:
            return execute(self, output, *arguments, **named)
        before = _event()
        result, notes = _noted("forward", lambda: execute(self, output, *arguments, **named), lambda _: new)
        after = _event()
        if before is not None:
            _forwards.extend((note, before, after) for note in notes)
        return result

    return execute_model


_watch()
