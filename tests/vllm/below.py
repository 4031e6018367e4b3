"""A store below SwiftCache, as one beyond the node would be: vLLM's own OffloadingConnector over files in a directory,
which engines of several nodes share. vLLM's own tiers want a GPU; this one copies on the CPU. One rank, one KV group.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    PrepareStoreOutput,
    RequestOffloadingContext,
    TransferResult,
)

counts: Counter[str] = Counter()
"""What it has done in this process: `asked`, and files `read` and `written`."""


class Files(LoadStoreSpec):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths


class FilesOfBlocks(OffloadingManager):
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _files(self, keys: Collection[bytes]) -> list[Path]:
        return [self._directory / bytes(key).hex() for key in keys]

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        counts["asked"] += 1
        return LookupResult.HIT if self._files([key])[0].exists() else LookupResult.MISS

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> Files:
        return Files(self._files(keys))

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> PrepareStoreOutput:
        new = [key for key, file in zip(keys, self._files(keys), strict=True) if not file.exists()]
        return PrepareStoreOutput(new, Files(self._files(new)), [])

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()


class Copier(OffloadingWorker):
    def __init__(self, kv_caches: CanonicalKVCaches) -> None:
        self._tensors = [one.tensor for one in kv_caches.tensors]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Files) -> bool:
        for block, file in zip(src_spec.block_ids.tolist(), dst_spec.paths, strict=True):
            new = file.with_name(f"{file.name}.{os.getpid()}")
            torch.save([tensor[block].clone() for tensor in self._tensors], new)
            new.rename(file)
            counts["written"] += 1
        self._done.append(TransferResult(job_id, True))
        return True

    def submit_load(self, job_id: int, src_spec: Files, dst_spec: GPULoadStoreSpec) -> bool:
        for block, file in zip(dst_spec.block_ids.tolist(), src_spec.paths, strict=True):
            for tensor, page in zip(self._tensors, torch.load(file), strict=True):
                tensor[block].copy_(page)
            counts["read"] += 1
        self._done.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""


class Directory(OffloadingSpec):
    def get_manager(self) -> FilesOfBlocks:
        return FilesOfBlocks(Path(self.extra_config["directory"]))

    def get_worker(self, kv_caches: CanonicalKVCaches) -> Copier:
        return Copier(kv_caches)
