"""An engine in a process of its own, driven by JSON lines: one command in, one answer out.

Step by step, so that a test decides what happens between two steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

if os.environ.get("SWIFTCACHE_TEST_FAKE"):
    import fake_native

    import swiftcache

    swiftcache._native = fake_native
    sys.modules["swiftcache._native"] = fake_native

lose: list[int] = []


def spoil_loads() -> None:
    """Lets a test have positions of the next load not be found, by asking for keys that nobody has."""
    from swiftcache.vllm import worker

    start = worker.WorkerSide.start_loads

    def start_loads(self: Any) -> None:
        if lose and self._step is not None:
            for job in self._step.loads:
                keys = bytearray(job.keys)
                for position in lose:
                    if position < len(job.blocks):
                        keys[16 * position : 16 * position + 16] = os.urandom(16)
                job.keys = bytes(keys)
            if self._step.loads:
                lose.clear()
        start(self)

    worker.WorkerSide.start_loads = start_loads


class Engine:
    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, options: dict[str, Any]) -> dict[str, Any]:
        from vllm import LLM

        began = time.monotonic()
        if options.get("kv_transfer_config"):
            from vllm.config import KVTransferConfig

            options["kv_transfer_config"] = KVTransferConfig(**options["kv_transfer_config"])
            spoil_loads()
        self.llm = LLM(**options)
        config = self.llm.llm_engine.vllm_config
        return {
            "seconds": time.monotonic() - began,
            "blocks": config.cache_config.num_gpu_blocks,
            "async_scheduling": config.scheduler_config.async_scheduling,
        }

    def stop(self) -> None:
        import gc

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()

    def add(self, name: str, tokens: list[int], max_tokens: int, salt: str | None = None) -> None:
        from vllm import SamplingParams

        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if salt:
            prompt["cache_salt"] = salt
        self.llm.llm_engine.add_request(
            name, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        )

    def step(self, count: int = 1) -> dict[str, Any]:
        """`count` steps, or fewer when nothing is left to do; 0: until nothing is."""
        done: dict[str, Any] = {}
        engine = self.llm.llm_engine
        taken = 0
        while engine.has_unfinished_requests() and (count == 0 or taken < count):
            taken += 1
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = {
                        "tokens": list(output.outputs[0].token_ids),
                        "cached": output.num_cached_tokens,
                        "reason": output.outputs[0].finish_reason,
                    }
        return {"finished": done, "left": engine.has_unfinished_requests()}

    def settle(self) -> None:
        """Steps until vLLM has let go of every finished request's blocks."""
        core = self.llm.llm_engine.engine_core.engine_core
        while core.scheduler.has_requests():
            self.llm.llm_engine.step()
            core.step_fn() if core.scheduler.has_requests() else None

    def reset(self) -> bool:
        self.settle()
        return bool(self.llm.reset_prefix_cache())

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    def lose(self, positions: list[int]) -> None:
        lose[:] = positions

    def _sides(self) -> tuple[Any, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        core = self.llm.llm_engine.engine_core.engine_core
        return core.scheduler.connector.scheduler, get_kv_transfer_group().worker

    def wait_open(self, seconds: float = 60) -> bool:
        return self._sides()[1]._cache.wait_open(seconds)

    def stats(self) -> dict[str, float]:
        return self._sides()[1]._cache.stats()

    def internals(self) -> dict[str, Any]:
        scheduler, worker = self._sides()
        return {
            "tracked": len(scheduler._tracked),
            "jobs": len(scheduler._jobs),
            "storing": len(worker._storing),
            "receiving": len(worker._receiving),
            "namespace": worker.namespace,
            "preempted": getattr(self, "preempted", 0),
        }


def main() -> None:
    engine = Engine()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            result = getattr(engine, command["do"])(**command.get("with", {}))
            answer = {"ok": result}
        except BaseException as reason:  # the test wants to hear of all
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(reason).__name__}: {reason}"}
        answers.write(json.dumps(answer) + "\n")
    if engine.llm is not None:
        engine.stop()


if __name__ == "__main__":
    main()
