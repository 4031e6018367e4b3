"""A broker and donors as processes of this machine: over its GPUs, or over simulated ones."""

import json
import pathlib
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

TOPOLOGY = """
name = "two simulated GPUs on NVLink"
[[device]]
uuid = "SIM-0"
name = "simulated GPU"
hbm_bytes = 8589934592
[[device]]
uuid = "SIM-1"
name = "simulated GPU"
hbm_bytes = 8589934592
[[link]]
between = ["SIM-0", "SIM-1"]
kind = "nvlink"
gigabytes_per_second = 380.0
"""


def eventually(what: str, holds: Callable[[], Any]) -> Any:
    """Tries until something holds, and returns it."""
    deadline = time.monotonic() + 120
    while not (found := holds()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.002)
    return found


class Node:
    """Processes end with it."""

    def __init__(self, programs: pathlib.Path, directory: pathlib.Path, gpus: bool) -> None:
        self.programs, self.socket = programs, str(directory / "broker.sock")
        self.devices = (
            [f"GPU-{torch.cuda.get_device_properties(n).uuid}" for n in range(torch.cuda.device_count())]
            if gpus
            else ["SIM-0", "SIM-1"]
        )
        self._running: list[subprocess.Popen[bytes]] = []
        probe = ["--probe", "nvml"]
        if not gpus:
            topology = directory / "topology.toml"
            topology.write_text(TOPOLOGY)
            probe = ["--probe", "simulated", "--topology", str(topology)]
        self._start("swiftcache-broker", "--log", "error", "--socket", self.socket, *probe)
        eventually("the broker to listen", self._listens)

    def _start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        started = subprocess.Popen([self.programs / program, *options], stdin=subprocess.DEVNULL)
        self._running.append(started)
        return started

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.socket) == 0

    def offered(self) -> int:
        """Bytes that donors have on offer."""
        command = [self.programs / "swiftcache", "status", "--json", "--socket", self.socket]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["total"]["offered"]

    def start_donor(self, device: str, total: int, slab: int) -> subprocess.Popen[bytes]:
        """A donor that lends that many bytes of a device, once all are on offer."""
        before = self.offered()
        amount = ["--bytes", str(total), "--slab", str(slab), "--leave-within", "60s"]
        donor = self._start("swiftcache", "donate", "--socket", self.socket, "--device", device, *amount)
        eventually("the donor's offer", lambda: self.offered() >= before + total)
        return donor

    def end(self, donor: subprocess.Popen[bytes]) -> None:
        """Has a donor take everything back and leave."""
        donor.terminate()
        if code := donor.wait(timeout=120):
            raise RuntimeError(f"the donor ended with status {code}")

    def close(self) -> None:
        for program in self._running:
            program.kill()
            program.wait()
