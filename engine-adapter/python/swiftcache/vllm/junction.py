"""Where vLLM is to keep a state in the middle of a prompt: the only file that knows how it is told.

vLLM keeps the states of Mamba and GDN layers at the end of a prompt, and where a request found that full attention's
blocks reach further than states do: at `Request.shared_prefix_boundary`, tokens from the request's beginning. Its
scheduler ends a step there, and its KV cache manager offers the state to the connector
(`kv_connector_block_state.boundary_state_offloads`). It sets the boundary by what it found in its own pool, and calls
the connector right after that. Where more is found elsewhere, this raises it.

vLLM does not say that this is for connectors. So what is needed is looked for when the engine starts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.core.sched import output
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import MambaManager, SingleTypeKVCacheManager
from vllm.v1.request import Request as VllmRequest

if TYPE_CHECKING:
    from vllm.v1.request import Request

BOUNDARY = "shared_prefix_boundary"
OFFERS = "boundary_state_offloads"
READERS = (
    (VllmRequest, "__init__", BOUNDARY),
    (Scheduler, "schedule", BOUNDARY),
    (Scheduler, "_mamba_block_aligned_split", BOUNDARY),
    (SingleTypeKVCacheManager, "cache_blocks", BOUNDARY),
    (MambaManager, "cache_blocks", "_pending_boundary_state_offloads"),
)
"""Where vLLM uses them: of each class, a method and a name in it."""


def check() -> None:
    """Raises ValueError, naming what is missing, if this vLLM does not keep states where it is told to."""
    missing = [
        f"{name} in {owner.__name__}.{method}" for owner, method, name in READERS if not _uses(owner, method, name)
    ]
    state = getattr(output, "KVConnectorBlockState", None)
    if not dataclasses.is_dataclass(state) or OFFERS not in {field.name for field in dataclasses.fields(state)}:
        missing.append(f"{OFFERS} of KVConnectorBlockState")
    if missing:
        raise ValueError(
            f"SwiftCache serves models with Mamba, GDN or other state as vLLM 0.32 keeps it; vLLM {vllm.__version__} "
            f"lacks {', '.join(missing)}. Use vLLM 0.32, or run this model without SwiftCache"
        )


def _uses(owner: Any, method: str, name: str) -> bool:
    code = getattr(getattr(owner, method, None), "__code__", None)
    return code is not None and name in code.co_names


def keep_state_at(request: Request, tokens: int) -> None:
    """A state after so many tokens of the request is kept, if the request computes beyond it."""
    request.shared_prefix_boundary = max(request.shared_prefix_boundary or 0, tokens)
