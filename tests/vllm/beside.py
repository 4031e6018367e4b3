"""Another connector, beside SwiftCache in vLLM's MultiConnector: keeps blocks in the engine process's memory, and does
with its loads what a test orders. One process and one rank only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)


@dataclass
class Orders:
    keeps: bool = True
    """Keep what is computed."""
    offers: int = 0
    """How many blocks of a request to load at most."""
    waits: bool = False
    """Load asynchronously, and only when `waits` is over."""
    loses: int | None = None
    """From which block of a load on garbage is loaded, and reported as lost."""


orders = Orders()
kept: dict[bytes, list[torch.Tensor]] = {}


@dataclass
class Step(KVConnectorMetadata):
    loads: list[tuple[str, list[bytes], list[int], bool]] = field(default_factory=list)
    saves: list[tuple[bytes, int]] = field(default_factory=list)


@dataclass
class Greeting(KVConnectorHandshakeMetadata):
    """What the other connector's workers tell its scheduler."""


greeted: list[Any] = []
"""What its scheduler was told."""


class OtherConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block = vllm_config.cache_config.block_size
        self._requests: dict[str, Any] = {}
        self._found: dict[str, tuple[int, int, bool]] = {}
        self._loads: list[tuple[str, list[bytes], list[int], bool]] = []
        self._pools: list[torch.Tensor] = []
        self._receiving: dict[str, tuple[list[bytes], list[int]]] = {}
        self._lost: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_handshake_metadata(self) -> Greeting:
        return Greeting()

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[Any, Any]) -> None:
        greeted[:] = metadata.values()

    # Scheduler.

    def on_new_request(self, request: Any) -> None:
        self._requests[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        first, count = num_computed_tokens // self._block, 0
        last = min((request.num_tokens - 1) // self._block, first + orders.offers)
        while first + count < last and bytes(request.block_hashes[first + count]) in kept:
            count += 1
        self._found[request.request_id] = (first, count, orders.waits)
        return count * self._block, count > 0 and orders.waits

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens == 0:
            return
        first, count, waits = self._found[request.request_id]
        assert num_external_tokens == count * self._block
        hashes = [bytes(of) for of in request.block_hashes[first : first + count]]
        self._loads.append((request.request_id, hashes, blocks.get_block_ids()[0][first : first + count], waits))

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        step, self._loads = Step(self._loads), []
        for name, scheduled in scheduler_output.num_scheduled_tokens.items():
            if not orders.keeps:
                continue
            request = self._requests[name]
            (table,) = scheduler_output.kv_connector_block_state.get_block_ids(name)
            full = (request.num_computed_tokens + scheduled) // self._block
            hashes = map(bytes, request.block_hashes[:full])
            step.saves += [(key, block) for key, block in zip(hashes, table, strict=False) if key not in kept]
        return step

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._requests.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        return self.request_finished(request, block_ids[0])

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._pools = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for name, hashes, blocks, waits in self._get_connector_metadata().loads:
            if waits:
                self._spoil(blocks)  # half-way, as it were
                self._receiving[name] = (hashes, blocks)
            else:
                self._load(hashes, blocks)

    def _load(self, hashes: list[bytes], blocks: list[int]) -> None:
        for key, block in zip(hashes, blocks, strict=True):
            for pool, layer in zip(self._pools, kept[key], strict=True):
                pool[block].copy_(layer)
        if orders.loses is not None:
            self._spoil(blocks[orders.loses :])
            self._lost.update(blocks[orders.loses :])

    def _spoil(self, blocks: list[int]) -> None:
        for pool in self._pools:
            for block in blocks:
                pool[block].fill_(0.5)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        for key, block in self._get_connector_metadata().saves:
            kept[key] = [pool[block].clone() for pool in self._pools]

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str] | None]:
        if orders.waits or not self._receiving:
            return None, None
        for hashes, blocks in self._receiving.values():
            self._load(hashes, blocks)
        received, self._receiving = set(self._receiving), {}
        return None, received

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost, self._lost = self._lost, set()
        return lost
