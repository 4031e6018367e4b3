"""An engine in a process of its own, driven by JSON lines: one command in, one answer out.

Step by step, so that a test decides what happens between two steps. Several engines may be started one after the
other: only the first pays for imports.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "harness"))

from told import Orders

ORDERS = Orders()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import models  # noqa: E402
import rig  # noqa: E402
import states_on_cpu  # noqa: E402
from meter import Meter  # noqa: E402
from replay import Replay  # noqa: E402


class Spy:
    """Around a worker's cache: keeps stores, to wait until others can find them, and can have a load miss blocks."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._stores: list[Any] = []
        self.keeps = True
        """Keep them; else they are over when the engine says so."""
        self.lose: list[int] = []
        self.at_once = False
        """Stores end before the engine goes on."""
        self.repeat = False
        """Loads put the first block's bytes into all blocks. Another order would change nothing: attention sums over
        keys, which have their positions in them."""
        self.spoiled = 0
        self.half = False
        """Of every second load the second half is lost."""
        self.loads = 0
        self.slow = 0
        """Loads are over after so many steps and some more, each after others."""
        self.liar = False
        """Loads that fail say that they have not."""
        self.late = False
        """Loads begin when somebody waits for them."""
        self.victim = 0
        """A process that is killed before the next load begins."""
        self.claims = True
        """Whether anything can be claimed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def store(self, *arguments: Any) -> Any:
        store = self._cache.store(*arguments)
        if self.at_once:
            store.finish()
        if self.keeps:
            self._stores.append(store)
        return store

    def strike(self) -> None:
        """A load begins."""
        if self.victim:
            os.kill(self.victim, signal.SIGKILL)
            self.victim = 0

    def load(self, keys: bytes, blocks: list[int], after: Any = None) -> Any:
        self.strike()
        changed = bytearray(keys)
        for position in self.lose:
            if position < len(blocks):
                changed[16 * position : 16 * position + 16] = os.urandom(16)
                self.spoiled += 1
        self.lose = []
        self.loads += 1
        if self.half and self.loads % 2 == 0:
            for position in range(len(blocks) // 2, len(blocks)):
                changed[16 * position : 16 * position + 16] = os.urandom(16)
                self.spoiled += 1
        if self.late:
            return Late(lambda: self._cache.load(bytes(changed), blocks, after))
        load = self._cache.load(bytes(changed), blocks, after)
        if self.liar:
            load = Liar(load)
        if self.slow:
            load = Slow(load, self.slow + 3 * self.loads % 7)
        self.repeated(load, keys, blocks)
        return load

    def repeated(self, load: Any, keys: bytes, blocks: list[int]) -> None:
        """A load has begun, which may be the control's."""
        if self.repeat:
            load.finish()
            for block in blocks[1:]:
                self._cache.load(keys[:16], [block]).finish()

    def claim(self, keys: bytes, most_bytes: int) -> Any:
        # What is claimed cannot be made to fail.
        fails = self.half or self.slow or self.lose or self.liar
        claim = self._cache.claim(keys, most_bytes) if self.claims and not fails else None
        return Claimed(self, keys, claim) if claim is not None else None

    def flush(self) -> dict[str, int]:
        outcome: dict[str, int] = {}
        for store in self._stores:
            for name, count in store.finish().items():
                outcome[name] = outcome.get(name, 0) + count
        self._stores = []
        return outcome


class Claimed:
    """What was claimed through a spy."""

    def __init__(self, spy: Spy, keys: bytes, claim: Any) -> None:
        self._spy, self._keys, self._claim = spy, keys, claim

    def __len__(self) -> int:
        return len(self._claim)

    def load(self, blocks: list[int], after: Any = None) -> Any:
        self._spy.strike()
        if self._spy.late:
            return Late(lambda: self._claim.load(blocks, after))
        load = self._claim.load(blocks, after)
        self._spy.repeated(load, self._keys, blocks)
        return load


class Liar:
    """A load that has never failed."""

    def __init__(self, load: Any) -> None:
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load, name)

    def finish(self) -> list[int]:
        self._load.finish()
        return []


class Slow:
    """A load that takes so many steps. Every second one may count as over before."""

    def __init__(self, load: Any, steps: int) -> None:
        self._load, self._steps = load, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load, name)

    def promise(self, most_bytes: int) -> bool:
        return self._steps % 2 == 0 and self._load.promise(most_bytes)

    def is_done(self) -> bool:
        self._steps -= 1
        return self._steps < 0 and self._load.is_done()


class Late:
    """A load of which no byte is there before somebody waits for it, or asks whether it has kept its promise."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin, self._load, self._promised = begin, None, False

    def promise(self, most_bytes: int) -> bool:
        self._promised = True
        return True

    def is_done(self) -> bool:
        return self._promised and self._begun().is_done()

    def wait_layer(self, layer: int) -> list[int]:
        return self._begun().wait_layer(layer)

    def finish(self) -> list[int]:
        return self._begun().finish()

    def _begun(self) -> Any:
        self._load = self._load or self._begin()
        return self._load


def ours(connector: Any) -> Any:
    """SwiftCache's connector, which may be one of several."""
    children = getattr(connector, "sub_connectors", [connector])
    return next((child for child in children if type(child).__name__ == "SwiftCacheConnector"), None)


def _side(_: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return ours(get_kv_transfer_group()).worker


def install(worker: Any) -> None:
    side = _side(worker)
    if side._cache is not None and not isinstance(side._cache, Spy):
        side._cache = Spy(side._cache)


def leased(worker: Any) -> bool:
    return _side(worker)._cache.stats()["leases"] > 0


def flush(worker: Any) -> dict[str, int]:
    cache = _side(worker)._cache
    return cache.flush() if cache is not None else {}


def stats(worker: Any) -> dict[str, float]:
    return _side(worker)._cache.stats()


def lose(worker: Any, positions: list[int]) -> None:
    _side(worker)._cache.lose = positions


def halve(worker: Any, on: bool, slow: int, rank: int | None) -> None:
    side = _side(worker)
    if rank in (None, side._ranks.tp):
        side._cache.half, side._cache.slow = on, slow


def linger(worker: Any, on: bool, careless: bool) -> None:
    side = _side(worker)
    side._cache.late = on
    vars(side).pop("_wait_for_load", None)
    if careless:
        side._wait_for_load = lambda name, load: None


def claims(worker: Any, on: bool) -> None:
    _side(worker)._cache.claims = on


def most_beside(worker: Any, amount: int) -> None:
    from swiftcache.vllm import landing

    landing.MOST_BYTES = amount


def lie(worker: Any, on: bool) -> None:
    _side(worker)._cache.liar = on


def keep(worker: Any, on: bool) -> None:
    _side(worker)._cache.keeps = on


def ambush(worker: Any, victim: int) -> None:
    _side(worker)._cache.victim = victim


def deafen(worker: Any) -> None:
    side = _side(worker)
    side.weights_changed = lambda: None


def overwrite(worker: Any) -> None:
    """Fills the pool with what is no KV. Not with NaNs: those would stay, and be read with weight 0."""
    for tensors in _side(worker)._caches.values():
        for tensor in tensors if isinstance(tensors, (list, tuple)) else [tensors]:
            tensor.fill_(7.0)


def leave(worker: Any, rank: int) -> None:
    side = _side(worker)
    if side._ranks.tp == rank:
        side.unregister()


def at_once(worker: Any, on: bool) -> None:
    _side(worker)._cache.at_once = on


DECAYS = {"A_log": -4.0, "A": -0.02}
"""What a state forgets with each token, of GDN as a logarithm and of Mamba: little, so that a prefix is still in it."""


def enliven(worker: Any) -> None:
    """Gives a model of dummy weights random ones of a usual size. vLLM's dummy weights are so small, those of its norms
    too, that not a bit of the answer depends on the KV cache."""
    import torch

    parameters = list(worker.get_model().named_parameters())
    device = parameters[0][1].device
    source = torch.Generator(device).manual_seed(1)
    for name, parameter in parameters:
        if parameter.dim() > 1 or name.endswith("bias"):
            made = torch.randn(parameter.shape, generator=source, device=device) * 0.08
            parameter.data.copy_(made.to(parameter.dtype))
        else:
            parameter.data.fill_(DECAYS.get(name.rpartition(".")[2], 1.0))


def foresee(worker: Any, texts: list[list[int]]) -> None:
    def propose(count: int, sampled: list[list[int]], lengths: Any, tokens: Any, **_: Any) -> list[list[int]]:
        guesses = []
        for row, new in enumerate(sampled):
            had = tokens[row, : lengths[row]].tolist() if new else []
            text = next((text for text in texts if text[: len(had)] == had), [])
            guess = [*text[len(had) :], *[0] * count][:count] if new else []
            if (wrong := len(had) % 5) < len(guess):
                guess[wrong] ^= 1
            guesses.append(guess)
        return guesses

    worker.model_runner.drafter.propose = propose


def repeat(worker: Any, on: bool) -> None:
    _side(worker)._cache.repeat = on


def held(worker: Any) -> dict[str, Any]:
    side = _side(worker)
    return {
        "storing": len(side._storing),
        "receiving": len(side._receiving),
        "namespace": side.namespace,
        "spoiled": side._cache.spoiled,
        "claimed": side._landing.claimed if side._landing is not None else 0,
    }


def _logprob(one: Any) -> float:
    return one.logprob


class Engine:
    def __init__(self) -> None:
        self.llm: Any = None
        self.preemptions = 0
        self.replay: Replay | None = None
        self.meter = Meter()

    @property
    def _scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def _side(self) -> Any:
        return ours(self._scheduler.connector).scheduler

    def start(self, options: dict[str, Any]) -> dict[str, Any]:
        from vllm import LLM
        from vllm.config import KVEventsConfig, KVTransferConfig
        from vllm.platforms import current_platform

        self.stop()
        began = time.monotonic()
        metered = options.pop("metered", False)
        connector = options.pop("connector", None)
        if connector is not None:
            alone = {
                "kv_connector": "SwiftCacheConnector",
                "kv_connector_module_path": "swiftcache.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": connector,
            }
            options["kv_transfer_config"] = KVTransferConfig(**alone)
        if (beside := options.pop("beside", None)) is not None:
            first = {"kv_connector": "OtherConnector", "kv_connector_module_path": "beside", "kv_role": "kv_both"}
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="MultiConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"connectors": [first, alone]},
                **beside,
            )
        if (below := options.pop("below", None)) is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="MultiConnector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"connectors": [alone, below]},
            )
        if other := options.pop("other_connector", None):
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector=other["kv_connector"],
                kv_role="kv_both",
                kv_connector_extra_config={"shared_storage_path": other["path"]},
            )
        if options.pop("events", False):
            options["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        # vLLM's old variable would win over the option.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        if "kv_cache_memory_bytes" in options:
            del os.environ["VLLM_CPU_KVCACHE_SPACE"]
        # Once in a process is enough, and before numba comes, as with speculation or LMCache: vLLM 0.32 fails then.
        current_platform.register_triton_kernel_overrides()
        if current_platform.is_cpu():
            states_on_cpu.register()
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda _: None)
        self.llm = LLM(**options)
        self.preemptions = 0
        preempt = self._scheduler._preempt_request

        def counted(*arguments: Any, **named: Any) -> None:
            self.preemptions += 1
            preempt(*arguments, **named)

        self._scheduler._preempt_request = counted
        if self._scheduler.connector is not None and metered:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            self.meter.around(self._scheduler.connector)
            self.meter.around(get_kv_transfer_group())
        if connector is not None:
            self.llm.collective_rpc(install)
            replay = self.replay = Replay(self._key)
            take = self._scheduler.connector.take_events

            def recorded() -> list[Any]:
                events = list(take())
                replay.hear(events)
                return events

            self._scheduler.connector.take_events = recorded
        config = self.llm.llm_engine.vllm_config
        return {
            "seconds": time.monotonic() - began,
            "blocks": config.cache_config.num_gpu_blocks,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "policy": config.kv_transfer_config.kv_load_failure_policy if connector is not None else None,
        }

    def stop(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()

    def add(
        self,
        name: str,
        tokens: list[int],
        max_tokens: int,
        salt: str | None = None,
        logprobs: bool = False,
        n: int = 1,
        prompt_logprobs: bool = False,
        priority: int = 0,
        adapter: dict[str, Any] | None = None,
        picture: int | None = None,
    ) -> None:
        """`n`: so many answers. `adapter`: fields of a LoRARequest. `picture`: the seed of an image."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if salt:
            prompt["cache_salt"] = salt
        if picture is not None:
            prompt["multi_modal_data"] = {"image": models.picture(picture)}
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0 if prompt_logprobs else None,
        )
        if logprobs:
            parameters.logprobs = 1
        if n > 1:
            # vLLM refuses several greedy answers; the likeliest token alone is as greedy.
            parameters = SamplingParams(
                n=n,
                temperature=1.0,
                top_k=1,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        lora = LoRARequest(**adapter) if adapter is not None else None
        self.llm.llm_engine.add_request(name, prompt, parameters, lora_request=lora, priority=priority)

    def step(self, count: int = 0) -> dict[str, Any]:
        """`count` steps, or fewer when nothing is left to do; 0: until nothing is."""
        done: dict[str, Any] = {}
        engine, taken, seconds, hooks = self.llm.llm_engine, 0, [], []
        while engine.has_unfinished_requests() and (count == 0 or taken < count):
            taken += 1
            began, hooked = time.perf_counter(), self.meter.seconds
            outputs = engine.step()
            seconds.append(time.perf_counter() - began)
            hooks.append(self.meter.seconds - hooked)
            for output in outputs:
                if output.finished:
                    done[output.request_id] = {
                        "tokens": list(output.outputs[0].token_ids),
                        "cached": output.num_cached_tokens,
                        "reason": output.outputs[0].finish_reason,
                        "steps": taken,
                        "others": [list(other.token_ids) for other in output.outputs[1:]],
                    }
                    if (of := output.outputs[0].logprobs) is not None:
                        done[output.request_id]["logprobs"] = [max(at.values(), key=_logprob).logprob for at in of]
                    if (of := output.prompt_logprobs) is not None:
                        # Of the tokens that are there; the first has none.
                        there = zip(of, output.prompt_token_ids, strict=True)
                        done[output.request_id]["prompt"] = [at[token].logprob for at, token in there if at]
        return {"finished": done, "left": engine.has_unfinished_requests(), "seconds": seconds, "hooks": hooks}

    def settle(self) -> dict[str, int]:
        """Until vLLM has let go of all blocks, and what was stored can be found by others."""
        while self._scheduler.has_requests():
            self.llm.llm_engine.step()
        if ours(self._scheduler.connector) is None:
            return {}
        total: dict[str, int] = {}
        for outcome in self.llm.collective_rpc(flush):
            for name, count in outcome.items():
                total[name] = total.get(name, 0) + count
        return total

    def reset(self, connector: bool = False) -> bool:
        """Forgets vLLM's own prefix cache."""
        self.settle()
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    def lose(self, positions: list[int]) -> None:
        self.llm.collective_rpc(lose, args=(positions,))

    def halve(self, on: bool, slow: int = 0, rank: int | None = None) -> None:
        """Has half of the loads fail from now on, and all take so many steps and some more; of one rank, or of all."""
        self.llm.collective_rpc(halve, args=(on, slow, rank))

    def linger(self, on: bool, careless: bool = False) -> None:
        """Whether loads begin when somebody waits for them. `careless`: forwards do not."""
        self.llm.collective_rpc(linger, args=(on, careless))

    def claims(self, on: bool) -> None:
        """Whether prefixes may be claimed. Else loads are asynchronous, as where scheduler and worker are two
        processes."""
        self.llm.collective_rpc(claims, args=(on,))

    def most_beside(self, amount: int) -> None:
        """So many bytes of a load may have others wait for them."""
        self.llm.collective_rpc(most_beside, args=(amount,))

    def lie(self, on: bool) -> None:
        """Whether loads that fail say so."""
        self.llm.collective_rpc(lie, args=(on,))

    def ambush(self, victim: int) -> None:
        """Has a process killed when the next load begins: after the lookup."""
        self.llm.collective_rpc(ambush, args=(victim,))

    def update_weights(self, path: str) -> None:
        """As a trainer does: other weights in place, by vLLM's own call."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    def deafen(self) -> None:
        """Has workers not notice that their weights are updated from now on."""
        self.llm.collective_rpc(deafen)

    def sleep(self, level: int) -> None:
        self.llm.sleep(level=level)

    def wake(self) -> None:
        self.llm.wake_up()
        # Workers whose pool was away have another cache.
        self.llm.collective_rpc(install)

    def keep_stores(self, on: bool) -> None:
        """Whether stores are kept until `settle`, so that what they have stored can be found by others then."""
        self.llm.collective_rpc(keep, args=(on,))

    def foresee(self, texts: list[list[int]]) -> None:
        """Where n-grams are guessed: has the guesses come from these texts, prompts and answers, some of them wrong."""
        self.llm.collective_rpc(foresee, args=(texts,))

    def at_once(self, on: bool) -> None:
        """Whether stores end before the engine goes on."""
        self.llm.collective_rpc(at_once, args=(on,))

    def counted(self) -> dict[str, float]:
        """What the engine's /metrics say of SwiftCache."""
        return {of.name: of.value for of in self.llm.get_metrics() if "swiftcache" in of.name}

    def overwrite(self) -> None:
        """Forgets vLLM's own prefix cache, and overwrites the pool."""
        assert self.reset()
        self.llm.collective_rpc(overwrite)

    def crowd(self, on: bool) -> None:
        """Whether every load is promised, whatever others need that wait with theirs."""
        room = self._side._room
        vars(room).pop("allows", None)
        if on:
            room.allows = lambda *arguments: True

    def enliven(self) -> None:
        self.llm.collective_rpc(enliven)

    def repeat(self, on: bool) -> None:
        self.llm.collective_rpc(repeat, args=(on,))

    def leave(self, rank: int) -> None:
        """Has one rank let go of its pool."""
        self.llm.collective_rpc(leave, args=(rank,))

    def leased(self) -> bool:
        """Whether every worker has room, and the scheduler a broker to ask."""
        connected = self._side._connection.is_connected()
        return connected and all(self.llm.collective_rpc(leased))

    def stats(self) -> dict[str, float]:
        """Over all workers."""
        total: dict[str, float] = {}
        for one in self.llm.collective_rpc(stats):
            for name, value in one.items():
                total[name] = total.get(name, 0) + value
        return total

    def held(self) -> dict[str, Any]:
        scheduler = self._side
        return {
            "workers": self.llm.collective_rpc(held),
            "tracked": len(scheduler._tracked),
            "jobs": len(scheduler._jobs),
            "preemptions": self.preemptions,
        }

    def loans(self) -> dict[str, int]:
        """Runs of the engine's own pool that are lent, and blocks that requests can have."""
        loans = self._side._loans
        lent, returning = loans.out()
        return {"lent": len(lent), "returning": len(returning), "free": loans.free}

    def grab(self) -> None:
        """From now on blocks that are asked back count as back at once, as if nobody had to let go of them first."""
        loans = self._side._loans
        step = loans.step

        def impatient(*arguments: Any) -> Any:
            orders = step(*arguments)
            loans.heard(dict.fromkeys(orders.take_back, 1), "", arguments[-1])
            return orders

        loans.step = impatient

    def stitched(self) -> list[dict[str, Any]]:
        """Of each worker's stitched pool: where its units are, what it has done, and how often windows were used."""
        return self.llm.collective_rpc(rig.look)

    def patience(self, seconds: float) -> None:
        """How long engines that are started from now on wait for leases of a stitched pool."""
        from swiftcache.vllm.stream import pool

        pool.PATIENCE_SECONDS = seconds

    def rig(self, **how: Any) -> None:
        """Does something to the workers' stitched pools; see `rig`."""
        self.llm.collective_rpc(rig.do, kwargs=how)

    def order(self, **orders: Any) -> None:
        """What the connector beside SwiftCache is to do."""
        import beside

        for name, value in orders.items():
            setattr(beside.orders, name, value)

    def greeted(self) -> list[str]:
        """What vLLM has passed on to the connector beside SwiftCache, of its own workers' handshakes."""
        import beside

        return [type(greeting).__name__ for greeting in beside.greeted]

    def below(self) -> dict[str, int]:
        """What the store below SwiftCache has done."""
        import below

        return dict(below.counts)

    def metrics(self) -> list[str]:
        """The names of vLLM's metrics that have counted something."""
        found = self.llm.get_metrics()
        return sorted({one.name for one in found if getattr(one, "value", 0) or getattr(one, "count", 0)})

    def believe(self, believes: bool) -> None:
        """Whether SwiftCache takes every load of other connectors for good from now on. What it stores then it stores
        before the engine computes it again."""
        side = self._side
        self.at_once(believes)
        if not believes:
            del side.metadata, side.allocated
            return
        metadata, allocated = side.metadata, side.allocated

        def stepped(output: Any) -> Any:
            return metadata(dataclasses.replace(output, has_sync_kv_loads=False))

        def given(request: Any, *arguments: Any) -> None:
            allocated(request, *arguments)
            side._tracked[request.request_id].waiting = False

        side.metadata, side.allocated = stepped, given

    def _key(self, name: bytes, group: int | None) -> bytes:
        finder = self._side._finder
        groups = finder._groups
        [of] = [one for one in groups.all if group in (None, one.number)]
        return finder._key.of([name], groups.salt(of))

    def events(self) -> dict[str, Any]:
        """What a router makes of vLLM's events, those that its next step would publish among them."""
        self._scheduler.connector.take_events()
        replay = self.replay
        return {
            "kinds": replay.kinds,
            "known": sorted(replay.known),
            "deaf": sorted(replay.deaf),
            "wrong": replay.wrong,
        }


def main() -> None:
    engine = Engine()
    ORDERS.serve(engine)
    engine.stop()


if __name__ == "__main__":
    main()
