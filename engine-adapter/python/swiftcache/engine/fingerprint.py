"""The namespace of a worker: what makes two KV blocks of equal hash interchangeable.

Workers compute it, from the tensors they really have, and a scheduler hears it from them, so the two cannot disagree.
An adapter collects the facts. Anything that might change a byte is one, the engine's name and version too: the price of
a needless difference is a miss, that of a missed one is wrong tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Ranks:
    """A worker's place among those of its engine: tensor and pipeline parallel."""

    tp: int = 0
    tp_size: int = 1
    pp: int = 0
    pp_size: int = 1


def namespace(facts: Mapping[str, Any], ranks: Ranks, seed: str | None = None) -> str:
    """At most 256 bytes: a digest of the facts, and the worker's place. `seed`: what the engine's block hashes are
    seeded with, "" for its default. It has a place of its own, by which `swiftcache doctor` knows engines that differ
    in nothing else."""
    seeded = "" if seed is None else f"/seed-{_short(seed)}"
    return f"{_digest(facts)}{seeded}/tp{ranks.tp}of{ranks.tp_size}/pp{ranks.pp}of{ranks.pp_size}"


def _short(seed: str) -> str:
    if not seed:
        return "none"
    return seed if len(seed) <= 10 and seed.isalnum() else _digest(seed)[:10]


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()


def weight_files(model: str, revision: str | None) -> list[tuple[str, ...]]:
    """Names the weights by their files, so that a path with other weights in it is another namespace. `model` is a
    directory, or a name in the Hugging Face cache.

    Files of that cache are links to blobs named by content, equal on every machine. Others are told by size and time of
    change, which copies may not keep: the setting `model_id` says that two are the same.
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


def adapter(path: str) -> bytes:
    """Names a LoRA adapter by its files, 16 bytes; empty if there are none (yet). `path` is a directory, or a name in
    the Hugging Face cache."""
    path = os.path.expanduser(path)
    directory = path if os.path.isdir(path) else _snapshot(path, None, "adapter_config.json")
    try:
        files = weight_files(directory, None) if directory is not None else []
        if not files or directory is None:
            return b""
        with open(os.path.join(directory, "adapter_config.json"), "rb") as config:
            return hashlib.sha256(repr(files).encode() + config.read()).digest()[:16]
    except OSError:  # somebody is writing it
        return b""


def _snapshot(model: str, revision: str | None, of: str = "config.json") -> str | None:
    """The directory of a repository in Hugging Face's cache, in which there is a file of this name."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, of, revision=revision)
    except Exception:  # not a repository's name, or another version of the library: the name has to do
        return None
    return os.path.dirname(found) if isinstance(found, str) else None
