"""SwiftCache beside another connector in vLLM's MultiConnector, whose loads fail: what was computed on garbage is found
by nobody, in no engine. Each failure has a twin in which SwiftCache believes that the other one's load has held.
Tests run in the order of this file.
"""

from __future__ import annotations

import lab as of
import pytest
from neighbours import donate
from node import eventually

PROMPT = 400
"""Tokens: 12 blocks, and a part of the next."""
BLOCKS = PROMPT // of.BLOCK

WAYS = {
    "scheduling-sync": {"async_scheduling": False, "connector": {"load": "sync"}},
    "scheduling-async": {"async_scheduling": True, "connector": {"load": "async"}},
}
ABORTED = "aborted-while-loading"
FAILURES = ("some-lost", "lost-under-what-is-computed", ABORTED)


def prompts() -> dict[str, list[int]]:
    cases = [f"{failure}-{believes}" for failure in FAILURES for believes in (False, True)]
    return {name: of.tokens(name, PROMPT) for name in [*cases, "met", "held"]}


def play_prompts(engine) -> dict[str, dict]:
    """One after the other: sums round the same in the same company."""
    results = {}
    for name, tokens in prompts().items():
        results |= engine.generate({name: tokens}, of.ANSWER)
    return results


@pytest.fixture(scope="module")
def want(lab):
    return lab.want("a", play_prompts)


@pytest.fixture(scope="module", params=WAYS)
def engine(lab, node, want, request):
    """An engine whose other connector has all prompts, and SwiftCache none: the broker came later."""
    engine = lab.engine("a")
    way = dict(WAYS[request.param])
    connector = way.pop("connector") | {"salt": request.param}
    beside = {"kv_load_failure_policy": "recompute"}
    # With statistics on: the connectors' counters go through vLLM's log.
    of.connect(engine, node, wait=False, connector=connector, beside=beside, disable_log_stats=False, **way)
    engine.ask("order", keeps=True, offers=0, waits=False, loses=None)
    assert of.said(play_prompts(engine)) == want
    engine.ask("order", keeps=False)
    engine.ask("settle")
    node.start_broker()
    donor = donate(node)
    eventually("a lease", lambda: engine.ask("leased"))
    engine.salt = request.param
    yield engine
    engine.ask("stop")
    donor.kill()
    node.kill_broker()


@pytest.fixture(scope="module")
def reader(lab, node, engine):
    """Another engine, which has SwiftCache only."""
    other = lab.engine("b")
    of.connect(other, node, wait=False, connector={"load": "sync", "salt": engine.salt})
    yield other
    other.ask("stop")


def found_later(engine, name: str) -> dict:
    """What an engine that has forgotten its own prefixes answers, and how much of it came from elsewhere."""
    assert engine.ask("reset")
    return engine.generate({name: prompts()[name]}, of.ANSWER)[name]


def suffer(engine, failure: str, name: str, want) -> None:
    """Runs a prompt while the other connector's load fails."""
    assert engine.ask("reset")
    prompt = prompts()[name]
    if failure == ABORTED:
        engine.ask("order", offers=BLOCKS, waits=True, loses=None)
        engine.ask("add", name=name, tokens=prompt, max_tokens=of.ANSWER)
        engine.ask("step", count=2)
        engine.ask("abort", name=name)
        engine.ask("order", waits=False)
    else:
        offers = BLOCKS if failure == "some-lost" else BLOCKS // 2
        engine.ask("order", offers=offers, waits=False, loses=offers // 2)
        engine.generate({name: prompt}, of.ANSWER)
    engine.ask("settle")
    engine.ask("order", offers=0, loses=None)


def test_the_others_handshake_is_its_own_and_swiftcache_knows_its_workers(engine, reader, want) -> None:
    assert engine.ask("greeted") == ["Greeting"]
    assert engine.ask("reset")
    engine.generate({"met": prompts()["met"]}, of.ANSWER)
    engine.ask("settle")
    for one in (engine, reader):
        later = found_later(one, "met")
        assert later["tokens"] == want["met"] and later["cached"] == BLOCKS * of.BLOCK


@pytest.mark.parametrize("failure", FAILURES)
def test_what_others_failed_to_load_is_not_kept(engine, reader, want, failure) -> None:
    name = f"{failure}-False"
    suffer(engine, failure, name, want)
    again = found_later(engine, name)
    assert again["tokens"] == want[name]
    elsewhere = found_later(reader, name)
    assert elsewhere["tokens"] == want[name]
    # What the first engine has found or computed by now is kept.
    assert found_later(reader, name)["cached"] == BLOCKS * of.BLOCK


@pytest.mark.parametrize("failure", FAILURES)
def test_believing_others_would_serve_wrong_tokens(engine, reader, want, failure) -> None:
    """The twin."""
    name = f"{failure}-True"
    engine.ask("believe", believes=True)
    suffer(engine, failure, name, want)
    engine.ask("believe", believes=False)
    again = found_later(engine, name)
    assert again["cached"] > 0 and again["tokens"] != want[name]
    elsewhere = found_later(reader, name)
    assert elsewhere["cached"] > 0 and elsewhere["tokens"] != want[name]


def test_what_others_have_loaded_is_kept(engine, reader, want) -> None:
    assert engine.ask("reset")
    engine.ask("order", offers=BLOCKS, loses=None)
    result = engine.generate({"held": prompts()["held"]}, of.ANSWER)["held"]
    assert result["tokens"] == want["held"] and result["cached"] == BLOCKS * of.BLOCK
    engine.ask("settle")
    engine.ask("order", offers=0)
    for one in (engine, reader):
        later = found_later(one, "held")
        assert later["tokens"] == want["held"] and later["cached"] == BLOCKS * of.BLOCK
