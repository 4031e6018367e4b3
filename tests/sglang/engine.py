"""The test's end of `serve.py` and of `probe.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from node import eventually

HERE = Path(__file__).parent


class EngineError(Exception):
    pass


class Nursery:
    """The process that engines are forked from."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        """The variable SWIFTCACHE_NURSERY names the socket of one that runs already: of `serve.py`, in the same
        environment. Then a run of the tests does not import SGLang."""
        self.directory, self.engines = directory, 0
        self._log = directory / "nursery.log"
        self._process: subprocess.Popen[bytes] | None = None
        if running := os.environ.get("SWIFTCACHE_NURSERY"):
            self._address = Path(running)
            return
        self._address = directory / "nursery.sock"
        with self._log.open("ab") as log:
            command = [sys.executable, str(HERE / "serve.py"), str(self._address)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)} | environment,
            )

    def connect(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)

        def listens() -> bool:
            ended = self._process is not None and self._process.poll() is not None
            assert not ended, f"SGLang cannot be imported:\n{_tail(self._log)}"
            return line.connect_ex(str(self._address)) == 0

        eventually("SGLang to be imported", listens, seconds=600)
        return line

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Engine:
    """An engine. `start` may be called again after `stop`."""

    def __init__(self, nursery: Nursery, name: str) -> None:
        self._nursery, self._name, self.pid = nursery, name, 0
        self.log = nursery.directory / f"{name}.log"
        self._line: socket.socket | None = None
        self._doors = nursery.directory

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._line is not None, "the engine is not started"
        try:
            return _ask(self._line, do, arguments)
        except EngineError as reason:
            raise EngineError(f"{do}: {reason}; the end of its log:\n{_tail(self.log)}") from reason

    def start(self, environment: dict[str, str] | None = None, **options: Any) -> None:
        assert self._line is None, "the engine runs"
        self._nursery.engines += 1
        self._doors = self._nursery.directory / f"doors-{self._nursery.engines}"
        self._doors.mkdir()
        self._line = self._nursery.connect()
        try:
            said = self.ask(
                "start", options=options, environment=environment or {}, log=str(self.log), doors=str(self._doors)
            )
        except EngineError:
            self._gone()
            raise
        self.pid = said["pid"]

    def generate(self, prompts: dict[str, list[int]], max_tokens: int, **more: Any) -> dict[str, dict[str, Any]]:
        return self.ask("generate", prompts=prompts, max_tokens=max_tokens, **more)

    # The ranks' linkers, which answer while the engine works.

    def ranks(self) -> list[dict[str, Any]]:
        """What each says of itself."""
        return sorted((_knock(door, "stats") for door in self._doors.iterdir()), key=lambda rank: rank["rank"])

    def tell(self, do: str, rank: int | None = None, **arguments: Any) -> None:
        for door in self._doors.iterdir():
            if rank is None or _knock(door, "stats")["rank"] == rank:
                _knock(door, do, **arguments)

    def count(self, name: str) -> float:
        """Summed over ranks."""
        return sum(rank["counts"][name] for rank in self.ranks())

    def native(self, name: str) -> float:
        return sum(rank["native"][name] for rank in self.ranks())

    def leased(self) -> bool:
        return all(rank["native"]["leases"] for rank in self.ranks())

    # Its end.

    @contextlib.contextmanager
    def running(self, environment: dict[str, str] | None = None, **options: Any) -> Iterator[Engine]:
        self.start(environment, **options)
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """As SGLang stops: it kills its processes."""
        if self._line is not None:
            with contextlib.suppress(EngineError):
                self.ask("stop")
            self._gone()

    def kill(self) -> None:
        """The engine, all its processes, at once and without a word."""
        os.killpg(self.pid, signal.SIGKILL)
        self._gone()

    def _gone(self) -> None:
        assert self._line is not None
        self._line.close()
        self._line = None


def _knock(door: Path, do: str, **arguments: Any) -> Any:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(door))
        return _ask(line, do, arguments)


def _ask(line: socket.socket, do: str, arguments: dict[str, Any]) -> Any:
    said = ""
    with contextlib.suppress(OSError), line.makefile("rw") as lines:
        lines.write(json.dumps({"do": do, "with": arguments}) + "\n")
        lines.flush()
        said = lines.readline()
    if not said:
        raise EngineError("the engine has ended")
    answer = json.loads(said)
    if "error" in answer:
        raise EngineError(answer["error"])
    return answer["ok"]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-60:]) if log.exists() else "(no log)"
