"""Made-up parts of vLLM for unit tests: requests, configurations, and the tensors of its layouts."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import RequestStatus

BLOCK = 4


def request(name: str, tokens: int, *, start: int = 0) -> SimpleNamespace:
    made = SimpleNamespace(
        request_id=name,
        status=RequestStatus.WAITING,
        all_token_ids=list(range(start, start + tokens)),
        block_hashes=[],
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        num_prompt_tokens=tokens,
        shared_prefix_boundary=0,
        skip_reading_prefix_cache=False,
        lora_request=None,
        cache_salt=None,
        mm_features=[],
        prompt_embeds=None,
    )
    grow(made, 0)
    return made


def grow(made: SimpleNamespace, tokens: int) -> None:
    last = made.all_token_ids[-1]
    made.all_token_ids.extend(range(last + 1, last + 1 + tokens))
    made.num_tokens = len(made.all_token_ids)
    made.block_hashes = [
        hashlib.sha256(str(made.all_token_ids[: end * BLOCK]).encode()).digest()
        for end in range(1, made.num_tokens // BLOCK + 1)
    ]


def allocation(*tables: list[int]) -> SimpleNamespace:
    """The blocks of each group."""
    return SimpleNamespace(get_block_ids=lambda: tables)


def output(
    scheduled: dict[str, int],
    tables: dict[str, Any],
    preempted: tuple[str, ...] = (),
    loads: bool = False,
    states: dict[str, list[tuple[int, int, int]]] | None = None,
) -> SimpleNamespace:
    """`tables`: of each request, the blocks of its one group, or a tuple of those of each. `loads`: some connector
    loads something that this step needs. `states`: what vLLM offers of each request: group, block, tokens."""
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        has_sync_kv_loads=loads,
        preempted_req_ids=set(preempted),
        kv_connector_block_state=SimpleNamespace(
            get_block_ids=lambda name: _tables(tables[name]) if name in tables else None,
            boundary_state_offloads=states or {},
        ),
    )


def _tables(of: Any) -> tuple[list[int], ...]:
    return of if isinstance(of, tuple) else (of,)


def answer(**fields: Any) -> SimpleNamespace:
    base = {
        "kv_connector_worker_meta": None,
        "invalid_block_ids": set(),
        "finished_recving": None,
        "finished_sending": None,
    }
    return SimpleNamespace(**(base | fields))


def spec(**fields: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **({"block_size": BLOCK, "num_kv_heads": 2, "head_size": 4, "dtype": torch.float32} | fields)
    )


def window(**fields: Any) -> SlidingWindowSpec:
    base = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 4, "dtype": torch.float32, "sliding_window": 2 * BLOCK}
    return SlidingWindowSpec(**(base | fields))


def chunks(**fields: Any) -> ChunkedLocalAttentionSpec:
    base = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 4, "dtype": torch.float32, "attention_chunk_size": 8}
    return ChunkedLocalAttentionSpec(**(base | fields))


def state(**fields: Any) -> MambaSpec:
    base = {"block_size": BLOCK, "shapes": ((4,), (2, 8)), "dtypes": (torch.float32,) * 2, "mamba_cache_mode": "align"}
    return MambaSpec(**(base | fields))


def hybrid(*specs: KVCacheSpec, **fields: Any) -> KVCacheConfig:
    """A group of full attention, and one for each spec: a sliding window unless it is said. Two layers in each."""
    kv = kv_config(**fields)
    for number, one in enumerate(specs or (window(),), 1):
        names = [f"model.layers.{2 * number + layer}.self_attn.attn" for layer in range(2)]
        kv.kv_cache_groups.append(KVCacheGroupSpec(layer_names=names, kv_cache_spec=one))
    return kv


def kv_config(layers: int = 2, blocks: int = 8, **fields: Any) -> KVCacheConfig:
    names = [f"model.layers.{number}.self_attn.attn" for number in range(layers)]
    group = KVCacheGroupSpec(layer_names=names, kv_cache_spec=fields.pop("kv_cache_spec", spec()))
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[group], **fields)


def caches(layers: int = 2, blocks: int = 8) -> dict[str, torch.Tensor]:
    """As the CPU engine has them: all layers in one storage, layer after layer."""
    pool = torch.arange(layers * blocks * 64, dtype=torch.float32).reshape(layers, blocks, 2, BLOCK, 8)
    return {f"model.layers.{number}.self_attn.attn": pool[number] for number in range(layers)}


class Text(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def config(**fields: Any) -> SimpleNamespace:
    made = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector="SwiftCacheConnector",
            kv_role="kv_both",
            kv_load_failure_policy="fail",
            kv_connector_extra_config={},
            is_kv_producer=True,
        ),
        cache_config=SimpleNamespace(
            enable_prefix_caching=True,
            prefix_caching_hash_algo="sha256",
            calculate_kv_scales=False,
            cache_dtype="auto",
            kv_cache_layout="LBHNC",
            block_size=BLOCK,
            prefix_match_unit=None,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            enable_expert_parallel=False,
        ),
        speculative_config=None,
        model_config=SimpleNamespace(
            dtype=torch.float32,
            quantization=None,
            hf_config=Text(layers=2),
            hf_text_config=Text(layers=2),
            hf_overrides={},
            architectures=["Llama"],
            model="no/such-model",
            revision=None,
            seed=0,
        ),
        load_config=SimpleNamespace(load_format="auto"),
        compilation_config=SimpleNamespace(static_forward_context={}, cudagraph_mode=CUDAGraphMode.NONE),
        kv_events_config=None,
        max_concurrent_batches=1,
        use_v2_model_runner=False,
    )
    for path, value in fields.items():
        target, *rest = path.split("__")
        if rest:
            setattr(getattr(made, target), rest[0], value)
        else:
            setattr(made, target, value)
    return made
