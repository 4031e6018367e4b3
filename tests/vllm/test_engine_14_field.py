"""What happens to engines in the field: loads that fail when nothing else runs, tiny pools, aborts at any time, prompts
that end at odd places, speculation, adapters and weights that change, naps. Tokens are those of an engine without
SwiftCache.

SWIFTCACHE_FIELD_REQUESTS has the soak take so many requests; SWIFTCACHE_FAULT_SEED has it take the same ones again.
"""

from __future__ import annotations

import os
import random
import shutil

import adapters
import lab as of
import models
import pytest
from neighbours import donate
from node import eventually

from swiftcache.vllm import landing

ASYNC = {"load": "async"}
REQUESTS = int(os.environ.get("SWIFTCACHE_FIELD_REQUESTS", "80"))
SEED = os.environ.get("SWIFTCACHE_FAULT_SEED") or str(random.randrange(1 << 32))
SHORT = {"max_model_len": 1024}


@pytest.fixture(scope="module")
def donors(node):
    node.start_broker()
    return [donate(node, slabs=32)]


def fresh(engine) -> None:
    """Only donors have anything."""
    assert engine.ask("reset")


def found(results) -> dict[str, int]:
    return {name: result["cached"] for name, result in results.items()}


# One engine, one request at a time.

STEP = 256
"""max_num_batched_tokens."""
LENGTHS = [4 * of.BLOCK - 1, 4 * of.BLOCK, 4 * of.BLOCK + 1, 3 * STEP, 1, of.BLOCK]


def odd_lengths() -> dict[str, list[int]]:
    return {f"length-{length}": of.tokens(length, length) for length in LENGTHS}


def alone() -> dict[str, list[int]]:
    return {"alone": of.tokens("alone", 6 * of.BLOCK + 5)}


def family(number: int) -> list[int]:
    return of.tokens("family", 40) + of.tokens(f"family-{number}", 150)


def one_by_one(engine) -> dict[str, dict]:
    prompts = odd_lengths() | alone() | {f"family-{number}": family(number) for number in range(5)}
    results = {}
    for name, tokens in prompts.items():
        results |= engine.generate({name: tokens}, of.ANSWER)
    return results


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("b", one_by_one, **SHORT)


@pytest.fixture(scope="module")
def engine(lab, node, donors, want):
    engine = lab.engine("b")
    # With statistics: the counters go to /metrics.
    of.connect(engine, node, connector=ASYNC, disable_log_stats=False, num_gpu_blocks_override=64, **SHORT)
    assert of.said(one_by_one(engine)) == want
    engine.ask("settle")
    yield engine
    engine.ask("stop")


def test_the_last_burst_is_in_the_metrics(engine) -> None:
    """`settle` steps no further than vLLM itself does when its requests are over."""
    fresh(engine)
    engine.ask("keep_stores", on=False)
    engine.generate({"burst": of.tokens("burst", 200), **alone()}, of.ANSWER)
    engine.ask("settle")
    engine.ask("keep_stores", on=True)
    metrics, stats = engine.ask("counted"), engine.ask("stats")
    stats["loaded_bytes"] = sum(stats[of] for of in stats if of.startswith("loaded_") and of.endswith("_bytes"))
    for name in ("stored_blocks", "known_blocks", "hit_donor_blocks", "loaded_bytes"):
        assert metrics[f"vllm:swiftcache_{name}"] == stats[name] > 0 or name == "known_blocks", name


def test_prompts_that_end_at_odd_places(engine, want) -> None:
    fresh(engine)
    results = {}
    for name, tokens in odd_lengths().items():
        results |= engine.generate({name: tokens}, of.ANSWER)
    assert of.said(results).items() <= want.items()
    whole = {f"length-{length}": (length - 1) // of.BLOCK * of.BLOCK for length in LENGTHS}
    assert found(results) == whole


@pytest.mark.parametrize("lost", [[0], [3], [0, 1, 2, 3, 4, 5]], ids=["first", "middle", "all"])
def test_a_load_that_fails_when_nothing_else_runs(engine, want, lost) -> None:
    fresh(engine)
    before = engine.ask("held")["workers"][0]["spoiled"]
    engine.ask("lose", positions=lost)
    assert of.said(engine.generate(alone(), of.ANSWER)).items() <= want.items()
    assert engine.ask("held")["workers"][0]["spoiled"] == before + len(lost)


def test_the_twin_a_failed_load_that_is_believed_shows(engine, want) -> None:
    engine.ask("overwrite")
    engine.ask("lie", on=True)
    engine.ask("lose", positions=[0, 1, 2])
    wrong = of.said(engine.generate(alone(), of.ANSWER))
    engine.ask("lie", on=False)
    assert wrong["alone"] != want["alone"]


def layer_wise_ends(engine) -> tuple[float, float]:
    """All of them, and those that were claimed."""
    counted = engine.ask("counted")
    return counted["vllm:swiftcache_layer_wise_ends"], counted["vllm:swiftcache_claimed_loads"]


@pytest.fixture(params=[True, False], ids=["claimed", "asynchronous"])
def claims(engine, request) -> bool:
    """Whether loads are part of the step that finds them."""
    engine.ask("claims", on=request.param)
    yield request.param
    engine.ask("claims", on=True)


def test_a_forward_waits_for_each_layer_of_a_load_that_counts_as_over(engine, want, claims) -> None:
    engine.ask("overwrite")
    engine.ask("linger", on=True)
    ends, claimed = layer_wise_ends(engine)
    result = engine.generate(alone(), of.ANSWER)["alone"]
    engine.ask("settle")
    assert result["tokens"] == want["alone"] and result["cached"] == 6 * of.BLOCK
    assert layer_wise_ends(engine) == (ends + 1, claimed + claims)
    # Aborted, where it is not claimed before it is scheduled: others compute in its blocks at once.
    engine.ask("overwrite")
    engine.ask("add", name="gone", tokens=next(iter(alone().values())), max_tokens=1)
    engine.ask("step", count=1)
    engine.ask("abort", name="gone")
    engine.ask("linger", on=False)
    results = {}
    for number in range(5):
        results |= engine.generate({f"family-{number}": family(number)}, of.ANSWER)
    assert of.said(results).items() <= want.items()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-another"])
def test_a_load_that_others_would_wait_for_is_claimed_where_none_runs(engine, want, beside) -> None:
    engine.ask("overwrite")
    if beside:
        engine.ask("add", name="other", tokens=of.tokens("other", 40), max_tokens=60)
        engine.ask("step", count=3)
    _, claimed = layer_wise_ends(engine)
    engine.ask("most_beside", amount=1)
    engine.ask("add", name="alone", tokens=alone()["alone"], max_tokens=of.ANSWER)
    result = engine.ask("step")["finished"]["alone"]
    engine.ask("settle")
    engine.ask("most_beside", amount=landing.MOST_BYTES)
    assert result["cached"] == 6 * of.BLOCK and (beside or result["tokens"] == want["alone"])
    assert layer_wise_ends(engine)[1] == claimed + (not beside)


def test_turns_that_come_at_once_are_computed_in_one_step(engine, want, claims) -> None:
    """Beside a request that runs. The twin: loads that are not claimed come a step later."""
    engine.ask("overwrite")
    engine.ask("add", name="other", tokens=of.tokens("other", 40), max_tokens=60)
    engine.ask("step", count=3)
    for number in range(3):
        engine.ask("add", name=f"family-{number}", tokens=family(number), max_tokens=1)
    answers = engine.ask("step")["finished"]
    assert answers.pop("other")["reason"] == "length"
    engine.ask("settle")
    assert {name: answer["tokens"] for name, answer in answers.items()} == {name: want[name][:1] for name in answers}
    assert set(found(answers).values()) == {190 // of.BLOCK * of.BLOCK} and len(answers) == 3
    assert all((answer["steps"] == 1) == claims for answer in answers.values())


def test_the_twin_a_forward_that_does_not_wait_shows(engine, want, claims) -> None:
    engine.ask("overwrite")
    engine.ask("linger", on=True, careless=True)
    wrong = of.said(engine.generate(alone(), of.ANSWER))
    engine.ask("linger", on=False)
    assert wrong["alone"] != want["alone"]


def test_prompt_logprobs_are_of_all_of_the_prompt(engine, want) -> None:
    fresh(engine)
    (name, prompt) = next(iter(alone().items()))
    engine.ask("add", name=name, tokens=prompt, max_tokens=of.ANSWER, prompt_logprobs=True)
    result = engine.finish()[name]
    assert result["tokens"] == want[name] and len(result["prompt"]) == len(prompt) - 1
    assert result["cached"] == 0, "they are of what is computed"


def test_aborts_in_the_queue_while_loading_and_while_storing(engine, want) -> None:
    source = random.Random(7)
    engine.ask("halve", on=True, slow=2)
    for number in range(100):
        if number % 5 == 0:
            fresh(engine)
        name, prompt = f"abort-{number}", family(source.randrange(5))
        if source.random() < 0.3:
            prompt = prompt + of.tokens(name, 60)
        # The pool has room for few of them, so some are aborted in the queue.
        for copy in range(source.randrange(1, 5)):
            engine.ask("add", name=f"{name}-{copy}", tokens=prompt, max_tokens=source.choice([1, 3]))
        for copy in range(4):
            if steps := source.randrange(4):
                engine.ask("step", count=steps)
            engine.ask("abort", name=f"{name}-{copy}")
    engine.ask("halve", on=False)
    engine.ask("settle")
    held = engine.ask("held")
    assert (held["tracked"], held["jobs"]) == (0, 0)
    assert held["workers"][0]["storing"] == held["workers"][0]["receiving"] == 0
    fresh(engine)  # every block is free
    results = {}
    for number in range(5):
        results |= engine.generate({f"family-{number}": family(number)}, of.ANSWER)
    assert of.said(results).items() <= want.items() and of.cached(results) > 0


@pytest.mark.parametrize(("level", "cached"), [(0, 6), (1, 0), (1, 0)])
def test_a_nap_between_two_turns(engine, want, level, cached) -> None:
    """From level 1 on vLLM has connectors forget, as it forgets itself: its weights may change in its sleep."""
    engine.generate(alone(), of.ANSWER)
    fresh(engine)
    engine.ask("sleep", level=level)
    engine.ask("wake")
    for blocks in (cached, 6):
        result = engine.generate(alone(), of.ANSWER)["alone"]
        assert result["tokens"] == want["alone"] and result["cached"] == blocks * of.BLOCK
        fresh(engine)


def test_a_donor_killed_between_lookup_and_load(engine, node, donors, want, claims) -> None:
    def kept() -> bool:
        engine.generate(alone(), of.ANSWER)
        engine.ask("settle")
        fresh(engine)
        return engine.ask("stats")["donor_blocks"] >= 6

    eventually("the prefix to be on the donor", kept)
    engine.ask("ambush", victim=donors[0].pid)
    result = engine.generate(alone(), of.ANSWER)["alone"]
    donors.pop().wait(timeout=60)
    assert result["tokens"] == want["alone"]
    # What is claimed lasts as long as it is mapped here.
    assert not claims or result["cached"] == 6 * of.BLOCK
    eventually("the donor's blocks to be gone", lambda: not engine.ask("stats")["donor_blocks"])
    donors.append(donate(node, slabs=32))


# Tiny pools.


def requests(pool: int) -> list[tuple[str, list[int], int]]:
    """Random ones of a few families, of which each fits into the pool by itself."""
    source, most = random.Random(f"{SEED} {pool}"), (pool - 2) * of.BLOCK
    made = []
    for number in range(REQUESTS // 2):
        prefix = of.tokens(f"soak-{source.randrange(6)}", source.randrange(1, most * 2 // 3))
        prompt = prefix + of.tokens(f"{SEED} {number}", source.randrange(1, 60))
        answer = source.randrange(1, 40)
        made.append((f"{pool}-{number}", prompt[: most - answer], answer))
    return made


def soak(engine, pool: int) -> dict[str, dict]:
    """Up to four at a time, so that they push each other out."""
    source, results, left = random.Random(f"{SEED} pace {pool}"), {}, requests(pool)
    while left:
        for name, tokens, answer in left[: source.randrange(1, 5)]:
            engine.ask("add", name=name, tokens=tokens, max_tokens=answer)
            left = left[1:]
        results |= engine.ask("step", count=source.choice([0, 0, 1, 2, 5]))["finished"]
    return results | engine.finish()


def soak_12(engine) -> dict[str, dict]:
    return soak(engine, 12)


def soak_30(engine) -> dict[str, dict]:
    return soak(engine, 30)


@pytest.mark.parametrize("fails", [True, False], ids=["failing", "claimed"])
@pytest.mark.parametrize(("pool", "work"), [(12, soak_12), (30, soak_30)])
def test_random_requests_in_tiny_pools(lab, node, donors, pool, work, fails) -> None:
    """Half of the loads fail and all take long, or they are part of the steps that find them, and come layer by
    layer."""
    print(f"SWIFTCACHE_FAULT_SEED={SEED}")
    tiny = {"num_gpu_blocks_override": pool, "max_model_len": (pool - 1) * of.BLOCK}
    want = lab.want("b", work, **tiny)
    engine = lab.engine("b")
    of.connect(engine, node, connector=ASYNC, **tiny)
    engine.ask("keep_stores", on=False)
    if fails:
        engine.ask("halve", on=True, slow=1)
    else:
        engine.ask("linger", on=True)
    results = of.matching(want, lambda: work(engine))
    assert results.keys() == want.keys()
    engine.ask("settle")
    held = engine.ask("held")
    assert (held["tracked"], held["jobs"]) == (0, 0)
    assert held["workers"][0]["spoiled" if fails else "claimed"] > 0 and engine.ask("stats")["hit_donor_blocks"] > 0
    assert engine.ask("reset"), "every block is free"
    engine.ask("stop")


# Other ways to schedule and to decode.


def by_priority(engine) -> dict[str, dict]:
    """The later ones go first, and push the earlier ones out."""
    for number in range(6):
        prompt = of.tokens("urgent", 64) + of.tokens(f"urgent-{number}", 220)
        engine.ask("add", name=f"urgent-{number}", tokens=prompt, max_tokens=60, priority=-number)
        engine.ask("step", count=3)
    return engine.finish()


def speculating(engine) -> dict[str, dict]:
    """Prompts that repeat themselves, so that there is something to guess."""
    results = {}
    for number in range(3):
        prompt = of.tokens(f"guess-{number}", 24) * 6 + of.tokens(f"guess-end-{number}", 3)
        results |= engine.generate({f"guess-{number}": prompt}, 40)
    return results | engine.generate(of.shared_prefix(), of.ANSWER)


OTHERS = {
    "priority": (
        by_priority,
        {"scheduling_policy": "priority", "num_gpu_blocks_override": 36, "max_model_len": 512},
    ),
    "ngram": (speculating, SHORT),
    "eagle": (speculating, SHORT),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_schedule_and_decode(lab, node, donors, name) -> None:
    work, options = OTHERS[name]
    if name in of.GUESSES:
        options = options | of.guessing(name)
    want = lab.want("b", work, **options)
    engine = lab.engine("b")
    of.connect(engine, node, connector=ASYNC, **options)
    of.matching(want, lambda: work(engine))
    cold = engine.ask("stats")["hit_donor_blocks"]

    def warm() -> dict[str, dict]:
        fresh(engine)
        return work(engine)

    of.matching(want, warm)
    assert engine.ask("stats")["hit_donor_blocks"] >= cold + 10
    assert (engine.ask("held")["preemptions"] > 0) == (name == "priority")
    engine.ask("stop")


# Images.

SEEING = {"model": "blip2", "skip_tokenizer_init": False, **SHORT}


def shown(engine, pictures=(1, 2, 3)) -> dict[str, dict]:
    """The same words below each image."""
    results = {}
    for picture in pictures:
        engine.ask(
            "add", name=f"image-{picture}", tokens=of.tokens("shown", 200), max_tokens=of.ANSWER, picture=picture
        )
        results |= engine.finish()
    return results


def test_what_is_said_below_an_image_is_found_below_that_image_only(lab, node, donors) -> None:
    want = lab.want("b", shown, **SEEING)
    # The twin: an image that were taken for another would be noticed.
    assert len({tuple(tokens) for tokens in want.values()}) == 3
    one, replica = lab.engine("b"), lab.engine("a")
    for engine in (one, replica):
        of.connect(engine, node, connector=ASYNC, **SEEING)
    results = shown(one, (1, 2))
    assert of.said(results).items() <= want.items() and of.cached(results) == 0
    one.ask("settle")
    # 200 tokens of words, and those of the image.
    whole = (200 + models.PICTURE_TOKENS - 1) // of.BLOCK * of.BLOCK
    for engine in (one, replica):
        fresh(engine)
        results = shown(engine)
        assert of.said(results) == want
        assert found(results) == {"image-1": whole, "image-2": whole, "image-3": 0 if engine is one else whole}
        engine.ask("settle")
    for engine in (one, replica):
        engine.ask("stop")


# What changes in a running engine.


def weights_played(engine) -> dict[str, dict]:
    return engine.generate({"updated": of.tokens("updated", 200)}, of.ANSWER)


def test_weights_updated_in_place(lab, node, donors) -> None:
    new = str(models.make("llama", of.HOME / "models", 1))
    before = lab.want("b", weights_played, **SHORT)["updated"]
    after = lab.want("b", weights_played, seed=1, **SHORT)["updated"]
    assert before != after
    one, replica = lab.engine("b"), lab.engine("a")
    for engine in (one, replica):
        of.connect(engine, node, connector=ASYNC, **SHORT)

    def again(engine) -> tuple[list[int], int]:
        # As trainers do: vLLM's own cache only.
        fresh(engine)
        result = weights_played(engine)["updated"]
        engine.ask("settle")
        return result["tokens"], result["cached"]

    assert again(one) == (before, 0)
    assert again(replica) == (before, 192), "replicas share"
    # In the middle of a request, which goes on with the others.
    one.ask("add", name="both", tokens=of.tokens("updated", 200) + of.tokens("both", 60), max_tokens=60)
    one.ask("step", count=5)
    one.ask("update_weights", path=new)
    one.finish()
    assert again(one) == (after, 0), "nothing of the old ones, and nothing of what was under way"
    assert again(one) == (after, 192), "what is stored since then is found"
    assert again(replica) == (before, 192), "a replica with the old ones finds nothing of the new ones"
    replica.ask("update_weights", path=new)
    # An idle engine's scheduler hears of it in the first request's step, of which nothing is kept.
    assert again(replica) == again(replica) == (after, 0)
    assert again(replica) == (after, 192)
    # The twin: an engine that does not notice.
    for engine in (one, replica):
        engine.ask("stop")
    of.connect(one, node, connector=ASYNC, **SHORT)
    one.ask("deafen")
    assert again(one)[0] == before
    one.ask("update_weights", path=new)
    tokens, cached = again(one)
    assert cached == 192 and tokens != after
    one.ask("stop")


LORA = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8, **SHORT}


def adapted(engine) -> dict[str, dict]:
    """Each adapter from a place of its own."""
    results = {}
    for number in (1, 2):
        path = str(adapters.make(of.HOME / "models" / f"adapter-{number}", number))
        results |= answer(
            engine, f"adapter-{number}", {"lora_name": f"a{number}", "lora_int_id": number, "lora_path": path}
        )
    return results


def answer(engine, name: str, adapter: dict | None) -> dict[str, dict]:
    engine.ask("add", name=name, tokens=of.tokens("adapted", 200), max_tokens=of.ANSWER, adapter=adapter)
    return engine.finish()


def test_two_adapters_written_to_one_path_in_turn(lab, node, donors, tmp_path) -> None:
    want = lab.want("b", adapted, **LORA)
    assert want["adapter-1"] != want["adapter-2"]
    engine = lab.engine("b")
    of.connect(engine, node, connector=ASYNC, **LORA)
    path = tmp_path / "adapter"

    def ask(number: int, adapter: int) -> dict:
        named = {"lora_name": "one", "lora_int_id": number, "lora_path": str(path)}
        result = answer(engine, "adapted", named)["adapted"]
        assert result["tokens"] == want[f"adapter-{adapter}"], (number, adapter)
        engine.ask("settle")
        return result

    def write(adapter: int) -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(of.HOME / "models" / f"adapter-{adapter}", path)

    write(1)
    assert ask(1, 1)["cached"] == 0
    fresh(engine)
    assert ask(1, 1)["cached"] == 192
    # vLLM itself would find what it has cached of the first one: it is of the same name and path.
    write(2)
    assert ask(2, 2)["cached"] == 0
    fresh(engine)
    assert ask(2, 2)["cached"] == 192
    # The first one is loaded still. What is asked of it then is of no file that there is.
    assert ask(1, 1)["cached"] in (0, 192)
    engine.ask("stop")
