"""SwiftCache under SGLang on a machine without a GPU: a broker, a donor, and an engine that loads the KV cache for its
second answer from the donor. docs/sglang.md says what to install.

    python engine-adapter/examples/sglang_cpu.py MODEL [PROGRAMS]

MODEL is a directory, or a name on Hugging Face. PROGRAMS is the directory of swiftcache-broker and swiftcache
(target/debug by default).
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOPOLOGY = """
name = "two simulated GPUs on NVLink"
[[device]]
uuid = "SIM-0"
name = "simulated GPU"
hbm_bytes = 1073741824
[[device]]
uuid = "SIM-1"
name = "simulated GPU"
hbm_bytes = 1073741824
[[link]]
between = ["SIM-0", "SIM-1"]
kind = "nvlink"
gigabytes_per_second = 380.0
"""


def start_node(directory: Path, programs: Path) -> tuple[str, list[subprocess.Popen[bytes]]]:
    """Starts a broker and a donor. On a GPU server both run already; see docs/operations.md."""
    topology, address = directory / "topology.toml", str(directory / "broker.sock")
    topology.write_text(TOPOLOGY)
    broker = subprocess.Popen(
        [programs / "swiftcache-broker", "--probe", "simulated", "--topology", topology, "--socket", address]
    )
    with socket.socket(socket.AF_UNIX) as probe:
        while probe.connect_ex(address) != 0:
            time.sleep(0.01)
    lend = f"donate --socket {address} --device SIM-1 --bytes 256MiB --slab 16MiB"
    donor = subprocess.Popen([programs / "swiftcache", *lend.split()])
    return address, [donor, broker]


def main() -> None:
    model, programs = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "target/debug")
    with tempfile.TemporaryDirectory() as directory:
        address, processes = start_node(Path(directory), programs)
        try:
            converse(model, address, str(programs / "swiftcache"))
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def node_status(swiftcache: str, address: str) -> dict:
    """What `swiftcache status` says."""
    asked = subprocess.run([swiftcache, "status", "--json", "--socket", address], stdout=subprocess.PIPE, check=False)
    return json.loads(asked.stdout) if asked.returncode == 0 else {"leases": [], "indexed_blocks": 0}


def converse(model: str, address: str, swiftcache: str) -> None:
    import sglang

    engine = sglang.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        skip_server_warmup=True,
        device="cpu",
        dtype="float32",
        mem_fraction_static=0.2,
        context_length=1024,
        page_size=16,
        # A small pool, so that other requests push a conversation out of it.
        max_total_tokens=2048,
        enable_unified_cache_external_linker=True,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config={
            "linker": "SwiftCacheLinker",
            "linker_module_path": "swiftcache.sglang",
            "linker_extra_config": {"socket": address, "max_leased_bytes": "128MiB"},
        },
    )
    # Wait until the cache has a lease. A server does not need to wait: until then, its requests are misses.
    while not node_status(swiftcache, address)["leases"]:
        time.sleep(0.01)

    def ask(prompt: list[int]) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        return engine.generate(input_ids=prompt, sampling_params=sampling)

    history = [token % 500 for token in range(7, 607)]
    first = ask(history)
    print("first turn: ", len(history), "tokens,", first["meta_info"]["cached_tokens"], "of them cached")

    # Four other conversations need more than the pool has.
    for number in range(4):
        ask([(token * 7 + number) % 500 for token in range(600)])
    while node_status(swiftcache, address)["indexed_blocks"] < 5 * 600 // 16:  # Until all of it can be found.
        time.sleep(0.01)

    history += [*first["output_ids"], 1, 2, 3]
    second = ask(history)["meta_info"]
    print("second turn:", len(history), "tokens,", second["cached_tokens"], "of them from the donor")
    engine.shutdown()


if __name__ == "__main__":
    main()
