"""What engines share a node with: donors, another tenant."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from node import Node, eventually, stop

SLAB = 8 << 20


def donate(node: Node, slabs: int = 16, device: str = "SIM-1"):
    return node.start_donor(device, slabs, SLAB)


def withdrawn(node: Node) -> None:
    """Has the node's only donor take everything back, and waits until it has."""
    [donor] = node.status()["donors"]
    os.kill(donor["pid"], signal.SIGTERM)
    eventually("the donor to have everything back", lambda: not node.status()["donors"])


class Memory:
    """What a donor lends, kept open: after it has gone nobody else may be reading it."""

    def __init__(self, donor: int) -> None:
        self._files = []
        for link in Path(f"/proc/{donor}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "memfd:" in os.readlink(link):
                    self._files.append(open(link, "r+b"))  # noqa: SIM115

    def poison(self) -> int:
        """Fills it with NaNs. Returns how many bytes that were."""
        total = 0
        for file in self._files:
            with file:
                size = os.fstat(file.fileno()).st_size
                total += file.write(b"\xff" * size)
        return total


class Tenant:
    """A process of `tenant.py`: it has filled what it could lease."""

    def __init__(self, node: Node) -> None:
        command = [sys.executable, Path(__file__).with_name("tenant.py"), node.socket]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.leased = int(self._process.stdout.readline())

    def stop(self) -> None:
        """From now on it does nothing, and lets go of nothing."""
        stop(self._process)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self._process.communicate()
