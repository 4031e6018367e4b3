"""One engine's life: no broker, a broker, hits, and everything that can be taken away from it. Its tokens are those of
an engine without SwiftCache throughout. Tests run in the order of this file; the engine is started once.
"""

from __future__ import annotations

import lab as of
import pytest
from donors import corrupt
from neighbours import donate
from node import eventually


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a")


@pytest.fixture(scope="module")
def engine(lab, node, want):
    engine = lab.engine("a")
    of.connect(engine, node, wait=False, connector={"load": "sync"})
    yield engine
    engine.ask("stop")


@pytest.fixture(scope="module")
def donors(node):
    return []


def again(engine):
    """Everything once more, with vLLM's own cache forgotten before each turn."""
    assert engine.ask("reset")
    return of.play(engine, between=lambda _: engine.ask("reset"))


def everything_hits(engine, want, blocks: int) -> None:
    results = again(engine)
    assert of.said(results) == want
    assert of.cached(results) // of.BLOCK == blocks


def full() -> int:
    """Blocks of all prompts but for the part that is always computed."""
    prompts = [*of.shared_prefix().values(), *of.long_prompt().values()]
    turns = [90 + turn * (of.ANSWER + 45) for turn in range(3)]
    return sum((length - 1) // of.BLOCK for length in [*map(len, prompts), *turns])


def test_without_a_broker_everything_is_a_miss(engine, want) -> None:
    results = again(engine)
    assert of.said(results) == want
    assert of.cached(results) == 0 or of.cached(results) <= 4 * 200, "only what the four have in common, at most"


def test_a_broker_that_comes_later_is_used(engine, node, donors, want) -> None:
    node.start_broker()
    donors.append(donate(node))
    eventually("a lease", lambda: engine.ask("leased"))
    assert of.said(again(engine)) == want
    assert engine.ask("settle").get("lost", 0) == 0


def test_the_next_turn_after_a_reset_loads_from_the_donor(engine, want) -> None:
    everything_hits(engine, want, full())
    stats = engine.ask("stats")
    # The four find their common prefix in vLLM's own cache, once the first of them has loaded it.
    assert stats["hit_donor_blocks"] >= full() - 3 * (200 // of.BLOCK) and stats["failed_blocks"] == 0


def test_conversations_of_agents(lab, engine) -> None:
    if not of.traces():
        pytest.skip("no traces: SWIFTCACHE_TRACES names no directory with any")
    first = of.play_traces(engine)
    engine.ask("reset")
    second = of.play_traces(engine)
    engine.ask("reset")
    want = lab.want("b", of.play_traces)
    assert of.said(first) == want and of.said(second) == want
    assert of.cached(second) > of.cached(first) and of.cached(second) > 10 * of.BLOCK


def test_another_engine_reads_what_this_one_wrote(lab, engine, node, want) -> None:
    other = lab.engine("b")
    of.connect(other, node, connector={"load": "sync"})
    results = other.generate(of.shared_prefix() | of.long_prompt(), of.ANSWER)
    assert of.said(results).items() <= want.items()
    assert of.cached(results) // of.BLOCK == sum(
        (len(prompt) - 1) // of.BLOCK for prompt in [*of.shared_prefix().values(), *of.long_prompt().values()]
    )
    assert other.ask("stats")["hit_shared_blocks"] > 0
    other.ask("stop")


@pytest.mark.parametrize(
    "difference",
    [
        {"dtype": "bfloat16"},
        {"block_size": 64, "num_gpu_blocks_override": of.POOL // 2},
        {"seed": 1},
        {"model": "qwen3"},
        {"connector": {"salt": "other"}},
        {"connector": {"tenant": "other"}},
    ],
    ids="-".join,
)
def test_an_engine_that_differs_never_hits(lab, engine, node, difference) -> None:
    other = lab.engine("b")
    of.connect(other, node, **difference)
    results = other.generate(of.long_prompt(), 1)
    assert of.cached(results) == 0
    assert other.ask("stats")["hit_shared_blocks"] == 0
    other.ask("stop")


def test_a_cache_salt_keeps_requests_apart(engine) -> None:
    engine.ask("reset")
    prompt = of.tokens("salted", 200)
    plain = engine.generate({"plain": prompt}, of.ANSWER)["plain"]
    engine.ask("reset")
    for number, (salt, cached) in enumerate([("s", 0), ("s", 192), ("t", 0), (None, 192)]):
        result = engine.generate({f"salt-{number}": prompt}, of.ANSWER, salt=salt)[f"salt-{number}"]
        assert (result["tokens"], result["cached"]) == (plain["tokens"], cached)
        engine.ask("reset")


@pytest.mark.parametrize("positions", [[0], [1, 3], [20]])
def test_blocks_that_are_gone_when_they_are_loaded_are_computed(engine, want, positions) -> None:
    engine.ask("reset")
    before = engine.ask("held")["workers"][0]["spoiled"]
    engine.ask("lose", positions=positions)
    results = engine.generate(of.shared_prefix() if positions != [20] else of.long_prompt(), of.ANSWER)
    assert of.said(results).items() <= want.items()
    assert engine.ask("held")["workers"][0]["spoiled"] == before + len(positions)
    everything_hits(engine, want, full())


def test_an_abort_after_a_failed_load_leaves_nothing_wrong_behind(engine, want) -> None:
    engine.ask("reset")
    prompt = of.long_prompt()["long"]
    engine.ask("lose", positions=[2])
    engine.ask("add", name="doomed", tokens=prompt, max_tokens=of.ANSWER)
    engine.ask("step", count=1)
    engine.ask("abort", name="doomed")
    assert of.said(engine.generate({"long": prompt}, of.ANSWER)) == {"long": want["long"]}
    everything_hits(engine, want, full())


def test_aborted_requests_leave_nothing_held(engine) -> None:
    engine.ask("reset")
    for name, tokens in of.shared_prefix().items():
        engine.ask("add", name=f"aborted-{name}", tokens=tokens[::-1], max_tokens=of.ANSWER)
    engine.ask("step", count=3)
    for name in of.shared_prefix():
        engine.ask("abort", name=f"aborted-{name}")
    engine.ask("settle")
    held = engine.ask("held")
    assert (held["tracked"], held["jobs"], held["workers"][0]["storing"]) == (0, 0, 0)
    assert engine.ask("reset"), "every block is free"


def halfway(engine, then) -> dict[str, dict]:
    """The four that share a prefix and the long one, with something done to the node while they run."""
    engine.ask("reset")
    for name, tokens in (of.shared_prefix() | of.long_prompt()).items():
        engine.ask("add", name=name, tokens=tokens, max_tokens=of.ANSWER)
    results = engine.ask("step", count=2)["finished"]
    then()
    return results | engine.finish()


def test_a_donor_killed_mid_request(engine, node, donors, want) -> None:
    def kill() -> None:
        donors[-1].kill()
        donors[-1].wait()

    assert of.said(halfway(engine, kill)).items() <= want.items()
    eventually("the loss to be noticed", lambda: engine.ask("stats")["donor_blocks"] == 0)
    results = again(engine)
    assert of.said(results) == want and of.cached(results) <= 4 * 200 * 3


def test_a_new_donor_is_used(engine, node, donors, want) -> None:
    donors.append(donate(node))
    engine.generate({"nudge": of.tokens("nudge", 100)}, 2)
    eventually("a lease", lambda: engine.ask("leased"))
    again(engine)
    everything_hits(engine, want, full())


def test_a_revocation_mid_request(engine, node, donors, want) -> None:
    assert of.said(halfway(engine, lambda: node.withdraw(donors[-1]))).items() <= want.items()
    donors[-1].wait(120)
    results = again(engine)
    assert of.said(results) == want
    donors.append(donate(node))
    engine.generate({"nudge-2": of.tokens("nudge-2", 100)}, 2)
    eventually("a lease", lambda: engine.ask("leased"))
    again(engine)
    everything_hits(engine, want, full())


def test_a_broker_killed_mid_request_and_restarted(engine, node, want) -> None:
    assert of.said(halfway(engine, node.kill_broker)).items() <= want.items()
    assert of.said(again(engine)) == want
    node.start_broker()
    eventually("the engine to be back", lambda: engine.ask("leased"))

    def hits() -> bool:
        results = again(engine)
        assert of.said(results) == want
        return of.cached(results) // of.BLOCK == full()

    # One round can take longer than `eventually` waits.
    if not any(hits() for _ in range(5)):
        eventually("blocks to be found again", hits)


def test_corrupted_bytes_change_the_tokens(engine, donors, want) -> None:
    """Without this, all the above could pass with nothing loaded."""
    engine.ask("reset")
    assert corrupt(donors[-1].pid) > 0
    wrong = of.said(engine.generate(of.long_prompt(), of.ANSWER))
    assert wrong["long"] != want["long"]


def test_a_reset_of_the_connector_forgets_the_corrupted(engine, want) -> None:
    engine.ask("settle")
    assert engine.ask("reset", connector=True)
    results = of.play(engine)
    assert of.said(results) == want
    everything_hits(engine, want, full())
