"""Processes that do what they are told, both ends: a call is a line of JSON that names a method and its arguments, and
so is the answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ToldError(Exception):
    """What it was told failed, or it ended, or took too long."""


class Told:
    """A process that calls `Orders.serve`. Its children, which an engine may have, end with it in any case: they would
    keep their HBM."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None) -> None:
        """`environment`: beside this process's own."""
        self.log = log
        self._said = ""
        self._heard = bytearray()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, within: float | None = None, **arguments: Any) -> Any:
        """Has it call a method, and waits for what it returns, `within` so many seconds at most.

        Raises:
            ToldError: with the end of its log.
        """
        self.say(do, **arguments)
        return self.answer(within)

    def say(self, do: str, **arguments: Any) -> None:
        """As `ask`, but `answer` waits. One call at a time."""
        assert self._process.stdin is not None
        # Of one that has ended the answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, "with": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        self._said = do

    def answer(self, within: float | None = None) -> Any:
        answer = json.loads(self._line(within))
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer["ok"]

    def _line(self, within: float | None) -> bytes:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        deadline = None if within is None else time.monotonic() + within
        while b"\n" not in self._heard:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([file], [], [], left)[0]:
                raise self._failed(f"no answer within {within:g} s")
            part = os.read(file, 1 << 16)
            if not part:
                raise self._failed("the process ended")
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _failed(self, why: str) -> ToldError:
        return ToldError(f"{self._said}: {why}; the end of its log:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def kill(self) -> None:
        """As a crash would."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Has it end by itself, as one does that nobody can tell any more."""
        self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        Told.close(self)

    def close(self) -> None:
        """Ends it now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Orders:
    """The other end. To be made before anything is imported that may print: from then on standard output is for answers
    alone, and what others write to it goes to standard error."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def serve(self, target: object) -> None:
        """Calls the target's methods until nobody is there to tell more."""
        for line in sys.stdin:
            command = json.loads(line)
            try:
                self._done(getattr(target, command["do"])(**command["with"]))
            except Exception as reason:
                self._refused(reason)

    async def serve_async(self, target: object) -> None:
        """As `serve`; its methods are coroutines."""
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            try:
                self._done(await getattr(target, command["do"])(**command["with"]))
            except Exception as reason:
                self._refused(reason)

    def _done(self, result: Any) -> None:
        self._answers.write(json.dumps({"ok": result}) + "\n")

    def _refused(self, reason: Exception) -> None:
        traceback.print_exception(reason)
        self._answers.write(json.dumps({"error": f"{type(reason).__name__}: {reason}"}) + "\n")
