"""A node for the Python suites: the real broker and donors on simulated devices, in a separate directory."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

PROGRAMS = pathlib.Path(__file__).resolve().parents[2] / "target" / "debug"

TOPOLOGY = pathlib.Path(__file__).with_name("topology.toml")

USAGE = 2
"""The exit status of a `swiftcache` that refuses what it was asked for."""
KEPT = 3_600_000
"""An estate's time, milliseconds: longer than any test."""


def eventually(what: str, holds: Callable[[], Any], seconds: float = 120) -> Any:
    """Calls `holds` until its result is true, and returns the result. The time limit is only for a hang."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        # The sleep only lets other processes run. Nothing depends on its length.
        time.sleep(0.002)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stops a process, and waits until it has stopped: until then, on a busy machine, its threads go on."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


class Node:
    """The processes of a node. `close` ends them."""

    def __init__(self, directory: pathlib.Path, programs: pathlib.Path = PROGRAMS, probe: tuple[str, ...] = ()) -> None:
        """`probe` is the broker's options for its devices. Without it, the broker has three simulated devices."""
        self.directory, self.programs = directory, programs
        self.socket = str(directory / "broker.sock")
        topology = directory / "topology.toml"
        usage = directory / "usage"
        usage.mkdir(exist_ok=True)
        topology.write_text(TOPOLOGY.read_text().replace("USAGE", str(usage)))
        self._probe = probe or ("--probe", "simulated", "--topology", str(topology))
        self._broker: subprocess.Popen[bytes] | None = None
        self._programs: list[subprocess.Popen[bytes]] = []

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        program = self.programs / command[0]
        assert program.is_file(), f"{program} is not built: run `make test`"
        started = subprocess.Popen([program, *command[1:]], stdin=subprocess.DEVNULL)
        self._programs.append(started)
        return started

    def start_broker(self, estate_ttl_ms: int = 0) -> None:
        """Starts the broker (again) in the same directory, and waits until it listens. What engines leave is freed at
        once, unless a test is about that."""
        options = ["--estate-ttl-ms", str(estate_ttl_ms), "--log", "error", "--socket", self.socket, *self._probe]
        self._broker = self._start("swiftcache-broker", *options)
        eventually("the broker to listen", self._listens)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.socket) == 0

    def kill_broker(self) -> None:
        assert self._broker is not None
        self._broker.kill()
        self._broker.wait()

    def start_donor(self, device: str, slabs: int, slab_bytes: int) -> subprocess.Popen[bytes]:
        """Starts a donor that lends this much of a device, and waits until the broker knows it."""
        options = ["--device", device, "--leave-within", "60s"]
        options += ["--bytes", str(slabs * slab_bytes), "--slab", str(slab_bytes)]

        def attached(donor: subprocess.Popen[bytes]) -> bool:
            return donor.pid in [known["pid"] for known in self.status()["donors"]]

        return self._donate("the donor to attach", attached, *options)

    def start_disk(self, path: pathlib.Path, *, size: str, memory: int) -> subprocess.Popen[bytes]:
        """Starts a disk's agent, and waits until the broker knows it."""
        options = ["--device", "DISK-0", "--path", str(path), "--bytes", size, "--memory", str(memory)]
        return self._donate(
            "the disk to be known", lambda _: any(disk["bytes"] for disk in self.status().get("disks", [])), *options
        )

    def _donate(
        self, what: str, known: Callable[[subprocess.Popen[bytes]], bool], *options: str
    ) -> subprocess.Popen[bytes]:
        """Starts `swiftcache donate`, and waits until the broker knows it."""
        donor: subprocess.Popen[bytes] | None = None

        def is_known() -> bool:
            nonlocal donor
            # A donor exits when the broker does not answer within seconds. On a busy machine this can happen.
            if donor is None or donor.poll() is not None:
                refused = donor is not None and donor.returncode == USAGE
                assert not refused, f"waited in vain for {what}: it refuses `{' '.join(options)}`, and says why"
                donor = self._start("swiftcache", "donate", "--socket", self.socket, *options)
            return known(donor)

        eventually(what, is_known)
        assert donor is not None
        return donor

    def status(self) -> dict[str, Any]:
        """The node's status from the broker."""
        command = [self.programs / "swiftcache", "status", "--json", "--socket", self.socket]

        def answer() -> Any:
            # The command fails when the broker does not answer within seconds.
            asked = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=120)
            return json.loads(asked.stdout) if asked.returncode == 0 else None

        return eventually("the broker's status", answer)

    def index(self, *namespaces: str) -> set[tuple[str, str]]:
        """The blocks that lookups find in donors' memory, of these namespaces or of all: the kind of memory and the
        name in hexadecimal of each."""
        command = [self.programs / "swiftcache", "watch", "--once", "--json", "--socket", self.socket]
        command += [f"--namespace={name}" for name in namespaces]

        def answer() -> list[dict[str, Any]] | None:
            asked = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=120)
            return [json.loads(line) for line in asked.stdout.splitlines()] if asked.returncode == 0 else None

        blocks: set[tuple[str, str]] = set()
        for message in eventually("the broker's index", answer):
            for change in message["changes"]:
                its = {(change["medium"], name) for name in change["hashes"]}
                blocks = blocks - its if change["removed"] else blocks | its
        return blocks

    def drop(self, what: str, namespace: str) -> None:
        """As an operator does: `evict` a namespace's blocks, or `forget` what engines that are gone have left there."""
        command = [self.programs / "swiftcache", what, "--yes", "--socket", self.socket, "--namespace", namespace]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=120)

    def withdraw(self, donor: subprocess.Popen[bytes]) -> None:
        """Makes a donor ask for all of its memory back. The donor exits when it has it."""
        os.kill(donor.pid, signal.SIGTERM)

    def close(self) -> None:
        for program in self._programs:
            program.kill()
        for program in self._programs:
            program.wait()
