"""Settings: what the engine was told first, then SWIFTCACHE_* in the environment, then defaults.

Every worker and the scheduler read them for themselves, so they must come from what all of them share. Defaults stand
here and nowhere else. Limits that the broker or the client has are theirs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from swiftcache._native import MAX_DRAIN_MS, MAX_TENANT_BYTES

_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UNITS = (
    {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    | _BINARY
    | {f"{name}IB": unit for name, unit in _BINARY.items()}
)
"""The same as the broker and the command line take (proto/src/size.rs): KB is 1000 bytes, K and KiB are 1024."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", re.IGNORECASE)
_MOST = 1 << 50
"""The largest size that is taken, bytes."""
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

LOAD_MODES = ("auto", "sync", "async", "wait")
"""sync: layer by layer while the forward runs; async: before the request is scheduled, but for the end of a load that
cannot fail any more; wait: all of it before the request is scheduled."""
BACKENDS = ("auto", "cuda", "host")


@dataclass(frozen=True)
class Settings:
    socket: str = "/run/swiftcache/broker.sock"
    """The broker's Unix socket."""
    max_leased_bytes: int = 16 << 30
    """The most HBM that one worker leases from donors. The broker's fairness and quotas bound it further."""
    max_host_leased_bytes: int = 64 << 30
    """The most host memory that one worker leases where donors lend too little HBM: that of `swiftcache donate --device
    HOST-n`, which all engines of the node share. 0: nothing."""
    lease_step_bytes: int | None = None
    """How much to lease at a time; None: an eighth of the most."""
    host_tier_bytes: int = 0
    """Host memory of one worker alone, for blocks that donors have no room for."""
    device: str = ""
    """UUID of the device the worker computes on; empty: found out."""
    backend: str = "auto"
    """How bytes are copied: by CUDA, in shared memory, or what fits."""
    share: bool = True
    """Whether to load blocks that other engines wrote, if their namespace is the same."""
    tenant: str = ""
    """Sub-division of this user's tenant; nothing is shared between tenants."""
    salt: str = ""
    """Engines share blocks only with engines of the same salt."""
    model_id: str = ""
    """Says which weights these are, instead of the path, revision and files of the model."""
    load: str = "auto"
    """When blocks are loaded. Which modes there are is an engine's matter; auto: what fits it."""
    lookup_ms: int = 50
    """The longest the scheduler waits for one lookup, milliseconds."""
    disk_ms: int = 2000
    """How long a request waits at most for blocks that are on their way from a disk (`swiftcache donate --device
    DISK-n`), milliseconds; not at all when the disk is expected to take longer. 0: it computes them, and the next
    request finds them."""
    lend: float = 0.0
    """The share of the engine's own KV pool that it lends at most while it does not need it; 0: nothing."""
    lend_reserve: float = 0.05
    """The share of the pool that is to stay free beyond what requests need; less, and lent blocks are asked back."""
    lend_after_ms: int = 1000
    """For how long the engine must be quiet before it lends."""
    lend_drain_ms: int = 500
    """How long borrowers may take to move their blocks away when lent ones are asked back."""
    stream_bytes: int = 0
    """How much a worker leases to make its KV cache larger than its own memory: a stitched pool; 0: nothing."""
    stream_window_bytes: int = 256 << 20
    """Local memory through which a layer's leased blocks are read while prompts are computed. There are two of it."""
    stream_spare_units: int = 0
    """Slabs of local memory for parts of a stitched pool whose slabs are asked back. What does not fit moves to host
    memory."""
    stream_step_ms: int = 10
    """How long a step of the engine may wait while parts of a stitched pool move, milliseconds."""

    @staticmethod
    def read(
        where: str,
        extra: Mapping[str, Any] | None,
        environment: Mapping[str, str] | None = None,
        *,
        loads: Sequence[str] = LOAD_MODES,
    ) -> Settings:
        """Reads and checks settings. `where` is what operators call the place of `extra`, `loads` are the engine's
        modes of `load`. Raises ValueError naming the key at fault."""
        environment = os.environ if environment is None else environment
        extra = dict(extra or {})
        known = {field.name for field in fields(Settings)}
        if unknown := sorted(set(extra) - known):
            raise ValueError(
                f"{where}: SwiftCache knows no setting {', '.join(map(repr, unknown))}; "
                f"it knows {', '.join(sorted(known))}"
            )
        _refuse_mistyped(environment, known)
        values: dict[str, Any] = {}
        for name in known:
            variable = f"SWIFTCACHE_{name.upper()}"
            if name in extra:
                values[name] = _convert(name, f"{where}: {name}", extra[name], loads)
            elif environment.get(variable, "") != "":
                values[name] = _convert(name, variable, environment[variable], loads)
        settings = Settings(**values)
        if settings.lend and settings.stream_bytes:
            raise ValueError(
                f"{where}: lend and stream_bytes are both set: a worker whose own KV cache is too small for it has "
                "nothing to lend. Drop one of them"
            )
        return settings


def _refuse_mistyped(environment: Mapping[str, str], known: Iterable[str]) -> None:
    """Whoever set a variable that is nearly a setting's believes that it holds. Others with the prefix belong to the
    broker and to tools, or are Kubernetes' for a service of this name."""
    names = {f"SWIFTCACHE_{name.upper()}" for name in known}
    for variable in sorted(environment):
        if variable.startswith("SWIFTCACHE_") and variable not in names:
            near = difflib.get_close_matches(variable, names, n=1, cutoff=0.94)
            if near:
                raise ValueError(f"{variable} is no setting of SwiftCache; {near[0]} is")


def _convert(name: str, key: str, value: Any, loads: Sequence[str]) -> Any:
    if name.endswith("_bytes"):
        if name == "lease_step_bytes" and value is None:
            return None
        size = _size(key, value)
        if name in ("lease_step_bytes", "stream_window_bytes") and size == 0:
            raise ValueError(f"{key} must be positive")
        return size
    if name in ("lookup_ms", "disk_ms", "lend_after_ms", "lend_drain_ms", "stream_step_ms"):
        least = 0 if name in ("disk_ms", "lend_after_ms") else 1
        whole = not isinstance(value, bool) and re.fullmatch(r"\d{1,9}", str(value))
        if not whole or not least <= int(value) <= MAX_DRAIN_MS:
            raise ValueError(
                f"{key} is {value!r}; it must be a whole number of milliseconds, {least} to {MAX_DRAIN_MS}"
            )
        return int(value)
    if name == "stream_spare_units":
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,6}", str(value)):
            raise ValueError(f"{key} is {value!r}; it must be a whole number of slabs")
        return int(value)
    if name in ("lend", "lend_reserve"):
        if isinstance(value, bool) or not re.fullmatch(r"0|0?\.\d+|1(\.0+)?|0\.0", str(value)):
            raise ValueError(f"{key} is {value!r}; it must be a share of the KV pool, from 0 to 1, such as 0.5")
        return float(value)
    if name == "share":
        truth = value if isinstance(value, bool) else _TRUTH.get(str(value).lower())
        if truth is None:
            raise ValueError(f"{key} is {value!r}; it must be true or false")
        return truth
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; it must be text")
    for choice, allowed in (("load", loads), ("backend", BACKENDS)):
        if name == choice and value not in allowed:
            raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")
    if name == "socket" and not value:
        raise ValueError(f"{key} must name the broker's socket")
    if name == "tenant" and len(value.encode()) > MAX_TENANT_BYTES:
        raise ValueError(f"{key} is longer than {MAX_TENANT_BYTES} bytes")
    return value


def _size(key: str, value: Any) -> int:
    match = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"{key} is {value!r}; it must be a size in bytes, such as 1073741824 or '1GiB'")
    number, unit = match[1], _UNITS[match[2].upper()]
    if "." in number and unit == 1:
        raise ValueError(f"{key} is {value!r}; it must be a whole number of bytes, or have a unit, such as '1.5GiB'")
    size = int(float(number) * unit) if "." in number else int(number) * unit
    if size > _MOST:
        raise ValueError(f"{key} is {value!r}; it must be at most 1024TiB")
    return size
