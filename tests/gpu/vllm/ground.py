"""The node that engines and donors share here: this machine's GPUs, or simulated ones to try the scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "harness"), str(HERE.parents[1] / "vllm")]

from engine import Engine  # noqa: E402
from node import Node, eventually  # noqa: E402
from told import Orders, Told, ToldError  # noqa: E402

__all__ = [
    "ENGINE_ENVIRONMENT",
    "INVARIANT",
    "V1",
    "V2",
    "Donors",
    "Engine",
    "GiB",
    "Ground",
    "MiB",
    "Orders",
    "Told",
    "ToldError",
    "chosen",
    "eventually",
    "hbm",
    "hbm_used",
    "log_file",
    "ranked",
    "started",
]

MiB, GiB = 1 << 20, 1 << 30

ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}


V1, V2 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}
"""vLLM's model runners, as an engine's environment chooses them."""

INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
"""Has vLLM compute a request's sums in an order that does not depend on what it shares steps with. Then answers of
requests that run together can be compared bit by bit, too."""


def chosen(of: dict[str, Any], only: str) -> dict[str, Any]:
    """Those whose names a regular expression finds. To do nothing because of a slip would look as if all had passed."""
    found = {name: one for name, one in of.items() if re.search(only, name)}
    if not found:
        sys.exit(f"nothing is called {only}: there are {', '.join(of)}")
    return found


def log_file(report: Path, name: str) -> Path:
    """Where an engine writes that runs what is called `name`."""
    return report / f"{''.join(c if c.isalnum() else '-' for c in name)}.log"


def _smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def hbm_used() -> list[int]:
    """HBM in use of each GPU, MiB."""
    return [int(used) for used in _smi("memory.used")]


def hbm() -> int:
    """HBM of the first GPU, bytes; 0 where there is none."""
    return next((int(total) << 20 for total in _smi("memory.total")), 0)


RANKS_ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Without this, vLLM's CPU build wants a NUMA node for each rank of an engine. Other builds do not read it."""


def ranked(count: int) -> dict[str, Any]:
    """The options of an engine with so many ranks."""
    return {"tensor_parallel_size": count, "distributed_executor_backend": "mp" if count > 1 else "uni"}


def started(log: Path, environment: dict[str, str], **options: Any) -> Engine:
    """An engine whose made-up weights are such that its answers depend on its KV cache."""
    if options.get("tensor_parallel_size", 1) > 1:
        environment = environment | RANKS_ON_CPU
    engine = Engine(log, ENGINE_ENVIRONMENT | environment)
    try:
        engine.start(**options)
        engine.ask("enliven")
    except BaseException:
        engine.close()
        raise
    return engine


SIMULATED = """name = "simulated GPUs on NVLink"
usage_dir = "{usage}"
{devices}
[all_pairs]
kind = "nvlink"
gigabytes_per_second = 380.0
"""
"""The topology of as many simulated devices as a script asks for."""


class Ground(Node):
    """Engines compute on the first device. Memory of the last one is lent."""

    def __init__(
        self, directory: Path, programs: Path, *, cpu: bool, simulated: int = 2, broker: tuple[str, ...] = ()
    ) -> None:
        """`simulated`: how many devices there are where there is no GPU. `broker`: its further options."""
        self.cpu = cpu
        self.devices = [f"SIM-{number}" for number in range(simulated)] if cpu else _smi("uuid")
        self.hardware = "simulated devices" if cpu else ", ".join(_smi("name"))
        if not self.devices:
            sys.exit("a GPU is needed, and nvidia-smi names none")
        probe = ("--probe", "nvml")
        if cpu:
            device = '[[device]]\nuuid = "{}"\nname = "simulated GPU"\nhbm_bytes = 1073741824\n'
            topology = directory / "simulated.toml"
            devices = "".join(map(device.format, self.devices))
            topology.write_text(SIMULATED.format(usage=directory / "usage", devices=devices))
            probe = ("--probe", "simulated", "--topology", str(topology))
        super().__init__(directory, programs.resolve(), probe + broker)

    @property
    def donor_device(self) -> str:
        return self.devices[-1]

    def leased(self, device: str | None = None) -> int:
        """Bytes of donors that engines have leased: of one device, or of all."""
        return self._account(device)["leased"]

    def offered(self, device: str) -> int:
        """Bytes that a device's donors offer, leased or not."""
        return self._account(device)["offered"]

    def _account(self, device: str | None) -> dict[str, int]:
        status = self.status()
        return next((one["account"] for one in status["devices"] if one["uuid"] == device), status["total"])

    @property
    def way(self) -> str:
        """Where the lent memory lies, as seen from the engine."""
        if self.cpu:
            return "a simulated device, in shared memory"
        return "another GPU" if len(self.devices) > 1 else "the engine's own GPU, there is no other: no link is crossed"

    def lend(self, amount: int, slab: int, device: str | None = None) -> subprocess.Popen[bytes]:
        """Starts a donor of `amount` bytes in slabs of `slab` bytes."""
        return self.start_donor(device or self.donor_device, amount // slab, slab)

    def visible(self, own: list[int]) -> str:
        """All devices, an engine's own first: what CUDA_VISIBLE_DEVICES says to it."""
        others = [number for number in range(len(self.devices)) if number not in own]
        return ",".join(self.devices[number] for number in own + others)

    def lend_idle(self, device: str, most: int, slab: int) -> subprocess.Popen[bytes]:
        """Starts a donor that follows what is idle of a device, of which it lends so much at most, and waits until it
        offers something."""
        options = ["--device", device, "--elastic", "--most", str(most), "--slab", str(slab)]
        return self._donate("the elastic donor to offer", lambda _: self.offered(device) > 0, *options)


class Donors:
    """Donors on some devices, which lend `amount` bytes together, and alike."""

    def __init__(self, ground: Ground, amount: int, slab: int, devices: list[str]) -> None:
        self._ground = ground
        slabs = -(-amount // (slab * len(devices)))
        self._donors = [ground.lend(slabs * slab, slab, device) for device in devices]

    def withdraw(self) -> None:
        """Has them ask for everything back. They end when they have it."""
        for donor in self._donors:
            self._ground.withdraw(donor)

    def over(self) -> bool:
        return all(donor.poll() is not None for donor in self._donors)

    def close(self) -> None:
        for donor in self._donors:
            donor.kill()
            donor.wait()
