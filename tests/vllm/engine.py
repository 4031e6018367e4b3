"""The test's end of `serve.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class EngineError(Exception):
    pass


class Engine:
    """An engine process. `start` may be called again after `stop`: the process, and its imports, stay."""

    def __init__(
        self, log: Path, environment: dict[str, str] | None = None, *, python: str | Path = sys.executable
    ) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [python, str(HERE / "serve.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | (environment or {}),
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the engine ended during {do}; the end of its log:\n{self.tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{do}: {answer['error']}; the end of its log:\n{self.tail()}")
        return answer["ok"]

    def start(self, **options: Any) -> dict[str, Any]:
        return self.ask("start", options=options)

    def generate(
        self, prompts: dict[str, list[int]], max_tokens: int, salt: str | None = None
    ) -> dict[str, dict[str, Any]]:
        for name, tokens in prompts.items():
            self.ask("add", name=name, tokens=tokens, max_tokens=max_tokens, salt=salt)
        return self.finish()

    def finish(self) -> dict[str, dict[str, Any]]:
        return self.ask("step", count=0)["finished"]

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def kill(self) -> None:
        """As a crash would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
