"""Four GPUs of one node, on real vLLM: many donors, many borrowers, tensor parallelism.

ranks: an engine of two ranks, on the first two GPUs, borrows from an engine that lends half of its pool on the third
and from an elastic donor on the fourth. Tokens and logprobs of loaded KV are compared with those of a local prefix hit,
and the control, which loads wrong blocks, must differ. When does the first token come, by where the prefix is? What
does the lender notice of being read from? Then a burst has the lender take its memory back while the borrower is in the
middle of an answer, which must stay the same.

pairs: two engines on the first two GPUs borrow from donors on the other two, both from both. They want all that is
lent, and have weights of three and one: what do they hold? Their tokens are compared as above, while both work.

links: readers on the first two GPUs load from donors on the other two: each pair by itself, and two pairs side by side.

The result is a table and four.json. Simulated devices show that it runs; their figures mean nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes
from context import forget, one_by_one, same
from ground import (
    HERE,
    V2,
    Donors,
    Engine,
    GiB,
    Ground,
    MiB,
    Told,
    chosen,
    eventually,
    hbm_used,
    log_file,
    ranked,
    started,
)

ANSWER = 24
LONG_ANSWER = 96
WEIGHTS = {"large": 3, "small": 1}
"""Of tenants."""

Result = dict[str, dict[str, Any]]


class Size:
    """How much of everything."""

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        self.shape = "tiny" if cpu else "qwen3-8b"
        self.prompts, self.shortest, self.longest = (4, 150, 300) if cpu else (8, 15_000, 25_000)
        self.pool = 64 * MiB if cpu else 24 * GiB
        """Of an engine, each rank's part."""
        self.lender_pool = 8 * MiB if cpu else 48 * GiB
        self.slab = MiB // 2 if cpu else 256 * MiB
        self.elastic = 4 * MiB if cpu else 16 * GiB
        self.burst, self.burst_length = (8, 300) if cpu else (28, 8000)
        self.times = 3 if cpu else 12
        self.lent = 8 * MiB if cpu else 12 * GiB
        """By each donor of `pairs` and `links`."""
        self.seconds = 0.5 if cpu else 4.0
        """That readers read."""


class Place:
    def __init__(self, ground: Ground, size: Size, report: Path) -> None:
        self.ground, self.size, self.report = ground, size, report

    def engine(self, name: str, own: list[int], pool: int, settings: dict[str, Any]) -> Engine:
        """On these devices, one rank on each."""
        size = self.size
        longest = max(size.longest + LONG_ANSWER, size.burst_length) + 64
        options: dict[str, Any] = {
            "model": str(shapes.make(size.shape, self.report)),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": longest if size.cpu else shapes.LIMIT,
            "max_num_batched_tokens": 512 if size.cpu else 8192,
            "kv_cache_memory_bytes": pool,
            "gpu_memory_utilization": 0.7,
            "disable_log_stats": True,
        } | ranked(len(own))
        environment = V2 | {"CUDA_VISIBLE_DEVICES": self.ground.visible(own)}
        settings = {"socket": self.ground.socket, "lookup_ms": 60_000} | settings
        if size.cpu:
            options |= {"dtype": "float32", "block_size": 32, "enforce_eager": True}
            environment, settings = {}, settings | {"device": self.ground.devices[own[0]]}
        return started(log_file(self.report, f"four {name}"), environment, **options, connector=settings)

    def prompts(self, name: str, count: int, lengths: tuple[int, int]) -> dict[str, list[int]]:
        source, vocabulary = random.Random(name), shapes.SHAPES[self.size.shape]["vocab_size"]
        return {
            f"{name} {number}": [source.randrange(vocabulary) for _ in range(source.randint(*lengths))]
            for number in range(count)
        }

    def work(self, name: str) -> dict[str, list[int]]:
        return self.prompts(name, self.size.prompts, (self.size.shortest, self.size.longest))


def equal(one: Result, other: Result) -> int:
    return sum(same(one[name], other[name]) for name in one)


def first_token(engine: Engine, name: str, tokens: list[int]) -> float:
    """Milliseconds until the only token of an answer."""
    engine.ask("add", name=name, tokens=tokens, max_tokens=1)
    return 1e3 * sum(engine.ask("step", count=0)["seconds"])


def compare(engine: Engine, work: dict[str, list[int]]) -> tuple[Result, dict[str, Any]]:
    """What a local prefix hit gives, and how loaded KV compares with that."""
    one_by_one(engine, work, ANSWER)
    truth = one_by_one(engine, work, ANSWER)
    forget(engine)
    loaded = one_by_one(engine, work, ANSWER)
    forget(engine)
    engine.ask("repeat", on=True)
    control = one_by_one(engine, work, ANSWER)
    engine.ask("repeat", on=False)
    forget(engine)
    found = {
        "prompts": len(work),
        "equal": equal(truth, loaded),
        "cached_tokens": sum(of["cached"] for of in loaded.values()),
        "cached_tokens_locally": sum(of["cached"] for of in truth.values()),
        "control_equal": equal(truth, control),
    }
    found["passed"] = (
        found["equal"] == len(work) > found["control_equal"]
        and 0 < found["cached_tokens"] == found["cached_tokens_locally"]
    )
    return truth, found


class Beside:
    """Does something again and again, on a thread of its own, until it is left."""

    def __init__(self, what: Callable[[], Any]) -> None:
        self._what, self._over = what, threading.Event()
        self._thread = threading.Thread(target=self._go)
        self.times = 0
        self.failed: BaseException | None = None

    def _go(self) -> None:
        try:
            while not self._over.is_set():
                self._what()
                self.times += 1
        except BaseException as reason:
            self.failed = reason

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self.failed is not None:
            raise self.failed


def ranks(place: Place) -> dict[str, Any]:
    size, ground = place.size, place.ground
    lender_device, elastic_device = ground.devices[2:4]
    lends = {"lend": 0.5, "lend_after_ms": 0, "max_leased_bytes": 0}
    ground.lend_idle(elastic_device, size.elastic, size.slab)
    lender = place.engine("lender", [2], size.lender_pool, lends)
    try:

        def lent() -> bool:
            # It lends in steps, and takes some without requests for that.
            lender.ask("settle")
            return ground.offered(lender_device) > 0

        first_token(lender, "first", *place.prompts("first", 1, (64, 64)).values())
        eventually("the lender to lend", lent)
        all_lent = ground.offered(lender_device) + ground.offered(elastic_device)
        # Each rank may have half, so that both need both.
        wanted = {"max_leased_bytes": all_lent // 2, "lease_step_bytes": all_lent // 2}
        borrower = place.engine("two ranks", [0, 1], size.pool, wanted)
        try:
            return _ranks(place, lender, borrower)
        finally:
            borrower.close()
    finally:
        lender.close()


def _ranks(place: Place, lender: Engine, borrower: Engine) -> dict[str, Any]:
    size, ground = place.size, place.ground
    lender_device, elastic_device = ground.devices[2:4]
    eventually("leases of both donors", lambda: min(map(ground.leased, (lender_device, elastic_device))) > 0)
    eventually("leases of both ranks", lambda: borrower.ask("leased"))
    held = {"of the lender": ground.leased(lender_device), "of the elastic donor": ground.leased(elastic_device)}
    work = place.work("ranks")
    truth, found = compare(borrower, work)
    print(f"ranks: {found['equal']} of {found['prompts']} equal", flush=True)

    names = list(work)[:3]
    times: dict[str, list[float]] = {"computed": [], "loaded": [], "resident": []}
    for number in range(size.times):
        name = names[number % len(names)]
        times["loaded"].append(first_token(borrower, f"loaded {number}", work[name]))
        times["resident"].append(first_token(borrower, f"resident {number}", work[name]))
        forget(borrower)
        fresh = place.prompts(f"computed {number}", 1, (len(work[name]), len(work[name])))
        times["computed"].append(first_token(borrower, f"computed {number}", *fresh.values()))
        forget(borrower)

    turns = place.prompts("lender", 3, (size.burst_length // 2, size.burst_length))
    for name, tokens in turns.items():
        first_token(lender, name, tokens)

    def of_the_lender(phase: str) -> list[float]:
        of = [(name, tokens) for name, tokens in turns.items() for _ in range(size.times)]
        return [first_token(lender, f"{phase} {number} {name}", tokens) for number, (name, tokens) in enumerate(of)]

    noticed = {"alone": of_the_lender("alone")}
    numbers = itertools.count()

    def read() -> None:
        for tokens in work.values():
            first_token(borrower, f"reading {next(numbers)}", tokens)
        forget(borrower)

    with Beside(read) as reading:
        noticed["read from"] = of_the_lender("read from")
    noticed["alone again"] = of_the_lender("alone again")

    # In mid-answer, on loaded KV, the lender needs its pool.
    name = max(work, key=lambda one: len(work[one]))
    one_by_one(borrower, {name: work[name]}, LONG_ANSWER)
    long_truth = one_by_one(borrower, {name: work[name]}, LONG_ANSWER)
    forget(borrower)
    lent_before, taken = ground.leased(lender_device), ground.status()["counters"]["revocations"]
    borrower.ask("add", name=name, tokens=work[name], max_tokens=LONG_ANSWER, logprobs=True)
    borrower.ask("step", count=8)
    burst = place.prompts("burst", size.burst, (size.burst_length, size.burst_length))
    for called, tokens in burst.items():
        lender.ask("add", name=called, tokens=tokens, max_tokens=ANSWER)
    done: Result = {}
    with Beside(lambda: done.update(borrower.ask("step", count=1)["finished"])):
        answered = lender.finish()
        eventually("the answer", lambda: name in done)
    # It may have lent the same again by now.
    lent_after, taken = ground.leased(lender_device), ground.status()["counters"]["revocations"] - taken
    forget(borrower)
    again = one_by_one(borrower, work, ANSWER)
    found |= {
        "held": held,
        "first_token_ms": times,
        "lender_ms": noticed,
        "read_meanwhile": reading.times,
        "burst": {
            "lent_before": lent_before,
            "lent_after": lent_after,
            "taken_back": taken,
            "answered": len(answered),
            "equal": equal(long_truth, done),
            # What went with the lender's memory is computed again, in other shapes: only what was found counts.
            "found_again": sum(of["cached"] for of in again.values()),
            "equal_again": sum(equal({one: truth[one]}, {one: of}) for one, of in again.items() if of["cached"]),
            "loaded_again": sum(of["cached"] > 0 for of in again.values()),
        },
    }
    found["passed"] = (
        found["passed"]
        and taken > 0
        and len(answered) == size.burst
        and found["burst"]["equal"] == 1
        and reading.times > 0
    )
    return found


def pairs(place: Place) -> dict[str, Any]:
    size, ground = place.size, place.ground
    devices = ground.devices[2:4]
    whole = size.lent * len(devices)
    Donors(ground, whole, size.slab, devices)
    engines: dict[str, Engine] = {}
    try:
        for number, tenant in enumerate(WEIGHTS):
            wanted = {"tenant": tenant, "salt": tenant, "max_leased_bytes": whole, "lease_step_bytes": whole}
            engines[tenant] = place.engine(f"tenant {tenant}", [number], size.pool, wanted)

        def leased() -> dict[str, float]:
            return {tenant: engine.ask("stats")["leased_bytes"] for tenant, engine in engines.items()}

        share = whole / sum(WEIGHTS.values())

        def fair() -> dict[str, float] | None:
            held = leased()
            near = all(abs(held[tenant] - weight * share) <= size.slab for tenant, weight in WEIGHTS.items())
            return held if near else None

        held = eventually("both to hold what their weights say", fair)
        holders = {device: sorted(_holders(ground, device)) for device in devices}

        def work(tenant: str) -> dict[str, Any]:
            # One prompt: what the smaller one holds has to be enough.
            prompt = dict([next(iter(place.work(tenant).items()))])
            return compare(engines[tenant], prompt)[1]

        with concurrent.futures.ThreadPoolExecutor() as pool:
            compared = dict(zip(engines, pool.map(work, engines), strict=True))
        print(f"pairs: {json.dumps(held)}", flush=True)
        passed = all(of["passed"] for of in compared.values())
        both = all(len(of) == len(engines) for of in holders.values())
        return {"held": held, "whole": whole, "holders": holders, "engines": compared, "passed": passed and both}
    finally:
        for engine in engines.values():
            engine.close()


def _holders(ground: Ground, device: str) -> set[str]:
    """Whose leases lie on a device."""
    return {lease["borrower"] for lease in ground.status()["leases"] if lease["device"] == device}


def links(place: Place) -> dict[str, Any]:
    """Bytes a second of each pair by itself, and of two pairs at the same time."""
    rows = [_side_by_side(place, pairs) for pairs in ([(0, 2), (1, 3)], [(0, 3), (1, 2)])]
    for row in rows:
        print(f"links: {json.dumps(row)}", flush=True)
    return {"pairs": rows, "passed": all(one["wrong"] == 0 for row in rows for one in row["of"])}


def _side_by_side(place: Place, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    size, ground = place.size, place.ground
    readers: list[Told] = []
    donors: list[Donors] = []
    try:
        for own, donor in pairs:
            donors.append(Donors(ground, size.lent, size.slab, [ground.devices[donor]]))
            task = {
                "socket": ground.socket,
                "device": ground.devices[own],
                "cuda": not size.cpu,
                "name": f"links {own} {donor}",
                "leased_bytes": size.lent,
                "layers": 4 if size.cpu else 36,
                "page": 8 * 1024 if size.cpu else 64 * 1024,
            }
            log = log_file(place.report, f"four reader {own} {donor}")
            environment = {} if size.cpu else {"CUDA_VISIBLE_DEVICES": ground.visible([own])}
            readers.append(Told([sys.executable, HERE / "reader.py"], log, environment))
            # It leases all of this donor before the next one comes.
            readers[-1].ask("begin", task=task)
        alone = [reader.ask("read", seconds=size.seconds) for reader in readers]
        for reader in readers:
            reader.say("read", seconds=size.seconds)
        together = [reader.answer() for reader in readers]
        of = [
            {
                "pair": [own, donor],
                "alone": one["bytes_per_second"],
                "together": other["bytes_per_second"],
                "wrong": one["wrong"] + other["wrong"],
            }
            for (own, donor), one, other in zip(pairs, alone, together, strict=True)
        ]
        share = sum(one["together"] for one in of) / sum(one["alone"] for one in of)
        return {"of": of, "together_of_alone": share}
    finally:
        for reader in readers:
            reader.close()
        for donor in donors:
            donor.close()


def table(results: dict[str, Any]) -> str:
    rows = []
    for name, of in results.items():
        if "error" not in of:
            rows += TABLES[name](of)
        rows.append(f"{name}: {'passed' if of['passed'] else 'FAILED ' + of.get('error', '')[:300]}")
    return "\n".join(rows)


def _times(what: str, of: dict[str, list[float]]) -> list[str]:
    rows = [f"| {what} | first token: median | slowest |", "|---|---:|---:|"]
    return rows + [f"| {name} | {statistics.median(ms):.1f} ms | {max(ms):.1f} |" for name, ms in of.items()]


def table_of_ranks(of: dict[str, Any]) -> list[str]:
    held = ", ".join(f"{leased / GiB:.2f} GiB {whose}" for whose, leased in of["held"].items())
    burst = of["burst"]
    return [
        f"ranks: {of['equal']} of {of['prompts']} equal to a local hit, {of['cached_tokens']:,} tokens from donors, "
        f"control {of['control_equal']}; leased {held}",
        *_times("two ranks: prefix", of["first_token_ms"]),
        *_times("lender", of["lender_ms"]),
        f"burst: {burst['taken_back']} revocations in mid-answer (lent {burst['lent_before'] / GiB:.2f} -> "
        f"{burst['lent_after'] / GiB:.2f} GiB), the answer {'is equal' if burst['equal'] else 'DIFFERS'}; afterwards "
        f"{burst['loaded_again']} of {of['prompts']} are loaded, {burst['equal_again']} of these equal",
    ]


def table_of_pairs(of: dict[str, Any]) -> list[str]:
    held = ", ".join(f"{tenant} {leased / of['whole']:.3f}" for tenant, leased in of["held"].items())
    same = ", ".join(f"{tenant} {one['equal']} of {one['prompts']}" for tenant, one in of["engines"].items())
    return [f"pairs: of all that is lent hold {held} (weights {json.dumps(WEIGHTS)}); equal: {same}"]


def table_of_links(of: dict[str, Any]) -> list[str]:
    rows = ["| pair | alone | together | sum of both, together / alone |", "|---|---:|---:|---:|"]
    for row in of["pairs"]:
        for number, one in enumerate(row["of"]):
            share = f"{row['together_of_alone']:.3f}" if number == 0 else ""
            rates = f"{one['alone'] / 1e9:.1f} GB/s | {one['together'] / 1e9:.1f} GB/s"
            rows.append(f"| {one['pair'][0]} <- {one['pair'][1]} | {rates} | {share} |")
    return rows


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {"links": links, "pairs": pairs, "ranks": ranks}
TABLES = {"links": table_of_links, "pairs": table_of_pairs, "ranks": table_of_ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for four.json and logs")
    parser.add_argument("--cpu", action="store_true", help="try the script: vLLM's CPU build, simulated devices")
    parser.add_argument("--only", default="", help="parts whose names this regular expression finds")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    wanted = chosen(PARTS, args.only)
    results: dict[str, Any] = {}
    weights = ",".join(f"{os.getuid()}/{tenant}={weight}" for tenant, weight in WEIGHTS.items())
    before = hbm_used()
    for name, part in wanted.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            options = ("--tenant-weights", weights)
            ground = Ground(Path(directory), args.programs, cpu=args.cpu, simulated=4, broker=options)
            if len(ground.devices) < 4:
                sys.exit(f"four GPUs are needed, and there are {len(ground.devices)}")
            try:
                ground.start_broker()
                results[name] = part(Place(ground, Size(args.cpu), args.report))
            except Exception as reason:
                results[name] = {"passed": False, "error": str(reason)}
            finally:
                ground.close()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        said = {"on": ground.hardware, "parts": results, "HBM before, MiB": before, "HBM after, MiB": hbm_used()}
        (args.report / "four.json").write_text(json.dumps(said))
    print(f"{ground.hardware}\n{table(results)}")
    leak = any(now - was >= 64 for was, now in zip(before, hbm_used(), strict=True))
    sys.exit(leak or not all(of["passed"] for of in results.values()))


if __name__ == "__main__":
    main()
