"""The namespace of a worker: what makes two KV blocks of equal hash interchangeable.

Workers compute it, from the tensors they really have, and the scheduler hears it from them (vLLM's connector
handshake), so the two cannot disagree. Anything that might change a byte is in it, the version of vLLM too: the price
of a needless difference is a miss, that of a missed one is wrong tokens.

What differs between requests of one engine is in vLLM's block hashes already: tokens, `cache_salt`, LoRA name and path,
multimodal items, prompt embeddings.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from swiftcache.vllm.config import Settings
    from swiftcache.vllm.layout import Layout

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def namespace(
    config: VllmConfig, settings: Settings, layout: Layout, *, block_tokens: int, backends: list[str], ranks: Ranks
) -> str:
    """At most 256 bytes: a digest, and the worker's place."""
    parallel = config.parallel_config
    facts: dict[str, Any] = {
        "vllm": vllm.__version__,
        "model": model_facts(config, settings),
        "salt": settings.salt,
        "hash": [config.cache_config.prefix_caching_hash_algo, os.environ.get("PYTHONHASHSEED", "")],
        "block_tokens": block_tokens,
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "layout": str(getattr(config.cache_config, "kv_cache_layout", None)),
        "pages": layout.shape,
        "layers": {name: list(numbers) for name, numbers in layout.by_layer.items()},
        "backends": backends,
        "parallel": [ranks.tp_size, ranks.pp_size, bool(getattr(parallel, "enable_expert_parallel", False))],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{digest}/tp{ranks.tp}of{ranks.tp_size}/pp{ranks.pp}of{ranks.pp_size}"


class Ranks:
    """A worker's place among those of its engine."""

    def __init__(self, tp: int = 0, tp_size: int = 1, pp: int = 0, pp_size: int = 1) -> None:
        self.tp, self.tp_size, self.pp, self.pp_size = tp, tp_size, pp, pp_size

    @staticmethod
    def here() -> Ranks:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        tp, pp = get_tp_group(), get_pp_group()
        return Ranks(tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size)


def model_facts(config: VllmConfig, settings: Settings) -> dict[str, Any]:
    model = config.model_config
    facts: dict[str, Any] = {
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "config": model.hf_config.to_dict(),
        "text_config": model.hf_text_config.to_dict(),
        "overrides": str(getattr(model, "hf_overrides", None)),
        "architectures": list(getattr(model, "architectures", None) or ()),
    }
    for part in ("config", "text_config"):
        facts[part].pop("_name_or_path", None)
    if settings.model_id:
        facts["id"] = settings.model_id
        return facts
    load = config.load_config
    facts |= {
        "id": model.model,
        "revision": model.revision,
        "files": weight_files(model.model, model.revision),
        "load_format": str(load.load_format),
        "seed": model.seed if str(load.load_format) == "dummy" else None,
    }
    return facts


def weight_files(model: str, revision: str | None) -> list[tuple[str, ...]]:
    """Names the weights by their files, so that a path with other weights in it is another namespace.

    Files of the Hugging Face cache are links to blobs named by content, equal on every machine. Others are told by
    size and time of change, which copies may not keep: `model_id` says that two are the same.
    """
    directory = model if os.path.isdir(model) else _snapshot(model, revision)
    if directory is None:
        return []
    files: list[tuple[str, ...]] = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if not entry.name.endswith(WEIGHTS):
            continue
        if entry.is_symlink() and os.path.basename(os.path.dirname(real := os.path.realpath(entry.path))) == "blobs":
            files.append((entry.name, os.path.basename(real)))
        elif entry.is_file():
            status = entry.stat()
            files.append((entry.name, str(status.st_size), str(status.st_mtime_ns)))
    return files


def _snapshot(model: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except Exception:  # not a repository's name, or another version of the library: the name has to do
        return None
    return os.path.dirname(found) if isinstance(found, str) else None
