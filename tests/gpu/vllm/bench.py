"""Time to the first token of a conversation's next turn, on real vLLM, by where the prefix comes from.

Arms: computed again; vLLM's OffloadingConnector and LMCache (pinned host memory); SwiftCache from a neighbour's HBM,
from its host tier, from host memory that is lent to all engines, and while the donor takes everything back every few
seconds; resident in the engine's own pool.
They run as `vllm serve` does by itself, but for two that run as `load: sync` needs it. All see the same conversations:
clients that wait for each answer, and turns that arrive at a fixed rate whatever the engine does. Engines start
together, as many as fit. Then one after the other is talked to for a round while the others rest, and so on: what a
machine does better or worse for some seconds, all arms have their part of. With `--methods` connectors note what their
engines do for each turn. The result is a table, bench.json, and bench.svg where matplotlib is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import methods
import shapes
from ground import (
    ENGINE_ENVIRONMENT,
    HERE,
    V1,
    V2,
    GiB,
    Ground,
    Told,
    ToldError,
    chosen,
    eventually,
    hbm,
    hbm_used,
    log_file,
)
from lmcache_server import serving
from talk import add, conversations, steps, to_say

ARMS: dict[str, dict[str, Any]] = {
    "resident": {"environment": V2, "resident": True},
    "SwiftCache": {"environment": V2, "settings": {}},
    "SwiftCache, load: wait": {"environment": V2, "settings": {"load": "wait"}},
    "OffloadingConnector": {"environment": V2, "offload": True},
    "LMCache": {"environment": V2, "lmcache": True},
    "SwiftCache, withdrawn every 5 s": {"environment": V2, "settings": {}, "withdraw": 5.0},
    "SwiftCache, host tier": {"environment": V2, "settings": {}, "host": True},
    "SwiftCache, host memory": {"environment": V2, "settings": {}, "lent_by": "HOST-0"},
    "SwiftCache sync, V1": {
        "environment": V1,
        "options": {"async_scheduling": False},
        "settings": {"load": "sync"},
    },
    "resident, V1": {"environment": V1, "options": {"async_scheduling": False}, "resident": True},
    "computed again": {"environment": V2},
}


def arms(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """As they are chosen."""
    found = chosen(ARMS, args.only)
    if importlib.util.find_spec("lmcache") is None and found.pop("LMCache", None):
        print("LMCache: not measured, it is not installed", flush=True)
    if not found:
        sys.exit("no other arm was chosen")
    if args.cpu or args.eager:
        found = {
            name: arm | {"options": arm.get("options", {}) | {"enforce_eager": True}} for name, arm in found.items()
        }
    if args.cpu:
        found = {name: arm | {"environment": {}} for name, arm in found.items()}
    return found


TOKENS = 20_000
"""Of a conversation's history, on average: from three quarters of that to five."""


class Size:
    """How much of everything."""

    def __init__(self, args: argparse.Namespace) -> None:
        cpu, few = args.cpu, args.few
        self.shape = "tiny" if cpu else "qwen3-8b"
        tokens = 300 if cpu else args.tokens
        self.shortest, self.longest = 3 * tokens // 4, 5 * tokens // 4
        self.new, self.answer = (32, 8) if cpu else (256, 32)
        self.rounds = 1 if cpu else 5 if few else 2
        turns = 1 + self.rounds * (len(args.clients) + len(args.rates))
        self.grows = turns * (self.new + self.answer)
        """Tokens that a conversation has more in the end."""
        self.limit = 1024 if cpu else max(shapes.LIMIT, self.longest + self.grows)
        self.slab = 8 << 20 if cpu else 256 << 20
        self.beside = 64 << 20 if cpu else 20 * GiB
        """What an engine takes of HBM beside its pool: weights, activations, graphs and CUDA's own."""
        if cpu:
            self.conversations, self.local, self.resident, self.lent = 4, 64 << 20, 64 << 20, 256 << 20
        elif few:
            self._few(max(args.clients))
        else:
            self.conversations = 16
            self.local, self.resident, self.lent = (pool * args.tokens // TOKENS * GiB for pool in (12, 56, 72))
        self.hbm = 2 * (self.resident + self.beside) if cpu else hbm()
        self.apart = cpu or len(hbm_used()) > 1
        """Donors lend another GPU's HBM. Where there is one, they lend that of the engines' own."""

    def _few(self, clients: int) -> None:
        """So few conversations that several engines and a donor fit on one GPU. The local pool has room for a turn of
        each client, and all other conversations fill it before one has its next turn."""
        self.conversations = clients
        while True:
            self.conversations += 1
            lengths = sorted(len(history) for history in conversations(to_say(self)).histories)
            turns, all_of_them = (sum(some) + len(some) * self.grows for some in (lengths[-clients:], lengths))
            # vLLM starts with no pool that is smaller than a context may be long.
            turns = max(turns, self.limit)
            if sum(lengths[:-1]) >= turns:
                break
        # 2 %: the last blocks and slabs are not full.
        self.local, self.resident = (
            -(-tokens * shapes.token_bytes(self.shape, 2) * 102 // 100 // GiB) * GiB for tokens in (turns, all_of_them)
        )
        self.lent = self.resident

    def pool(self, arm: dict[str, Any]) -> int:
        return self.resident if arm.get("resident") else self.local

    def needs(self, arm: dict[str, Any], host: int) -> list[float]:
        """Which parts an arm takes of the engines' GPU, of the donors' and of `host` bytes of host memory."""
        own, lent, pinned = self.pool(arm) + self.beside, 0, 0
        if {"offload", "lmcache", "host", "lent_by"} & arm.keys():
            pinned = self.lent
        elif "settings" in arm and self.apart:
            lent = self.lent
        elif "settings" in arm:
            own += self.lent
        return [own / self.hbm, lent / self.hbm, pinned / host]


def together(found: dict[str, dict[str, Any]], size: Size, host: int) -> list[list[str]]:
    """The arms whose engines run at the same time: so many, in order, as fit into HBM and host memory."""
    batches: list[list[str]] = []
    taken: list[float] = []
    for name, arm in found.items():
        needs = size.needs(arm, host)
        if batches and all(one + other <= 1 for one, other in zip(taken, needs, strict=True)):
            batches[-1].append(name)
            taken = [one + other for one, other in zip(taken, needs, strict=True)]
        else:
            batches.append([name])
            taken = needs
    return batches


def connector(
    arm: dict[str, Any], ground: Ground, size: Size, port: int, watched: bool = False
) -> dict[str, Any] | None:
    """`port`: LMCache's server's. `watched`: one that notes what its engine does, if there is one of this kind."""
    if arm.get("offload"):
        extra = {"cpu_bytes_to_use": size.lent}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if arm.get("lmcache"):
        extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port}
        return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if "settings" not in arm:
        nothing = {"kv_connector": "WatchedNothing", "kv_connector_module_path": "watched", "kv_role": "kv_both"}
        return nothing if watched else None
    settings = {"socket": ground.socket, "max_leased_bytes": size.lent, "lease_step_bytes": size.lent}
    if arm.get("lent_by"):
        settings |= {"max_host_leased_bytes": size.lent}
    if arm.get("host"):
        settings |= {"max_leased_bytes": 0, "host_tier_bytes": size.lent}
        del settings["lease_step_bytes"]
    return {
        "kv_connector": "WatchedSwiftCache" if watched else "SwiftCacheConnector",
        "kv_connector_module_path": "watched" if watched else "swiftcache.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings | arm["settings"],
    }


class Withdrawals:
    """Has a donor take everything back every few seconds, and offer it again."""

    def __init__(self, ground: Ground, donor: subprocess.Popen[bytes], every: float, size: Size) -> None:
        self._ground, self._donor, self._every, self._size = ground, donor, every, size
        self.count = 0

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._go, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _go(self, over: threading.Event) -> None:
        while not over.wait(self._every):
            self._ground.withdraw(self._donor)
            self._donor.wait()
            self._donor = self._ground.lend(self._size.lent, self._size.slab)
            self.count += 1


class Trial:
    """One arm: an engine on a node of its own, and LMCache's server where the arm needs one."""

    def __init__(self, name: str, arm: dict[str, Any], size: Size, args: Any) -> None:
        """They start, and `begin` waits for them."""
        self._arm, self._size, self._left = arm, size, args.arm_limit
        self._rounds: dict[str, Any] = {}
        self._withdrawals: Withdrawals | None = None
        self._watched = args.methods and not {"offload", "lmcache"} & arm.keys()
        self.error = ""
        """Nothing more is to be done of it."""
        log = log_file(args.report, f"bench {name}")
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.ground = Ground(directory, args.programs, cpu=args.cpu)
            stack.callback(self.ground.close)
            self.ground.start_broker()
            port = 0
            if arm.get("lmcache"):
                _, port = stack.enter_context(serving(log, size.lent / GiB))
            self._notes = directory / "notes"
            environment = ENGINE_ENVIRONMENT | arm["environment"] | {methods.FILE: str(self._notes)}
            self._engine = Told([sys.executable, HERE / "talk.py"], log, environment)
            stack.callback(self._engine.close)
            connected = connector(arm, self.ground, size, port, self._watched)
            self._engine.say("start", options=self._options(args), connector=connected)
            self._stack = stack.pop_all()

    def _options(self, args: Any) -> dict[str, Any]:
        size, pool = self._size, self._size.pool(self._arm)
        options = {
            "model": str(shapes.make(size.shape, args.report, size.limit)),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": size.limit,
            "max_num_batched_tokens": 8192,
            "kv_cache_memory_bytes": pool,
            # Others start at the same time: so much has to be free.
            "gpu_memory_utilization": (pool + size.beside) / size.hbm,
        } | self._arm.get("options", {})
        if args.cpu:
            options |= {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 1024}
            options |= {"gpu_memory_utilization": 0.9}
        return options

    def started(self) -> None:
        """Waits until the engine has started."""
        with self._limited():
            self._engine.answer(self._left)

    def begin(self) -> None:
        """Has it lent what it borrows, and the conversations' histories computed."""
        arm, size = self._arm, self._size
        with self._limited():
            if "settings" in arm and not arm.get("host"):
                donor = self.ground.lend(size.lent, size.slab, arm.get("lent_by"))
                eventually("all of it to be leased", lambda: self.ground.leased() >= size.lent)
                if "withdraw" in arm:
                    self._withdrawals = Withdrawals(self.ground, donor, arm["withdraw"], size)
            self._engine.ask("begin", within=self._left, task=to_say(size))

    def measure(self, load: str, do: str, arguments: dict[str, Any]) -> None:
        """Adds a part of a load."""
        with self._limited(), self._withdrawals.going_on() if self._withdrawals else contextlib.nullcontext():
            part = self._engine.ask(do, within=self._left, **arguments)
            if self._watched:
                noted = eventually("the engine's notes", lambda: self._noted(part["turns"]))
                for turn in part["turns"]:
                    turn["methods"] = methods.rows(turn, noted[turn["request"]])
            add(self._rounds, load, part)

    def _noted(self, turns: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What was noted, if there is all of these: an engine writes its notes when everything is answered."""
        noted = methods.notes(self._notes)
        return noted if all(methods.complete(noted.get(turn["request"], {})) for turn in turns) else {}

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Takes what an arm may take of time, and notes why it is not measured."""
        began = time.monotonic()
        try:
            yield
        except (ToldError, OSError, AssertionError) as reason:
            self.error = str(reason)
        self._left = max(0.0, self._left - (time.monotonic() - began))

    def result(self) -> dict[str, Any]:
        """What is measured so far, and why there is no more of it."""
        withdrawn = {"withdrawals": self._withdrawals.count} if self._withdrawals else {}
        return {"rounds": self._rounds} | withdrawn | ({"error": self.error} if self.error else {})

    def close(self) -> None:
        self._stack.close()


def going_on(trials: dict[str, Trial]) -> list[Trial]:
    return [trial for trial in trials.values() if not trial.error]


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(rounds: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By load: so many clients, or so many turns a second."""
    found = {}
    for load, of in rounds.items():
        first = [turn["first_ms"] for turn in of["turns"]]
        found[load] = {
            "p50": statistics.median(first),
            "p90": quantile(first, 0.9),
            "p99": quantile(first, 0.99),
            "per_token": statistics.median(turn["per_token_ms"] for turn in of["turns"]),
            "turns_per_second": len(first) / of["seconds"],
            "tokens_per_second": sum(turn["answered"] for turn in of["turns"]) / of["seconds"],
            "cached": sum(turn["cached"] for turn in of["turns"]) / sum(turn["prompt"] for turn in of["turns"]),
        }
    return found


def table(results: dict[str, Any], only: str = "") -> str:
    """`only`: a load."""
    rows = ["| arm | load | first token: p50 | p90 | p99 | time per token | turns a second | tokens a second | found |"]
    rows.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, of in results.items():
        for load, one in summary(of["rounds"]).items():
            if only not in ("", load):
                continue
            rows.append(
                f"| {name} | {load} | {one['p50']:.0f} ms | {one['p90']:.0f} | {one['p99']:.0f} | "
                f"{one['per_token']:.1f} ms | {one['turns_per_second']:.1f} | {one['tokens_per_second']:.0f} | "
                f"{100 * one['cached']:.0f} % |"
            )
        if "error" in of:
            what = "the rest" if of["rounds"] else ""
            rows.append(f"| {name} | {what} | NOT MEASURED: {of['error'].splitlines()[0][:60]} | | | | | | |")
    return "\n".join(rows)


def plot(results: dict[str, Any], file: Path, title: str) -> bool:
    """Medians as points, with whiskers up to the slowest. Returns whether matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = {name: summary(of["rounds"]) for name, of in results.items() if "error" not in of}
    if not measured:
        return True
    loads = list(next(iter(measured.values())))
    figure, axes = pyplot.subplots(1, len(loads), figsize=(5 * len(loads), 0.5 * len(measured) + 1.5), sharey=True)
    for axis, load in zip([axes] if len(loads) == 1 else axes, loads, strict=True):
        names = list(measured)
        medians = [measured[name][load]["p50"] for name in names]
        worst = [measured[name][load]["p99"] - measured[name][load]["p50"] for name in names]
        axis.errorbar(
            medians, names, xerr=[[0] * len(names), worst], fmt="o", color="#4878a8", ecolor="#888888", capsize=3
        )
        axis.grid(axis="x", which="both", alpha=0.3)
        axis.set_xscale("log")
        axis.set_xlabel("ms to the first token (point: median, whisker: p99)")
        axis.set_title(load)
    figure.axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="the directory of swiftcache-broker and swiftcache")
    parser.add_argument("report", type=Path, help="the directory for results and logs")
    parser.add_argument("--cpu", action="store_true", help="try the script: vLLM's CPU build, simulated devices")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--only", default="", help="arms whose names this regular expression finds")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="that wait for answers")
    parser.add_argument("--rates", type=float, nargs="*", default=[6.0], help="turns a second that arrive in any case")
    parser.add_argument("--few", action="store_true", help="conversations: several engines and a donor fit on one GPU")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a conversation, on average")
    parser.add_argument(
        "--methods", action="store_true", help="what the engine does for a turn, part by part; timing takes time"
    )
    parser.add_argument("--within", type=float, default=float("inf"), help="begin no arm after this many seconds")
    parser.add_argument("--arm-limit", type=float, default=600, help="the longest that an arm may take, seconds")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    size, began = Size(args), time.monotonic()
    results: dict[str, Any] = {}
    wanted = arms(args)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = ""

    def keep(trials: dict[str, Trial]) -> dict[str, Any]:
        found = {name: trial.result() for name, trial in trials.items()}
        results.update(found)
        (args.report / "bench.json").write_text(json.dumps({"on": hardware, "shape": size.shape, "arms": results}))
        return found

    for batch in together(wanted, size, memory * 6 // 10):
        if time.monotonic() - began > args.within:
            results |= {name: {"rounds": {}, "error": "the time was over before it began"} for name in batch}
            continue
        with contextlib.ExitStack() as stack:
            trials: dict[str, Trial] = {}
            for name in batch:
                trial = trials[name] = Trial(name, wanted[name], size, args)
                stack.callback(trial.close)
                hardware = f"{trial.ground.hardware}; the lent memory is on {trial.ground.way}"
            for part in (Trial.started, Trial.begin):
                for trial in going_on(trials):
                    part(trial)
            print(f"{time.monotonic() - began:.0f} s: ready: {', '.join(batch)}", flush=True)
            measured = steps(size.rounds, args.clients, args.rates)
            for number, (load, do, arguments) in enumerate(measured):
                for trial in going_on(trials):
                    trial.measure(load, do, arguments)
                found = keep(trials)
                if (load, do, arguments) not in measured[number + 1 :]:
                    print(f"{time.monotonic() - began:.0f} s\n{table(found, load)}", flush=True)
    title = (
        f"Next turn of {size.conversations} conversations of {size.shortest:,}-{size.longest:,} tokens, {size.shape}"
    )
    plot(results, args.report / "bench.svg", f"{title}\n{hardware}")
    print(table(results))
    if args.methods:
        print(methods.table({name: of["rounds"] for name, of in results.items()}))
    sys.exit(any("error" in of for of in results.values()))


if __name__ == "__main__":
    main()
