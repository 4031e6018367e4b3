"""SwiftCache under vLLM on a machine without a GPU: a broker, a donor, and an engine that loads the KV cache for its
second answer from the donor. docs/vllm.md says what to install.

    python engine-adapter/examples/vllm_cpu.py MODEL [PROGRAMS]

MODEL is a directory, or a name on Hugging Face. PROGRAMS is the directory of swiftcache-broker and swiftcache
(target/debug by default).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

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
            converse(model, address)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def converse(model: str, address: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVEventsConfig, KVTransferConfig

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=32,
        max_model_len=2048,
        distributed_executor_backend="uni",
        kv_transfer_config=KVTransferConfig(
            kv_connector="SwiftCacheConnector",
            kv_connector_module_path="swiftcache.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"socket": address, "max_leased_bytes": "128MiB"},
        ),
        # With KV events, a request counts as stored only when others can find its blocks. This example needs that,
        # because it looks for the blocks at once.
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    # Wait until the cache has a lease. A server does not need to wait: until then, its requests are misses.
    core = llm.llm_engine.engine_core.engine_core
    core.scheduler.connector.scheduler._connection.wait_connected(60)
    cache = get_kv_transfer_group().worker._cache
    cache.wait_open(60)
    while not cache.stats()["leases"]:
        time.sleep(0.01)

    greedy = SamplingParams(temperature=0, max_tokens=16, detokenize=False)
    history = [token % 500 for token in range(7, 607)]
    first = llm.generate({"prompt_token_ids": history}, greedy)[0]
    print("first turn: ", len(history), "tokens,", first.num_cached_tokens, "of them cached")

    while core.scheduler.has_requests():  # A finished request keeps its blocks until they are stored.
        llm.llm_engine.step()
    # Empties vLLM's own prefix cache, so that the blocks that are found now come from the donor.
    assert llm.reset_prefix_cache(), "vLLM could not empty its own prefix cache"

    history += [*first.outputs[0].token_ids, 1, 2, 3]
    second = llm.generate({"prompt_token_ids": history}, greedy)[0]
    print("second turn:", len(history), "tokens,", second.num_cached_tokens, "of them from the donor")
    stats = cache.stats()
    print(f"loaded {stats['loaded_nvlink_bytes']:.0f} bytes over the simulated NVLink")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
