"""SGLang engines behind a socket: for each connection an engine; a line of JSON in, a line of JSON out.

The process imports SGLang once. Each engine is a child that it forks, and so are the engine's own processes: they need
not import it again. That is not how SGLang starts its processes; the engine itself is as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

DOORS = "SWIFTCACHE_TEST_DOORS"


class Driver:
    """One engine."""

    def __init__(self, options: dict[str, Any], doors: str) -> None:
        import sglang

        os.environ[DOORS] = doors
        metrics = Path(doors).with_suffix(".metrics")
        metrics.mkdir()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
        self._engine = sglang.Engine(**options)
        self._engine.loop.set_exception_handler(lambda loop, context: None)

    def do_generate(
        self, *, prompts: dict[str, list[int]], abort: dict[str, int] | None = None, at_once: bool = True, **way: Any
    ) -> dict[str, Any]:
        """`abort`: which requests are aborted once they have said so many tokens."""
        return self._engine.loop.run_until_complete(self._all(prompts, abort or {}, at_once, way))

    async def _all(
        self, prompts: dict[str, list[int]], abort: dict[str, int], at_once: bool, way: dict[str, Any]
    ) -> dict[str, Any]:
        one = [self._one(name, tokens, abort.get(name), **way) for name, tokens in prompts.items()]
        answers = await asyncio.gather(*one) if at_once else [await each for each in one]
        return dict(zip(prompts, answers, strict=True))

    async def _one(
        self,
        name: str,
        tokens: list[int],
        abort: int | None,
        *,
        max_tokens: int,
        salt: str | None = None,
        lora: str | None = None,
    ) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        more: dict[str, Any] = {"lora_path": lora} if lora else {}
        if salt is not None:
            more["cache_salt"] = salt
        rid = f"{name}-{os.urandom(4).hex()}"
        said: dict[str, Any] = {"tokens": [], "cached": 0, "finish": None}
        if abort == 0:
            self._engine.loop.call_soon(self._engine.tokenizer_manager.abort_request, rid)
        try:
            stream = await self._engine.async_generate(
                input_ids=tokens, sampling_params=sampling, rid=rid, stream=abort is not None, **more
            )
            if abort is None:
                return _said(stream)
            async for part in stream:
                said = _said(part)
                if len(said["tokens"]) >= abort:
                    self._engine.tokenizer_manager.abort_request(rid)
        except Exception as reason:
            said["finish"] = {"type": "error", "message": str(reason)}
        return said

    def do_flush(self) -> bool:
        return bool(self._engine.flush_cache().success)

    def do_reload(self, model: str, flush: bool = True) -> bool:
        """New weights from a directory."""
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        wanted = UpdateWeightFromDiskReqInput(model_path=model, flush_cache=flush)
        done = self._engine.loop.run_until_complete(
            self._engine.tokenizer_manager.update_weights_from_disk(wanted, None)
        )
        return bool(done[0])

    def do_metrics(self) -> str:
        from prometheus_client import CollectorRegistry, generate_latest, multiprocess

        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry).decode()

    def do_stop(self) -> None:
        self._engine.shutdown()


def _said(output: dict[str, Any]) -> dict[str, Any]:
    meta = output["meta_info"]
    return {
        "tokens": output["output_ids"],
        "cached": meta.get("cached_tokens", 0),
        "details": meta.get("cached_tokens_details"),
        "finish": meta.get("finish_reason"),
    }


def engine(line: socket.socket) -> None:
    """The child: one engine's life."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    driver: Driver | None = None
    with line, line.makefile("rw") as lines:
        for asked in map(json.loads, lines):
            try:
                if asked["do"] == "start":
                    told = asked["with"]
                    _write_to(told["log"])
                    os.environ.update(told["environment"])
                    driver = Driver(told["options"], told["doors"])
                    answer = {"ok": {"pid": os.getpid()}}
                else:
                    answer = {"ok": getattr(driver, f"do_{asked['do']}")(**asked["with"])}
            except BaseException as reason:
                traceback.print_exc()
                answer = {"error": str(reason) or repr(reason)}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    # Nothing of an engine outlives it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(0, signal.SIGKILL)


def _write_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def main() -> None:
    address = Path(sys.argv[1])
    import sglang.srt.entrypoints.engine
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    multiprocessing.set_start_method("fork", force=True)
    # SGLang would set it to "spawn".
    multiprocessing.set_start_method = lambda *_, **__: None
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(address))
    listening.listen()
    while True:
        line, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            engine(line)
        line.close()


if __name__ == "__main__":
    main()
