"""One engine's life: no broker, a broker, hits, and everything that can be taken away from it. Its tokens are those of
an engine without SwiftCache throughout, and no request fails. Tests run in the order of this file; the engine is
started once, with prompts in chunks and the scheduling policy that matches every waiting request at every step.
"""

from __future__ import annotations

import random

import lab as of
import pytest
from donors import corrupt
from engine import EngineError
from node import KEPT, eventually

LIFE = {"schedule_policy": "lpm", "chunked_prefill_size": 256, "enable_metrics": True}


@pytest.fixture(scope="module")
def want(lab):
    return lab.want()


@pytest.fixture(scope="module")
def engine(lab, node, want):
    engine = lab.engine("a")
    engine.start(**of.linked(node, **LIFE))
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def donors(node):
    return []


def again(engine, want) -> dict[str, dict]:
    results = of.play(engine)
    of.right(results, want)
    return results


def pages(prompt: list[int]) -> int:
    """Tokens of a prompt that can be found: whole pages, but the last token is always computed."""
    return (len(prompt) - 1) // 16 * 16


def everything_is_found(engine, want) -> None:
    """What was pushed out of the engine's own pool comes back whole. A step ago it may still be on its way there."""

    def whole() -> bool:
        results = engine.generate(of.evicting(), of.ANSWER, at_once=False)
        of.right(results, want)
        return of.cached(results) == sum(map(pages, of.evicting().values()))

    eventually("all that was pushed out to be found", whole)


def test_without_a_broker_everything_is_a_miss(engine, want) -> None:
    again(engine, want)
    again(engine, want)
    assert engine.count("promised_tokens") == 0 and engine.count("failed_loads") == 0
    assert engine.count("lookups") > 0


def test_a_broker_that_comes_later_is_used(engine, node, donors, want) -> None:
    node.start_broker()
    donors.append(of.donate(node))
    eventually("a lease", engine.leased)
    again(engine, want)
    everything_is_found(engine, want)
    assert engine.count("hit_donor_blocks") > 0


def test_own_blocks_are_loaded_layer_by_layer(engine, want) -> None:
    before, waited = engine.count("layer_wise_loads"), engine.count("waited_loads")
    everything_is_found(engine, want)
    assert engine.count("layer_wise_loads") >= before + 5 and engine.count("waited_loads") == waited
    assert engine.count("aborted_loads") == engine.count("unwaited_batches") == 0


def test_engines_are_told_apart_by_what_sglang_has_resolved(engine) -> None:
    """On the command line these were left to SGLang."""
    facts = engine.ranks()[0]["facts"]
    assert facts["arguments"]["attention_backend"] == "torch_native"
    assert facts["model"]["config"]["model_type"] == "llama" and facts["model"]["files"]


def test_metrics(engine) -> None:
    from swiftcache.engine.metrics import COUNTERS, GAUGES
    from swiftcache.sglang.metrics import SGLANG_COUNTERS

    wanted = [f"swiftcache_{name}_total" for name in COUNTERS | SGLANG_COUNTERS]
    wanted += [f"swiftcache_{name}" for name in GAUGES]
    text = engine.ask("metrics")
    assert [name for name in wanted if f"sglang:{name}{{" not in text] == []
    lines = [line for line in text.splitlines() if line.startswith("sglang:swiftcache")]
    shown = {line.split("{")[0]: float(line.split()[-1]) for line in lines}
    assert shown["sglang:swiftcache_hit_donor_blocks_total"] == engine.count("hit_donor_blocks")
    assert shown["sglang:swiftcache_leases"] == engine.native("leases") > 0
    assert f'model_name="{of.model()}"' in lines[0] and 'tp_rank="0"' in lines[0]


def test_a_cache_salt_keeps_requests_apart(engine) -> None:
    prompt = of.tokens("salted", 400)

    def cached(number: int, salt: str | None) -> int:
        # Other prompts between: what is found now comes from donors.
        engine.generate(of.evicting(), 1, at_once=False)
        result = engine.generate({f"salt-{number}": prompt}, of.ANSWER, salt=salt)[f"salt-{number}"]
        first.setdefault("tokens", result["tokens"])
        assert result["tokens"] == first["tokens"]
        return result["cached"]

    first: dict[str, list[int]] = {}
    found = [cached(number, salt) for number, salt in enumerate([None, "s", "t", None, "s", "t"])]
    assert found == [0, 0, 0, *[pages(prompt)] * 3]


def test_another_engine_reads_what_this_one_wrote(lab, engine, node, want) -> None:
    other = lab.engine("b")
    of.connect(other, node, schedule_policy="fcfs")
    results = other.generate(of.evicting(), of.ANSWER, at_once=False)
    of.right(results, want)
    assert of.cached(results) == sum(map(pages, of.evicting().values()))
    assert other.count("hit_shared_blocks") > 0
    # Another one's blocks could be gone before they are read: none of these loads is left to the forward.
    assert other.count("waited_loads") > 0 and other.count("layer_wise_loads") == 0

    # Both at once.
    with of.Meanwhile(lambda: again(other, want)):
        again(engine, want)


def test_new_weights_of_one_engine_are_never_found_by_another(lab, engine, want) -> None:
    """Even if its operator keeps it from flushing: then it serves old KV itself, but nobody else is given new KV."""
    other, changed = lab.engine("b"), lab.want(seed=1)
    assert other.ask("reload", model=of.model(seed=1), flush=True)
    results = other.generate(of.evicting(), of.ANSWER, at_once=False)
    of.right(results, changed)
    assert of.cached(results) == 0

    fresh = {"fresh": of.tokens("fresh", 400)}
    assert other.ask("reload", model=of.model(seed=0), flush=False)
    assert other.ask("reload", model=of.model(seed=1), flush=False)
    one, two = other.generate(fresh, of.ANSWER), engine.generate(fresh, of.ANSWER)
    assert of.cached(one) == of.cached(two) == 0
    assert of.said(one) != of.said(two), "other weights say other things"
    other.stop()


DIFFERENCES = {
    "weights": {"seed": 1},
    "page": {"page": 32},
    "salt": {"linker": {"salt": "other"}},
    "tenant": {"linker": {"tenant": "other"}},
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_engine_that_differs_never_hits(lab, node, engine, name) -> None:
    other = lab.engine("b")
    of.connect(other, node, **DIFFERENCES[name])
    results = other.generate({"evicting-0": of.evicting()["evicting-0"]}, of.ANSWER)
    assert of.failed(results) == [] and of.cached(results) == 0
    assert other.native("hit_shared_blocks") == 0
    other.stop()


def test_a_load_that_is_refused_is_computed(engine, want) -> None:
    everything_is_found(engine, want)
    before = engine.count("failed_loads")
    engine.tell("refuse", loads=3)
    results = engine.generate(of.evicting(), of.ANSWER, at_once=False)
    of.right(results, want)
    assert engine.count("failed_loads") == before + 3
    assert of.cached(results) == sum(map(pages, list(of.evicting().values())[3:]))


@pytest.mark.parametrize("leaves", [True, False], ids=["gone", "twin-stays"])
def test_blocks_that_go_between_their_lookup_and_their_load(engine, node, donors, want, leaves) -> None:
    everything_is_found(engine, want)
    before = engine.count("failed_loads")
    engine.tell("hold")
    prompts = {"evicting-0": of.evicting()["evicting-0"]}
    with of.Meanwhile(lambda: engine.generate(prompts, of.ANSWER)) as request:
        eventually("a load to start", lambda: engine.ranks()[0]["waiting"])
        if leaves:
            node.withdraw(donors[-1])
            donors[-1].wait(120)
        engine.tell("go_on")
    of.right(request.result, want)
    assert (of.cached(request.result) == 0) == leaves
    assert engine.count("failed_loads") == before + leaves
    if leaves:
        donors.append(of.donate(node))
        eventually("a lease", engine.leased)
        again(engine, want)


def test_withdrawals_during_traffic(engine, node, donors, want) -> None:
    hits, refused = engine.count("hit_donor_blocks"), engine.count("failed_loads")
    rounds = [of.play] * 3

    def traffic() -> None:
        for number, work in enumerate(rounds):
            engine.tell("refuse", loads=number)
            of.right(work(engine), want)

    withdrawals = 0
    with of.Meanwhile(traffic) as load:
        while not load.over or withdrawals < 2:
            donors.append(of.donate(node, device="SIM-2" if withdrawals % 2 else "SIM-1"))
            eventually("a lease", engine.leased)
            # Something is to be lost.
            stored = engine.native("stored_blocks")
            eventually("a store", lambda before=stored: engine.native("stored_blocks") > before or load.over)
            node.withdraw(donors[-2])
            donors[-2].wait(120)
            withdrawals += 1
    assert engine.count("hit_donor_blocks") > hits and engine.count("failed_loads") > refused
    assert engine.count("aborted_loads") == 0
    again(engine, want)
    everything_is_found(engine, want)


def test_a_donor_killed_during_traffic(engine, node, donors, want) -> None:
    with of.Meanwhile(lambda: again(engine, want)):
        donors[-1].kill()
        donors[-1].wait()
    eventually("the loss to be noticed", lambda: engine.native("donor_blocks") == 0)
    donors.append(of.donate(node))
    eventually("a lease", engine.leased)
    again(engine, want)
    everything_is_found(engine, want)


def test_an_abort_storm_leaves_nothing_held(engine, node, donors, want) -> None:
    """SGLang itself ends an engine that holds memory when it is idle."""
    everything_is_found(engine, want)
    source = random.Random(7)
    for number in range(6):
        prompts = of.evicting() | of.shared_prefix() | of.long_prompt()
        # Some before they are scheduled, some while they are loaded, some while they speak.
        doomed = {name: source.choice([0, 0, 1, 3]) for name in prompts if source.random() < 0.7}
        engine.generate(prompts, of.ANSWER, abort=doomed)
        if number == 3:
            node.withdraw(donors[-1])
            donors.append(of.donate(node))
    eventually(
        "hits to be let go of", lambda: engine.generate({"nudge": [1, 2, 3]}, 1) and not engine.ranks()[0]["held"]
    )
    rank = engine.ranks()[0]
    assert (rank["queued"], rank["offloads"]) == (0, 0)
    assert engine.ask("flush"), "nothing is in use"
    eventually("a lease", engine.leased)
    again(engine, want)


def test_after_a_flush_nothing_is_found(engine, want) -> None:
    everything_is_found(engine, want)
    assert engine.ask("flush")
    results = engine.generate(of.evicting(), of.ANSWER, at_once=False)
    of.right(results, want)
    assert of.cached(results) == 0
    everything_is_found(engine, want)


@pytest.mark.parametrize("ledger", [True, False], ids=["with-its-ledger", "without"])
def test_a_broker_killed_during_traffic_and_back(engine, node, donors, want, ledger) -> None:
    with of.Meanwhile(lambda: again(engine, want)):
        node.kill_broker()
    # Own blocks need no broker.
    everything_is_found(engine, want)
    if not ledger:
        for file in node.directory.glob("*ledger*"):
            file.unlink()
    node.start_broker()
    eventually("the engine to be back", lambda: engine.native("connected"))
    again(engine, want)
    eventually("a lease", engine.leased)
    again(engine, want)
    everything_is_found(engine, want)


def test_corrupted_bytes_change_the_tokens(engine, donors, want) -> None:
    """Without this, all the above could pass with nothing loaded."""
    everything_is_found(engine, want)
    assert corrupt(donors[-1].pid) > 0
    results = engine.generate(of.evicting(), of.ANSWER, at_once=False)
    wrong = [name for name, tokens in of.said(results).items() if tokens != want[name]]
    assert wrong, "the donor's bytes are not used"
    assert engine.ask("flush")
    again(engine, want)


def test_an_engine_that_is_killed_gives_back_what_it_had(engine, node, want) -> None:
    with pytest.raises(EngineError), of.Meanwhile(lambda: again(engine, want)):
        hits = engine.native("loaded_nvlink_bytes")
        eventually("loads under way", lambda: engine.native("loaded_nvlink_bytes") > hits)
        engine.kill()
    eventually("its leases to be free", lambda: not node.status()["leases"])
    of.connect(engine, node, **LIFE)
    again(engine, want)
    everything_is_found(engine, want)


@pytest.mark.parametrize("survives", [True, False], ids=["kept", "twin-with-the-broker"])
def test_an_engine_that_is_killed_while_it_stores_comes_back_warm(engine, node, donors, want, survives) -> None:
    """What it had published waits for it, unless the broker dies with it: then nobody can say what is in the slabs."""
    node.kill_broker()
    node.start_broker(estate_ttl_ms=KEPT)
    eventually("the engine to be back", lambda: engine.native("connected"))
    eventually("a lease", engine.leased)
    again(engine, want)
    everything_is_found(engine, want)
    fresh = {f"{survives}-{number}": of.tokens(f"{survives}-{number}", 450) for number in range(30)}
    with pytest.raises(EngineError), of.Meanwhile(lambda: engine.generate(fresh, of.ANSWER, at_once=False)):
        stored = engine.native("stored_blocks")
        eventually("stores under way", lambda: engine.native("stored_blocks") > stored)
        if not survives:
            node.kill_broker()
        engine.kill()
    if survives:
        eventually("an estate", lambda: node.status()["total"]["estate"])
    else:
        node.start_broker(estate_ttl_ms=KEPT)
        eventually("the donor to be back", lambda: node.status()["total"]["offered"])
        eventually("all to be free", lambda: not node.status()["leases"])
    of.connect(engine, node, **LIFE)
    results = engine.generate(of.evicting(), of.ANSWER, at_once=False)
    of.right(results, want)
    assert of.cached(results) == (sum(map(pages, of.evicting().values())) if survives else 0)
    if survives:
        eventually("it to inherit", lambda: node.status()["counters"]["inherited_leases"])
    everything_is_found(engine, want)
