"""One arm of the bench: an engine as `vllm serve` runs it, and clients that hold long conversations with it.

Reads a JSON object from standard input, prints one to the file that it names. Each conversation's history is computed
first. Then every client takes the next conversation in turn, asks a question on top of its history, and notes when the
first and the last token come. Questions and answers that become history are made from the seed, so that every arm sees
the same prompts.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Ask = Callable[[list[int], int], Awaitable[dict[str, Any]]]
"""Has an engine answer a prompt with so many tokens, and says how that went."""


class Conversations:
    def __init__(self, seed: str, count: int, shortest: int, longest: int, vocabulary: int) -> None:
        self._source = random.Random(seed)
        self._vocabulary = vocabulary
        self.histories = [self._tokens(self._source.randint(shortest, longest)) for _ in range(count)]

    def _tokens(self, count: int) -> list[int]:
        return [self._source.randrange(self._vocabulary) for _ in range(count)]

    def turn(self, new: int, answer: int) -> list[list[int]]:
        """The prompts of a round, one for each conversation. They and made-up answers are its history afterwards."""
        prompts = [history + self._tokens(new) for history in self.histories]
        self.histories = [prompt + self._tokens(answer) for prompt in prompts]
        return prompts


async def in_turn(ask: Ask, prompts: list[list[int]], clients: int, answer: int) -> list[dict[str, Any]]:
    """Each client takes the next prompt when it has its answer."""
    waiting = iter(prompts)
    done: list[dict[str, Any]] = []

    async def client() -> None:
        for prompt in waiting:
            done.append(await ask(prompt, answer))

    await asyncio.gather(*(client() for _ in range(clients)))
    return done


async def converse(ask: Ask, task: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Rounds of conversations, by the number of clients."""
    talks = Conversations(task["seed"], task["conversations"], task["shortest"], task["longest"], task["vocabulary"])
    await in_turn(ask, talks.histories, 4, 1)
    # A turn for nobody's measurement: kernels compile, buffers are pinned.
    await in_turn(ask, talks.turn(task["new"], task["answer"]), 1, task["answer"])
    rounds = {}
    for clients in task["clients"]:
        turns: list[dict[str, Any]] = []
        began = time.monotonic()
        for _ in range(task["rounds"]):
            turns += await in_turn(ask, talks.turn(task["new"], task["answer"]), clients, task["answer"])
        rounds[clients] = {"seconds": time.monotonic() - began, "turns": turns}
    return rounds


class Arm:
    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self._requests = 0

    async def run(self) -> dict[str, Any]:
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        task = self._task
        options = dict(task["options"])
        if task["connector"]:
            options["kv_transfer_config"] = KVTransferConfig(**task["connector"])
        began = time.monotonic()
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        started = time.monotonic() - began
        try:
            return {"started": started, "rounds": await converse(self._ask, task)}
        finally:
            self._engine.shutdown()

    async def _ask(self, prompt: list[int], answer: int) -> dict[str, Any]:
        from vllm import SamplingParams

        self._requests += 1
        parameters = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        began, first, tokens, cached = time.perf_counter(), 0.0, 0, 0
        async for output in self._engine.generate(
            {"prompt_token_ids": prompt}, parameters, request_id=str(self._requests)
        ):
            first = first or time.perf_counter() - began
            tokens, cached = len(output.outputs[0].token_ids), output.num_cached_tokens or 0
        last = time.perf_counter() - began
        return {
            "first_ms": 1e3 * first,
            "per_token_ms": 1e3 * (last - first) / max(1, tokens - 1),
            "prompt": len(prompt),
            "cached": cached,
        }


def main() -> None:
    task = json.load(sys.stdin)
    result = asyncio.run(Arm(task).run())
    Path(task["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
