"""The linker with a door: tests ask a rank what it has done, and have its loads fail."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from swiftcache.sglang import linker

DOORS = "SWIFTCACHE_TEST_DOORS"
"""The directory of the doors' sockets."""


class ProbedLinker(linker.SwiftCacheLinker):
    def __init__(self, server_args: Any, params: Any, **more: Any) -> None:
        self.refusals_wanted, self.refused_here = 0, 0
        self._may_load = threading.Event()
        self._may_load.set()
        self.waiting = False
        self.known: dict[str, Any] = {}
        facts, linker.facts = linker.facts, self._keep(linker.facts)
        super().__init__(server_args, params, **more)
        linker.facts = facts
        door = Path(os.environ[DOORS]) / f"{os.getpid()}.sock"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(door))
        listening.listen()
        threading.Thread(target=self._answer, args=(listening,), daemon=True).start()

    def _keep(self, facts: Any) -> Any:
        def kept(*arguments: Any, **named: Any) -> dict[str, Any]:
            known = facts(*arguments, **named)
            self.known = json.loads(json.dumps(known, default=str))
            return known

        return kept

    def _start(self, rid: str, transfer: Any) -> Any:
        if self.refusals_wanted > 0:
            self.refusals_wanted -= 1
            self.refused_here += 1
            return None
        self.waiting = True
        self._may_load.wait()
        self.waiting = False
        return super()._start(rid, transfer)

    def _answer(self, listening: socket.socket) -> None:
        while True:
            caller, _ = listening.accept()
            with caller, caller.makefile("rw") as lines:
                asked = json.loads(lines.readline())
                try:
                    answer = {"ok": getattr(self, f"_do_{asked['do']}")(**asked.get("with", {}))}
                except Exception as reason:
                    answer = {"error": repr(reason)}
                lines.write(json.dumps(answer) + "\n")

    def _do_stats(self) -> dict[str, Any]:
        self._show(True)
        return {
            "rank": self._cache_rank(),
            "counts": self._shown.counts,
            "native": self._cache.stats(),
            "problem": self._cache.problem(),
            "held": len(self._hits),
            "queued": len(self._queued),
            "offloads": self._offloads.done,
            "proven": self.layer_done_counter.proven,
            "refused_here": self.refused_here,
            "waiting": self.waiting,
            "facts": self.known,
        }

    def _cache_rank(self) -> int:
        import torch.distributed as dist

        return dist.get_rank(self._groups[0]) if self._groups else 0

    def _do_refuse(self, loads: int) -> None:
        self.refusals_wanted = loads

    def _do_hold(self) -> None:
        """Loads wait, with the blocks that were found for them, until they may go on."""
        self._may_load.clear()

    def _do_go_on(self) -> None:
        self._may_load.set()
