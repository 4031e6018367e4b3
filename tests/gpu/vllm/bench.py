"""Time to the first token of a conversation's next turn, on real vLLM, by where the prefix comes from.

Arms: computed again; vLLM's OffloadingConnector and LMCache (pinned host memory); SwiftCache from a neighbour's HBM,
from its host tier, from host memory that is lent to all engines, and while the donor takes everything back every few
seconds; resident in the engine's own pool.
They run as `vllm serve` does by itself, but for two that run as `load: sync` needs it. All see the same conversations:
clients that wait for each answer, and turns that arrive at a fixed rate whatever the engine does. Engines start
together, as many as fit; then one after the other is talked to while the others rest. The result is a table,
bench.json, and bench.svg where matplotlib is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import shapes
from ground import ENGINE_ENVIRONMENT, HERE, V1, V2, Ground, Program, eventually, hbm, hbm_used, log_file
from lmcache_server import serving
from talk import to_say

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
    found = {name: arm for name, arm in ARMS.items() if re.search(args.only, name)}
    if importlib.util.find_spec("lmcache") is None and found.pop("LMCache", None):
        print("LMCache: not measured, it is not installed", flush=True)
    if not found:
        sys.exit(f"no arm to measure is called {args.only}")
    if args.cpu or args.eager:
        found = {
            name: arm | {"options": arm.get("options", {}) | {"enforce_eager": True}} for name, arm in found.items()
        }
    if args.cpu:
        found = {name: arm | {"environment": {}} for name, arm in found.items()}
    return found


class Size:
    """How much of everything."""

    def __init__(self, cpu: bool) -> None:
        self.shape = "tiny" if cpu else "qwen3-8b"
        self.conversations = 4 if cpu else 16
        self.shortest, self.longest = (200, 400) if cpu else (15_000, 25_000)
        self.new, self.answer = (32, 8) if cpu else (256, 32)
        self.rounds = 1 if cpu else 2
        self.limit = 1024 if cpu else shapes.LIMIT
        self.local = 64 << 20 if cpu else 12 << 30
        self.resident = 64 << 20 if cpu else 56 << 30
        self.lent = 256 << 20 if cpu else 72 << 30
        self.slab = 8 << 20 if cpu else 256 << 20
        self.beside = 64 << 20 if cpu else 20 << 30
        """What an engine takes of HBM beside its pool: weights, activations, graphs and CUDA's own."""
        self.hbm = 2 * (self.resident + self.beside) if cpu else hbm()
        self.lent_here = 0 if cpu or len(hbm_used()) > 1 else self.lent
        """HBM of the engines' own GPU that a donor lends, where there is no other one."""

    def pool(self, arm: dict[str, Any]) -> int:
        return self.resident if arm.get("resident") else self.local

    def needs(self, arm: dict[str, Any]) -> int:
        """HBM of the engines' GPU, bytes."""
        borrows = "settings" in arm and not {"host", "lent_by"} & arm.keys()
        return self.pool(arm) + self.beside + (self.lent_here if borrows else 0)

    def pinned(self, arm: dict[str, Any]) -> int:
        """Host memory of an arm, bytes."""
        return self.lent if {"offload", "lmcache", "host", "lent_by"} & arm.keys() else 0


def together(found: dict[str, dict[str, Any]], size: Size, most_host: int) -> list[list[str]]:
    """The arms whose engines start at the same time: so many, in order, as fit into HBM and host memory."""
    batches: list[list[str]] = []
    hbm_left = host_left = 0
    for name, arm in found.items():
        needs, pinned = size.needs(arm), size.pinned(arm)
        if not batches or needs > hbm_left or pinned > host_left:
            batches.append([])
            hbm_left, host_left = size.hbm, most_host
        batches[-1].append(name)
        hbm_left, host_left = hbm_left - needs, host_left - pinned
    return batches


def connector(arm: dict[str, Any], ground: Ground, size: Size, port: int) -> dict[str, Any] | None:
    """`port`: LMCache's server's."""
    if arm.get("offload"):
        extra = {"cpu_bytes_to_use": size.lent}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if arm.get("lmcache"):
        extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port}
        return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if "settings" not in arm:
        return None
    settings = {"socket": ground.socket, "max_leased_bytes": size.lent, "lease_step_bytes": size.lent}
    if arm.get("lent_by"):
        settings |= {"max_host_leased_bytes": size.lent}
    if arm.get("host"):
        settings |= {"max_leased_bytes": 0, "host_tier_bytes": size.lent}
        del settings["lease_step_bytes"]
    return {
        "kv_connector": "SwiftCacheConnector",
        "kv_connector_module_path": "swiftcache.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings | arm["settings"],
    }


class Withdrawals:
    """A donor that takes everything back every few seconds, and offers it again."""

    def __init__(self, ground: Ground, donor: subprocess.Popen[bytes], every: float, size: Size) -> None:
        self._ground, self._every, self._size = ground, every, size
        self.donor = donor
        self.count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go)
        self._thread.start()

    def _go(self) -> None:
        while not self._over.wait(self._every):
            self._ground.withdraw(self.donor)
            self.donor.wait()
            self.donor = self._ground.lend(self._size.lent, self._size.slab)
            self.count += 1

    def end(self) -> None:
        self._over.set()
        self._thread.join()


class Trial:
    """One arm: an engine on a node of its own, and LMCache's server where the arm needs one. They start at once."""

    def __init__(self, name: str, arm: dict[str, Any], size: Size, args: Any) -> None:
        self._arm, self._size = arm, size
        self._log = log_file(args.report, f"bench {name}")
        self._limit = args.arm_limit
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.ground = Ground(self.directory, args.programs, cpu=args.cpu)
            stack.callback(self.ground.close)
            self.ground.start_broker()
            port = 0
            if arm.get("lmcache"):
                _, port = stack.enter_context(serving(self._log, size.lent / (1 << 30)))
            environment = os.environ | ENGINE_ENVIRONMENT | arm["environment"]
            self._program = Program([sys.executable, str(HERE / "talk.py")], self._log, environment)
            stack.callback(self._program.close)
            self._started = self.directory / "started"
            options = self._options(args)
            connected = connector(arm, self.ground, size, port)
            self._program.tell({"options": options, "connector": connected, "started": str(self._started)})
            self._stack = stack.pop_all()

    def _options(self, args: Any) -> dict[str, Any]:
        size, pool = self._size, self._size.pool(self._arm)
        options = {
            "model": str(shapes.make(size.shape, args.report)),
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

    def wait(self) -> None:
        """Until the engine has started, or has failed to, or had the time of an arm for it."""
        with contextlib.suppress(AssertionError):
            eventually("an engine", lambda: self._started.exists() or self._program.ended(), self._limit)

    def measure(self, args: Any) -> dict[str, Any]:
        arm, size = self._arm, self._size
        task = to_say(size, args.clients, args.rates) | {"result": str(self.directory / "result.json")}
        back: Withdrawals | None = None
        try:
            if self._program.ended() or not self._started.exists():
                raise ChildProcessError("its engine has not started")
            if "settings" in arm and not arm.get("host"):
                donor = self.ground.lend(size.lent, size.slab, arm.get("lent_by"))
                eventually("all of it to be leased", lambda: self.ground.leased() >= size.lent)
                if "withdraw" in arm:
                    back = Withdrawals(self.ground, donor, arm["withdraw"], size)
            self._program.run(task, self._limit)
            found: dict[str, Any] = {"rounds": json.loads(Path(task["result"]).read_text())}
            if back is not None:
                found["withdrawals"] = back.count
            return found
        except (subprocess.SubprocessError, OSError, AssertionError) as reason:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
            return {"error": f"{reason}\n{tail}"}
        finally:
            if back is not None:
                back.end()

    def close(self) -> None:
        self._stack.close()


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


def table(results: dict[str, Any]) -> str:
    rows = ["| arm | load | first token: p50 | p90 | p99 | time per token | turns a second | tokens a second | found |"]
    rows.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, of in results.items():
        if "error" in of:
            rows.append(f"| {name} | | NOT MEASURED: {of['error'].splitlines()[0][:60]} | | | | | | |")
            continue
        for load, one in summary(of["rounds"]).items():
            rows.append(
                f"| {name} | {load} | {one['p50']:.0f} ms | {one['p90']:.0f} | {one['p99']:.0f} | "
                f"{one['per_token']:.1f} ms | {one['turns_per_second']:.1f} | {one['tokens_per_second']:.0f} | "
                f"{100 * one['cached']:.0f} % |"
            )
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
    parser.add_argument("--within", type=float, default=float("inf"), help="begin no arm after this many seconds")
    parser.add_argument("--arm-limit", type=float, default=600, help="the longest that an arm may take, seconds")
    args = parser.parse_args()
    args.report.mkdir(parents=True, exist_ok=True)
    size, began = Size(args.cpu), time.monotonic()
    results: dict[str, Any] = {}
    chosen = arms(args)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = ""
    for batch in together(chosen, size, memory * 6 // 10):
        if time.monotonic() - began > args.within:
            results |= {name: {"error": "the time was over before it began"} for name in batch}
            continue
        with contextlib.ExitStack() as stack:
            trials = {name: Trial(name, chosen[name], size, args) for name in batch}
            for trial in trials.values():
                stack.callback(trial.close)
            for trial in trials.values():
                trial.wait()
            print(f"{time.monotonic() - began:.0f} s: started: {', '.join(batch)}", flush=True)
            for name, trial in trials.items():
                results[name] = trial.measure(args)
                hardware = f"{trial.ground.hardware}; the lent memory is on {trial.ground.way}"
                print(f"{time.monotonic() - began:.0f} s\n{table({name: results[name]})}", flush=True)
                said = {"on": hardware, "shape": size.shape, "arms": results}
                (args.report / "bench.json").write_text(json.dumps(said))
                trial.close()
    title = (
        f"Next turn of {size.conversations} conversations of {size.shortest:,}-{size.longest:,} tokens, {size.shape}"
    )
    plot(results, args.report / "bench.svg", f"{title}\n{hardware}")
    print(table(results))
    sys.exit(any("error" in of for of in results.values()))


if __name__ == "__main__":
    main()
