"""The test's end of `serve.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from told import Told

HERE = Path(__file__).parent


class Engine(Told):
    """An engine process. `start` may be called again after `stop`: the process, and its imports, stay."""

    def __init__(
        self, log: Path, environment: dict[str, str] | None = None, *, python: str | Path = sys.executable
    ) -> None:
        super().__init__([python, HERE / "serve.py"], log, environment)

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

    def close(self) -> None:
        """Has the engine shut down first."""
        self.end()
