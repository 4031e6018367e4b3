"""LMCache's own server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from node import eventually

__all__ = ["serving"]


@contextlib.contextmanager
def serving(
    log: Path, gigabytes: float, *options: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Runs it with so much host memory, and yields its process and its port once it listens.

    Raises:
        OSError: it has ended before.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--port", str(port)]
    command += ["--l1-size-gb", str(gigabytes), "--eviction-policy", "LRU", *options]
    own = {"LMCACHE_TRACK_USAGE": "false"} | (environment or {})
    with log.open("ab") as into:
        server = subprocess.Popen(command, stdout=into, stderr=into, env=os.environ | own)

    def listens() -> bool:
        if server.poll() is not None:
            raise OSError(f"LMCache's server ended with {server.returncode}: {log} says why")
        with socket.socket() as probe:
            return probe.connect_ex(("localhost", port)) == 0

    try:
        eventually("LMCache's server to listen", listens)
        yield server, port
    finally:
        server.kill()
        server.wait()
