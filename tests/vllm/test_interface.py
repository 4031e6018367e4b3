"""A pin on what the connector builds on: vLLM's hooks, and the functions that SwiftCache wraps.

It fails when the installed vLLM is none that is known, or has other hooks than that version had. Read the difference,
change the connector if it has to be, and write the pin anew with SWIFTCACHE_WRITE_BASELINE=1. docs/vllm.md says what is
run of each version.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import textwrap
from pathlib import Path

import pytest
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.worker.gpu_worker import Worker

from swiftcache.vllm import SwiftCacheConnector, updates

PIN = Path(__file__).with_name("interface.json")

Hooks = dict[str, str]


def signature(method: ast.FunctionDef) -> str:
    kind = "".join(f"@{ast.unparse(one)} " for one in method.decorator_list)
    returned = f" -> {ast.unparse(method.returns)}" if method.returns else ""
    return f"{kind}({ast.unparse(method.args)}){returned}"


def hooks(source: str, owner: str) -> Hooks:
    """Names and signatures of a class's methods, as they are written: a version's Python is enough."""
    found = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == owner)
    return {node.name: signature(node) for node in found.body if isinstance(node, ast.FunctionDef)}


def wrapped() -> Hooks:
    calls = [(Worker, name) for name in (*updates.CALLS, "sleep", "wake_up")] + [(WorkerLoRAManager, "_load_adapter")]
    found = {}
    for owner, name in calls:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(owner, name))))
        found[f"{owner.__name__}.{name}"] = signature(ast.parse(source).body[0])
    return found


def now() -> dict[str, Hooks]:
    source = inspect.getsource(base)
    every = {name: hooks(source, name) for name in ("KVConnectorBase_V1", "SupportsHMA")}
    return every | {"wrapped": wrapped()}


def differences(pinned: dict[str, Hooks], found: dict[str, Hooks]) -> list[str]:
    said = []
    for owner in sorted({*pinned, *found}):
        before, after = pinned.get(owner, {}), found.get(owner, {})
        names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        said += [f"{owner}.{name}: was {before.get(name)}, is {after.get(name)}" for name in names]
    return said


def test_this_vllm_has_the_hooks_that_the_connector_was_written_for() -> None:
    found, pinned = now(), json.loads(PIN.read_text())
    if os.environ.get("SWIFTCACHE_WRITE_BASELINE"):
        pinned[vllm.__version__] = found
        PIN.write_text(json.dumps(pinned, indent=1, sort_keys=True) + "\n")
    assert vllm.__version__ in pinned, f"of vLLM {vllm.__version__} no hooks are known: {__doc__}"
    assert differences(pinned[vllm.__version__], found) == [], __doc__


def test_the_twin_a_change_is_seen() -> None:
    changed = now()
    changed["KVConnectorBase_V1"]["get_finished"] = "(self)"
    changed["wrapped"]["Worker.more"] = "(self)"
    said = differences(now(), changed)
    assert len(said) == 2 and "get_finished" in said[0] and "Worker.more: was None" in said[1]


def test_what_a_later_version_adds_is_there_or_left_out_on_purpose() -> None:
    pinned = json.loads(PIN.read_text())
    known = {name for version in pinned.values() for name in version["KVConnectorBase_V1"]}
    ours = {name for name in vars(SwiftCacheConnector) if not name.startswith("_")}
    assert {"supports_sleep_mode", "unregister_kv_caches", "restore_kv_caches"} <= ours & known
    own = {"worker", "scheduler"}
    assert ours - known - own == {"request_finished_all_groups"}, "a hook that no known vLLM calls"


@pytest.mark.parametrize("name", sorted(hooks(inspect.getsource(base), "KVConnectorBase_V1")))
def test_a_hook_takes_what_vllm_gives_it(name: str) -> None:
    if name not in vars(SwiftCacheConnector) or isinstance(vars(SwiftCacheConnector)[name], property):
        return
    theirs = inspect.signature(getattr(base.KVConnectorBase_V1, name)).parameters
    ours = inspect.signature(getattr(SwiftCacheConnector, name)).parameters
    if name != "__init__":
        assert list(ours) == list(theirs), name
