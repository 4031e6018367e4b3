"""One arm of the bench: an engine as `vllm serve` runs it, and clients that hold long conversations with it.

Each conversation's history is computed first. Then every client takes the next conversation in turn, asks a question on
top of its history, and notes when the first and the last token come. Or questions arrive at a fixed rate on average,
whether or not earlier ones are answered. Questions and answers that become history are made from the seed, so that
every arm sees the same prompts.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import shapes
from ground import Orders

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


async def arriving(
    ask: Ask, prompts: list[list[int]], rate: float, answer: int, source: random.Random
) -> list[dict[str, Any]]:
    """So many prompts a second on average, at random times: their gaps are exponential."""
    asked: list[asyncio.Task[dict[str, Any]]] = []
    due = asyncio.get_running_loop().time()
    for prompt in prompts:
        due += source.expovariate(rate)
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        asked.append(asyncio.ensure_future(ask(prompt, answer)))
    return list(await asyncio.gather(*asked))


def note(what: str) -> None:
    """Progress, for the log."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def to_say(size: Any) -> dict[str, Any]:
    """What a `Talk` reads: how much, as a script's `size` has it."""
    return {
        "seed": "bench",
        "conversations": size.conversations,
        "shortest": size.shortest,
        "longest": size.longest,
        "vocabulary": shapes.SHAPES[size.shape]["vocab_size"],
        "new": size.new,
        "answer": size.answer,
        "rounds": size.rounds,
    }


def conversations(task: dict[str, Any]) -> Conversations:
    """Those of a task, which is what `to_say` gives."""
    return Conversations(task["seed"], task["conversations"], task["shortest"], task["longest"], task["vocabulary"])


class Talk:
    """Conversations of clients with an engine. All rounds of all loads go on with the same ones."""

    def __init__(self, ask: Ask, task: dict[str, Any]) -> None:
        """`task`: what `to_say` gives."""
        self._ask, self._task = ask, task
        self._talks = conversations(task)

    async def begin(self) -> None:
        answer = self._task["answer"]
        note("conversations begin")
        await in_turn(self._ask, self._talks.histories, 4, 1)
        note(f"{len(self._talks.histories)} histories are computed")
        # A turn for nobody's measurement: kernels compile, buffers are pinned.
        await in_turn(self._ask, self._turn(), 1, answer)
        note("a first turn is over")

    async def turns(self, clients: int) -> dict[str, Any]:
        """A turn of each conversation."""
        began = time.monotonic()
        turns = await in_turn(self._ask, self._turn(), clients, self._task["answer"])
        note(f"{len(turns)} turns of {clients} clients are over")
        return {"seconds": time.monotonic() - began, "turns": turns}

    async def arrivals(self, rate: float) -> dict[str, Any]:
        """As many turns of each conversation as there are rounds."""
        prompts = [prompt for _ in range(self._task["rounds"]) for prompt in self._turn()]
        began = time.monotonic()
        source = random.Random(f"{self._task['seed']} {rate}")
        turns = await arriving(self._ask, prompts, rate, self._task["answer"], source)
        note(f"{len(turns)} turns at {rate:g} a second are over")
        return {"seconds": time.monotonic() - began, "turns": turns}

    def _turn(self) -> list[list[int]]:
        return self._talks.turn(self._task["new"], self._task["answer"])


Step = tuple[str, str, dict[str, Any]]
"""A load, as tables have it, and the call of a `Talk` that is part of it."""


def steps(rounds: int, clients: list[int], rates: list[float]) -> list[Step]:
    """What is to be measured, in order."""
    closed = [(f"{count} client{'s' if count > 1 else ''}", "turns", {"clients": count}) for count in clients]
    arriving = [(f"{rate:g} turns a second", "arrivals", {"rate": rate}) for rate in rates]
    return [step for step in closed for _ in range(rounds)] + arriving


def add(rounds: dict[str, Any], load: str, part: dict[str, Any]) -> None:
    """Adds what was measured of a load."""
    before = rounds.setdefault(load, {"seconds": 0.0, "turns": []})
    before["seconds"] += part["seconds"]
    before["turns"] += part["turns"]


class Arm:
    """An engine, and what clients note of its answers."""

    def __init__(self, options: dict[str, Any], connector: dict[str, Any] | None) -> None:
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        self._requests = 0
        if connector:
            options = options | {"kv_transfer_config": KVTransferConfig(**connector)}
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def ask(self, prompt: list[int], answer: int) -> dict[str, Any]:
        from vllm import SamplingParams

        request = self._requests = self._requests + 1
        parameters = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        began, first, tokens, cached = time.perf_counter(), 0.0, 0, 0
        async for output in self._engine.generate({"prompt_token_ids": prompt}, parameters, request_id=str(request)):
            first = first or time.perf_counter() - began
            tokens, cached = len(output.outputs[0].token_ids), output.num_cached_tokens or 0
        last = time.perf_counter() - began
        return {
            "request": str(request),
            "began": began,
            "first_ms": 1e3 * first,
            "per_token_ms": 1e3 * (last - first) / max(1, tokens - 1),
            "prompt": len(prompt),
            "answered": tokens,
            "cached": cached,
        }


class Child:
    """The process of an arm."""

    async def start(self, options: dict[str, Any], connector: dict[str, Any] | None) -> None:
        self._arm = Arm(options, connector)

    async def begin(self, task: dict[str, Any]) -> None:
        self._talk = Talk(self._arm.ask, task)
        await self._talk.begin()

    async def turns(self, clients: int) -> dict[str, Any]:
        return await self._talk.turns(clients)

    async def arrivals(self, rate: float) -> dict[str, Any]:
        return await self._talk.arrivals(rate)


def main() -> None:
    orders = Orders()
    # It takes as long as starting an engine may. What is to be started may come later.
    import vllm.v1.engine.async_llm  # noqa: F401

    asyncio.run(orders.serve_async(Child()))


if __name__ == "__main__":
    main()
