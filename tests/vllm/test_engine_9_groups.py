"""Models of several KV cache groups: windows, chunks and state beside full attention. One life of an engine for each:
the same tokens as with vLLM's own caching, whatever happens to loads. Tests run in the order of this file.
"""

from __future__ import annotations

import random

import lab as of
import pytest
from donors import corrupt
from models import VOCABULARY
from neighbours import Tenant, donate
from node import eventually

TINY = {"num_gpu_blocks_override": 80, "max_model_len": 1024}
STEPS = 300
"""Many times what three requests take."""


@pytest.fixture(scope="module")
def broker(node):
    node.start_broker()
    return node


@pytest.fixture(scope="module", params=["gemma3", "gptoss", "llama4", "qwen3next"])
def model(request):
    return request.param


def crowd(engine, answer: int = 220) -> dict[str, dict]:
    """More than a tiny pool holds at once: requests lose their blocks while they decode."""
    prompts = {
        f"crowd-{number}": of.tokens(f"crowd-{number % 3}", 128) + of.tokens(f"c{number}", 40 + 11 * number % 60)
        for number in range(12)
    }
    return engine.generate(prompts, answer)


def short_crowd(engine) -> dict[str, dict]:
    return crowd(engine, 40)


@pytest.mark.parametrize("name", ["gemma3", "gptoss"])
def test_a_pool_that_is_too_small(lab, broker, name) -> None:
    """Requests are preempted, come back, and load. At last half of the loads fail, each after others were scheduled."""
    donor = donate(broker, slabs=32)
    want = lab.want("b", crowd, model=name, **TINY)
    engine = lab.engine("b")
    of.connect(engine, broker, model=name, **TINY)
    for half in (False, False, True):
        engine.ask("halve", on=half, slow=3)
        of.matching(want, lambda: preempted(engine, crowd))
        assert nothing_held(engine)
    assert engine.ask("held")["workers"][0]["spoiled"] > 0
    if name == "gemma3":
        nobody_holds_what_another_needs(engine)
    engine.ask("stop")
    donor.kill()
    donor.wait()


def preempted(engine, work) -> dict[str, dict]:
    """What is answered when all is loaded and some requests are preempted."""
    engine.ask("overwrite")
    before = engine.ask("held")["preemptions"]
    results = work(engine)
    assert engine.ask("held")["preemptions"] > before
    return results


def test_a_pool_that_is_too_small_for_states(lab, broker) -> None:
    """vLLM's CPU kernels of GDN compute in bf16, where a token follows now and then when a request is computed in other
    parts: without SwiftCache, too. With wrong bytes most requests say something else."""
    tiny = {"num_gpu_blocks_override": 50, "max_model_len": 1024}
    donor = donate(broker, slabs=32)
    want = lab.want("b", short_crowd, model="qwen3next", **tiny)
    engine = lab.engine("b")
    of.connect(engine, broker, model="qwen3next", **tiny)

    def others() -> int:
        """Requests that say something else."""
        return sum(tokens != want[name] for name, tokens in of.said(preempted(engine, short_crowd)).items())

    others()
    for half in (False, True):
        engine.ask("halve", on=half, slow=3)
        assert others() <= len(want) // 2
        assert nothing_held(engine)
    assert engine.ask("held")["workers"][0]["spoiled"] > 0
    engine.ask("halve", on=False)
    engine.ask("repeat", on=True)
    assert others() > len(want) * 3 // 4, "with the first block's bytes in all that are loaded"
    engine.ask("stop")
    donor.kill()
    donor.wait()


def speculating(engine) -> dict[str, dict]:
    """Prompts that repeat themselves, so that there is something to guess, of several windows."""
    prompts = {
        f"guess-{number}": of.tokens(f"guess-{number}", 24) * 7 + of.tokens(f"guess-end-{number}", 3 + number)
        for number in range(3)
    }
    return engine.generate(prompts, 40) | engine.generate(of.shared_prefix(), of.ANSWER)


def speculating_at_length(engine) -> dict[str, dict]:
    """One after the other. An EAGLE head beside layers with state, whose pages are large, has 512 tokens in one."""
    prompts = {f"long-{number}": of.tokens("long", 1060) + of.tokens(number, 50 + 20 * number) for number in range(3)}
    return {name: engine.generate({name: prompt}, 40)[name] for name, prompt in prompts.items()}


@pytest.mark.parametrize(
    "name, how, work",
    [
        ("gemma3", "ngram", speculating),
        ("gptoss", "eagle", speculating),
        ("qwen3next", "eagle", speculating_at_length),
        ("qwen3next-mtp", "mtp", speculating_at_length),
    ],
    ids=["gemma3", "gptoss", "qwen3next", "qwen3next-mtp"],
)
def test_guesses(lab, broker, name, how, work) -> None:
    """Tokens that are guessed and taken back leave nothing wrong in what is kept of any group."""
    options = of.guessing(how) | {"max_model_len": 2048}
    donor = donate(broker, slabs=32)
    want = lab.want("b", work, model=name, **options)
    engine = lab.engine("b")
    of.connect(engine, broker, model=name, **options)
    of.matching(want, lambda: work(engine))

    def warm() -> dict[str, dict]:
        engine.ask("overwrite")
        return work(engine)

    results = of.matching(want, warm)
    assert of.cached(results) >= len(want) * 200 // of.BLOCK // 2 * of.BLOCK
    engine.ask("halve", on=True)
    of.matching(want, warm)
    assert engine.ask("held")["workers"][0]["spoiled"] > 0
    assert nothing_held(engine)
    # The twin: the first block's bytes in all that are loaded.
    engine.ask("halve", on=False)
    engine.ask("repeat", on=True)
    assert of.said(warm()) != want
    engine.ask("stop")
    donor.kill()
    donor.wait()


GOES_ON = "-on"


def opening(number: int) -> list[int]:
    """Has every token, so that there is something to guess in every step: vLLM's CPU kernels of GDN need as many
    guesses in a step as were right in the one before."""
    every = random.Random("every").sample(range(VOCABULARY), VOCABULARY)
    return every + of.tokens(number, 40 + 17 * number)


def on_and_on(engine, between=lambda: None) -> dict[str, dict]:
    """Conversations of two turns."""
    said: dict[str, dict] = {}
    for number in range(3):
        name = f"talk-{number}"
        said |= engine.generate({name: opening(number)}, 40)
        between()
        said |= engine.generate({name + GOES_ON: opening(number) + said[name]["tokens"] + of.tokens(name, 9)}, 40)
    return said


def test_guesses_where_layers_keep_state(lab, broker) -> None:
    """Each guess has a state of its own, and vLLM moves the right one to its place after the forward. Prefixes end in
    the middle of answers here, so that there are such."""
    options = of.guessing("ngram") | {"max_model_len": 1024, "prefix_cache_retention_interval": of.BLOCK}
    donor = donate(broker, slabs=32)
    want = lab.want("b", on_and_on, model="qwen3next", **options)
    engine = lab.engine("b")
    of.connect(engine, broker, model="qwen3next", **options)
    # What vLLM moved later than that would be missing in what is kept.
    engine.ask("at_once", on=True)
    texts = []
    for number in range(3):
        first = opening(number) + want[f"talk-{number}"]
        texts += [first, first + of.tokens(f"talk-{number}", 9) + want[f"talk-{number}{GOES_ON}"]]
    engine.ask("foresee", texts=texts)

    def loaded() -> dict[str, dict]:
        return on_and_on(engine, lambda: engine.ask("overwrite"))

    results = of.matching(want, loaded)
    assert sum(result["steps"] for result in results.values()) < 35 * len(results), "guesses are right"
    found = [results[f"talk-{number}{GOES_ON}"]["cached"] > len(opening(number)) for number in range(3)]
    assert any(found), "an answer's state is used"
    engine.ask("halve", on=True)
    engine.ask("overwrite")
    # What is computed in place of a lost answer is rounded in another way.
    first = {name: tokens for name, tokens in of.said(loaded()).items() if not name.endswith(GOES_ON)}
    assert first.items() <= want.items()
    assert engine.ask("held")["workers"][0]["spoiled"] > 0
    assert nothing_held(engine)
    engine.ask("halve", on=False)
    engine.ask("repeat", on=True)
    assert of.said(loaded()) != want, "with the first block's bytes in all that are loaded"
    engine.ask("stop")
    donor.kill()
    donor.wait()


def nobody_holds_what_another_needs(engine) -> None:
    """Three prefixes fill the pool but for two blocks, and the first request needs three more: one of each group."""
    prompts = {f"wide-{length}": of.tokens(length, length) for length in (825, 700, 634)}
    for name, prompt in prompts.items():
        engine.generate({name: prompt}, 1)
    for crowded in (False, True):
        engine.ask("overwrite")
        engine.ask("halve", on=False, slow=3)
        engine.ask("crowd", on=crowded)
        for name, prompt in prompts.items():
            engine.ask("add", name=f"{name}-{crowded}", tokens=prompt, max_tokens=4)
        results = engine.ask("step", count=STEPS)
        assert (results["left"], len(results["finished"])) == ((True, 0) if crowded else (False, 3))
        assert (
            crowded
            or of.cached(results["finished"]) == sum((len(one) - 1) // of.BLOCK for one in prompts.values()) * of.BLOCK
        )
    for name in prompts:
        engine.ask("abort", name=f"{name}-True")
    engine.ask("crowd", on=False)
    assert nothing_held(engine)


@pytest.mark.parametrize("name", ["gemma3", "qwen3next-pair"])
def test_one_of_two_ranks_fails(lab, broker, name) -> None:
    donor = donate(broker, slabs=32)
    want = lab.want("b", model=name, **of.RANKS)
    engine = lab.engine("b")
    of.connect(engine, broker, model=name, **of.RANKS)
    matches(name, engine, want)
    engine.ask("halve", on=True, rank=1)
    matches(name, engine, want)
    engine.ask("halve", on=False)
    assert [worker["spoiled"] > 0 for worker in engine.ask("held")["workers"]] == [False, True]
    assert nothing_held(engine)
    results = matches(name, engine, want)
    assert of.cached(results) // of.BLOCK == full()
    engine.ask("stop")
    donor.kill()
    donor.wait()


def matches(name: str, engine, want) -> dict[str, dict]:
    """Everything comes from the store and says what it should."""
    if not name.startswith("qwen3next"):
        return of.matching(want, lambda: from_the_store(engine))
    results = from_the_store(engine)
    nearly_right(name, results, want)
    return results


def nearly_right(name: str, results, want) -> None:
    """In bf16, where vLLM computes GDN, a token follows now and then when a request is computed in other parts or
    company, on some CPUs always."""
    said = of.said(results)
    may_differ = len(want) // 4 if name.startswith("qwen3next") else 0
    assert sum(said[one] != want[one] for one in want) <= may_differ


@pytest.mark.parametrize("name", ["gemma3", "qwen3next"])
def test_an_idle_engine_lends_and_takes_everything_back(lab, broker, name) -> None:
    """Half of its pool, while it computes little; then more comes than the pool holds."""
    long = {"max_model_len": 2048}
    want = lab.want("b", talk_then_burst, model=name, **long)
    engine = lab.engine("b")
    lending = {"lend": 0.5, "lend_after_ms": 0, "lend_drain_ms": 500, "device": "SIM-1", "max_leased_bytes": 0}
    of.connect(engine, broker, wait=False, model=name, connector=lending, **long)
    for _ in range(2):

        def lent() -> bool:
            engine.ask("settle")
            loans = engine.ask("loans")
            if loans["lent"] and not loans["returning"] and engine.ask("stats")["lent_bytes"]:
                return True
            # A request has it look again.
            engine.generate({"nudge": of.tokens("nudge", 40)}, 2)
            return False

        eventually("everything to be lent", lent)
        tenant = Tenant(broker)
        assert tenant.leased > 0
        results = talk_then_burst(engine)
        assert engine.ask("stats")["give_back_count"] > 0
        nearly_right(name, results, want)
        tenant.kill()
    assert nothing_held(engine)
    engine.ask("stop")


def talk_then_burst(engine) -> dict[str, dict]:
    results = engine.generate({f"small-{number}": of.tokens(f"small-{number}", 150) for number in range(2)}, of.ANSWER)
    burst = {f"burst-{number}": of.tokens(f"burst-{number}", 29 * of.BLOCK) for number in range(12)}
    return results | engine.generate(burst, 4)


def test_hits_are_whole_blocks_where_vllm_finds_parts(lab, broker) -> None:
    """Blocks of 64 tokens, of which vLLM itself finds halves."""
    parts = {"block_size": 64, "prefix_match_unit": 32}
    donor = donate(broker, slabs=32)
    want = lab.want("b", model="qwen3next", **parts)
    engine = lab.engine("b")
    of.connect(engine, broker, model="qwen3next", **parts)
    of.matching(want, lambda: from_the_store(engine))
    results = of.matching(want, lambda: from_the_store(engine))
    assert of.cached(results) == full(64) * 64
    engine.ask("halve", on=True)
    of.matching(want, lambda: from_the_store(engine))
    engine.ask("halve", on=False)
    results = of.matching(want, lambda: of.play(engine))
    assert of.cached(results) >= full(64) * 64, "what vLLM still has, too"
    assert nothing_held(engine)
    engine.ask("stop")
    donor.kill()
    donor.wait()


@pytest.fixture(scope="module")
def want(lab, model):
    return lab.want("a", model=model)


@pytest.fixture(scope="module")
def donors(broker, model):
    donors = [donate(broker, slabs=32)]
    yield donors
    for donor in donors:
        donor.kill()
        donor.wait()


@pytest.fixture(scope="module")
def engine(lab, broker, model, want, donors):
    engine = lab.engine("a")
    of.connect(engine, broker, model=model, events=True)
    yield engine
    engine.ask("stop")


def from_the_store(engine) -> dict[str, dict]:
    """Everything once more, with nothing left in the engine's own pool before each turn."""
    engine.ask("overwrite")
    return of.play(engine, between=lambda _: engine.ask("overwrite"))


def full(block: int = of.BLOCK) -> int:
    """Blocks of all prompts but for the part that is always computed."""
    prompts = [*of.shared_prefix().values(), *of.long_prompt().values()]
    turns = [90 + turn * (of.ANSWER + 45) for turn in range(3)]
    return sum((length - 1) // block for length in [*map(len, prompts), *turns])


def nothing_held(engine) -> bool:
    engine.ask("settle")
    held = engine.ask("held")
    workers = [worker[what] for worker in held["workers"] for what in ("storing", "receiving")]
    return not any([held["tracked"], held["jobs"], *workers])


def test_cold_it_says_what_vllm_says(engine, want) -> None:
    of.matching(want, lambda: from_the_store(engine))
    assert engine.ask("settle").get("lost", 0) == 0


def test_everything_comes_from_the_store(engine, want) -> None:
    results = of.matching(want, lambda: from_the_store(engine))
    assert of.cached(results) // of.BLOCK == full()
    assert engine.ask("stats")["hit_donor_blocks"] > full(), "blocks of each group"
    eventually("events", lambda: "BlockStored" in engine.ask("events")["kinds"])


def test_where_requests_part_is_found_after_one_has_come_there(engine) -> None:
    """A prefix that several share ends where no request ended, in the middle of a chunk: it has no tail at first."""
    prompts = [of.tokens("parts", 224) + of.tokens(f"part-{number}", 60) for number in range(3)]
    found = []
    for number, prompt in enumerate(prompts):
        engine.ask("overwrite")
        found.append(of.cached(engine.generate({f"part-{number}": prompt}, 2)))
    assert found == [0, 0, 224]


def test_where_a_request_leaves_an_answered_prompt_that_prompt_is_found(engine) -> None:
    """Full attention reaches into the second turn, where there is no tail. The first turn's end has one."""
    first, second = of.tokens("turn", 150), of.tokens("more", 150)
    engine.generate({"turn-1": first}, 2)
    engine.generate({"turn-2": first + second}, 2)
    other = first + second[:90] + of.tokens("other", 60)
    found = []
    for number in range(2):
        engine.ask("overwrite")
        found.append(of.cached(engine.generate({f"other-{number}": other + of.tokens(number, 9)}, 2)))
    assert found == [149 // of.BLOCK * of.BLOCK, len(other) // of.BLOCK * of.BLOCK]


def test_half_of_the_loads_fail(engine, want) -> None:
    before = engine.ask("held")["workers"][0]["spoiled"]
    engine.ask("halve", on=True)
    of.matching(want, lambda: from_the_store(engine))
    engine.ask("halve", on=False)
    assert engine.ask("held")["workers"][0]["spoiled"] > before
    assert nothing_held(engine)


def test_aborts_around_a_failed_load(engine, want) -> None:
    engine.ask("overwrite")
    engine.ask("halve", on=True, slow=3)
    for name, prompt in of.shared_prefix().items():
        engine.ask("add", name=f"doomed-{name}", tokens=prompt, max_tokens=of.ANSWER)
    for name in of.shared_prefix():
        engine.ask("step", count=3)
        engine.ask("abort", name=f"doomed-{name}")
    engine.ask("halve", on=False)
    assert nothing_held(engine)
    results = of.matching(want, lambda: from_the_store(engine))
    assert of.cached(results) // of.BLOCK == full()


def test_another_engine_reads_what_this_one_wrote(lab, broker, model, engine, want) -> None:
    other = lab.engine("b")
    of.connect(other, broker, model=model)
    results = other.generate(of.shared_prefix() | of.long_prompt(), of.ANSWER)
    assert of.said(results).items() <= want.items()
    prompts = [*of.shared_prefix().values(), *of.long_prompt().values()]
    assert of.cached(results) // of.BLOCK == sum((len(prompt) - 1) // of.BLOCK for prompt in prompts)
    assert other.ask("stats")["hit_shared_blocks"] > 0
    other.ask("stop")


def test_a_revocation_while_requests_load(engine, broker, donors, want) -> None:
    engine.ask("overwrite")
    for name, prompt in (of.shared_prefix() | of.long_prompt()).items():
        engine.ask("add", name=name, tokens=prompt, max_tokens=of.ANSWER)
    results = engine.ask("step", count=1)["finished"]
    broker.withdraw(donors[-1])
    results |= engine.finish()
    assert of.said(results).items() <= want.items()
    donors[-1].wait(120)
    of.matching(want, lambda: from_the_store(engine))
    donors.append(donate(broker, slabs=32))
    engine.generate({"nudge": of.tokens("nudge", 100)}, 2)
    eventually("a lease", lambda: engine.ask("leased"))
    of.matching(want, lambda: from_the_store(engine))
    results = of.matching(want, lambda: from_the_store(engine))
    assert of.cached(results) // of.BLOCK == full()


def test_corrupted_bytes_change_the_tokens(engine, donors, want) -> None:
    """Without this, all the above could pass with nothing loaded."""
    engine.ask("overwrite")
    assert corrupt(donors[-1].pid) > 0
    wrong = of.said(engine.generate(of.long_prompt(), of.ANSWER))
    assert wrong["long"] != want["long"]
    engine.ask("settle")
    assert engine.ask("reset", connector=True)
