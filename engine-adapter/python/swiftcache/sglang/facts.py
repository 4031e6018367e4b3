"""What makes KV blocks of two SGLang engines interchangeable: everything that might change a byte of one.

The arguments are those that SGLang has resolved: "auto" is not the same everywhere.

What differs between requests of one engine is in SGLang's page hashes already: tokens, `cache_salt`, `extra_key`, and
the LoRA adapter's id. That id is made of an adapter's name and path if it is given at the start, so the adapters'
files are a fact; of adapters that are loaded later it is random, and their blocks stay with their engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sglang
import torch.distributed as dist
from sglang.srt.arg_groups.model_override_base import model_config_of

from swiftcache.engine.fingerprint import Ranks, weight_files

if TYPE_CHECKING:
    from swiftcache.engine.layout import Layout
    from swiftcache.engine.settings import Settings

# Arguments of the engine that bear on what the bytes of a page are.
_ARGUMENTS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "model_impl",
    "json_model_override_args",
    "is_embedding",
    "ep_size",
    "enable_dp_attention",
    "rl_on_policy_target",
    "modelopt_quant",
    "quantize_and_serve",
)


def groups(params: Any) -> list[Any]:
    """The groups whose ranks have to agree, as SGLang's own tree chooses them."""
    near = [group for group in (params.attn_cp_cache_group, params.attn_tp_cache_group) if _several(group)]
    return near or [group for group in (params.tp_cache_group,) if _several(group)]


def ranks_here(params: Any) -> Ranks:
    group = params.attn_tp_cache_group if params.attn_tp_cache_group is not None else params.tp_cache_group
    if not _several(group):
        return Ranks()
    return Ranks(tp=dist.get_rank(group), tp_size=dist.get_world_size(group))


def _several(group: Any) -> bool:
    return group is not None and dist.get_world_size(group) > 1


def facts(
    server_args: Any, settings: Settings, pool: Any, layout: Layout, *, page: int, ranks: Ranks
) -> dict[str, Any]:
    return {
        "sglang": sglang.__version__,
        "model": _model(server_args, settings),
        "salt": settings.salt,
        "page": page,
        "pool": [type(pool).__name__, str(pool.dtype), str(pool.store_dtype)],
        "pages": layout.shape,
        "layers": {name: list(numbers) for name, numbers in layout.by_layer.items()},
        "arguments": {name: str(getattr(server_args, name, None)) for name in _ARGUMENTS},
        "ranks": ranks.tp_size,
    }


def _model(server_args: Any, settings: Settings) -> dict[str, Any]:
    config = model_config_of(server_args).hf_config.to_dict()
    config.pop("_name_or_path", None)
    found: dict[str, Any] = {"config": config, "adapters": _adapters(server_args)}
    if settings.model_id:
        return found | {"id": settings.model_id}
    path, dummy = server_args.model_path, str(server_args.load_format) == "dummy"
    return found | {
        "id": path,
        "revision": server_args.revision,
        "files": weight_files(path, server_args.revision),
        "scales": _file(server_args.quantization_param_path),
        "load_format": str(server_args.load_format),
        "loader": str(server_args.model_loader_extra_config),
        "seed": server_args.random_seed if dummy else None,
    }


def _adapters(server_args: Any) -> list[Any]:
    paths = sorted(map(_path, server_args.lora_paths or ()))
    return [(path, weight_files(path, None)) for path in paths]


def _path(adapter: Any) -> str:
    """Of an adapter as SGLang has read it, or as it was said: a path, a name and a path, or a dictionary."""
    if isinstance(adapter, str):
        return adapter.partition("=")[2] or adapter
    if isinstance(adapter, dict):
        return str(adapter.get("lora_path"))
    return str(adapter.lora_path)


def _file(path: str | None) -> str:
    if not path:
        return ""
    with open(path, "rb") as file:
        return file.read().hex()
