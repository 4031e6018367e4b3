"""A pin on what the linker builds on: SGLang's abstract methods, and the code that calls them.

It fails when any of that is other code than was read when this was written. Read the difference, change the linker if
it has to be, and write the pin anew with SWIFTCACHE_WRITE_BASELINE=1.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from pathlib import Path

import pytest
import sglang
from sglang.srt.arg_groups import model_override_base
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache import registry, utils
from sglang.srt.mem_cache.memory_pool import KVCache, MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache import linker_factory, unified_cache_linker
from sglang.srt.mem_cache.unified_cache.components.full import FullComponent
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from swiftcache.sglang import SwiftCacheLinker

PIN = Path(__file__).with_name("interface.json")

CALLERS = {
    # The contract itself, and the tree's side of it.
    "the linker": unified_cache_linker.UnifiedCacheLinker,
    "the layer counter": unified_cache_linker.LayerWiseLoadCounter,
    "the wrapper": unified_cache_linker.UnifiedCacheLinkerWrapper,
    "how it is made": linker_factory.create_unified_cache_linker,
    "how it is attached": registry.create_unified_radix_cache,
    "pages as they are given": FullComponent.build_external_linker_transfer,
    "pages of a load that is refused": FullComponent.update_external_linker_load,
    # When it is called.
    "load back": UnifiedRadixCache.init_load_back,
    "the end of a batch's loads": UnifiedRadixCache.finish_external_linker_loads,
    "every step": UnifiedRadixCache.check_hicache_events,
    "the start of a batch's loads": UnifiedRadixCache.ready_to_load_host_cache,
    "ranks that agree": UnifiedRadixCache._all_reduce_attn_groups,
    "reset": UnifiedRadixCache.reset,
    # Events are the tree's alone: a linker could add to them if this asked it.
    "KV events": UnifiedRadixCache.take_events,
    "a flush": Scheduler.flush_cache,
    # Requests that wait for a disk are matched before their turn, as SGLang does, and left out of a batch.
    "how a batch is formed": Scheduler._get_new_batch_prefill_raw,
    "how a prefix is matched": Req.init_next_round_input,
    "matched before its turn": Scheduler._prefetch_kvcache,
    "the batch that is waited for": TpModelWorker.set_hicache_consumer,
    # Who waits for a layer, and what a page is.
    "the counter of a pool": KVCache.register_layer_transfer_counter,
    "reads of K": MHATokenToKVPool.get_key_buffer,
    "reads of V": MHATokenToKVPool.get_value_buffer,
    "reads of both": MHATokenToKVPool.get_kv_buffer,
    "reads of MLA's": MLATokenToKVPool.get_key_buffer,
    "reads of MLA's values": MLATokenToKVPool.get_value_buffer,
    "K and V in memory": MHATokenToKVPool._create_buffers_normal,
    "MLA's KV in memory": MLATokenToKVPool._create_buffers,
    "names of pages": utils.get_storage_hash_str,
    "the seed of names": utils.storage_namespace_seed,
    # What the engine was told.
    "arguments as they are resolved": model_override_base.resolving_view,
    "the model's configuration": model_override_base.model_config_of,
    # Weight updates.
    "weights are loaded": SchedulerWeightUpdaterManager._observe_weight_load,
    "weights from a disk": SchedulerWeightUpdaterManager.update_weights_from_disk,
    "weights from tensors": SchedulerWeightUpdaterManager.update_weights_from_tensor,
    "weights from others": SchedulerWeightUpdaterManager.update_weights_from_distributed,
    "weights by IPC": SchedulerWeightUpdaterManager.update_weights_from_ipc,
}


def digest(code: object) -> str:
    # What `swiftcache.sglang.weights` has wrapped is not SGLang's.
    return hashlib.sha256(inspect.getsource(inspect.unwrap(code)).encode()).hexdigest()[:16]


def now() -> dict[str, object]:
    return {
        "sglang": sglang.__version__,
        "methods": {
            name: str(inspect.signature(getattr(unified_cache_linker.UnifiedCacheLinker, name)))
            for name in sorted(unified_cache_linker.UnifiedCacheLinker.__abstractmethods__)
        },
        "code": {name: digest(code) for name, code in CALLERS.items()},
    }


def differences(pinned: dict[str, object], found: dict[str, object]) -> list[str]:
    said = []
    for part in ("methods", "code"):
        for name in sorted({*pinned[part], *found[part]}):
            if pinned[part].get(name) != found[part].get(name):
                said.append(f"{part}: {name}: was {pinned[part].get(name)}, is {found[part].get(name)}")
    return said


def test_sglang_is_what_the_linker_was_written_for() -> None:
    found = now()
    if os.environ.get("SWIFTCACHE_WRITE_BASELINE"):
        PIN.write_text(json.dumps(found, indent=1) + "\n")
    pinned = json.loads(PIN.read_text())
    assert differences(pinned, found) == [], f"read the difference from SGLang {pinned['sglang']}: {__doc__}"


@pytest.mark.parametrize("part", ["methods", "code"])
def test_the_twin_a_change_is_seen(part: str) -> None:
    pinned, found = now(), now()
    name = next(iter(found[part]))
    found[part][name] = "something else"
    assert differences(pinned, found) == [f"{part}: {name}: was {pinned[part][name]}, is something else"]
    found = now()
    found[part]["more"] = "something new"
    assert len(differences(pinned, found)) == 1


def test_every_method_is_there_with_sglangs_arguments() -> None:
    assert not inspect.isabstract(SwiftCacheLinker)
    for name in unified_cache_linker.UnifiedCacheLinker.__abstractmethods__:
        theirs = inspect.signature(getattr(unified_cache_linker.UnifiedCacheLinker, name)).parameters
        ours = inspect.signature(getattr(SwiftCacheLinker, name)).parameters
        assert list(ours) == list(theirs), name
