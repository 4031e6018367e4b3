"""SwiftCache as a KV connector of vLLM: a neighbour's idle HBM as prefix cache, and behind the engine's own KV cache.

    vllm serve MODEL --kv-transfer-config \\
      '{"kv_connector":"SwiftCacheConnector","kv_connector_module_path":"swiftcache.vllm","kv_role":"kv_both"}'
"""

import contextlib
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from swiftcache.vllm.connector import SwiftCacheConnector

# vLLM's MultiConnector finds the counters of its connectors by name only.
with contextlib.suppress(ValueError):
    KVConnectorFactory.register_connector("SwiftCacheConnector", "swiftcache.vllm", "SwiftCacheConnector")


def __getattr__(name: str) -> Any:
    """The stream worker is made over vLLM's worker of this platform when somebody asks for it."""
    if name == "StreamWorker":
        from swiftcache.vllm.stream.worker import stream_worker

        return stream_worker()
    raise AttributeError(f"module {__name__} has no attribute {name}")


__all__ = ["StreamWorker", "SwiftCacheConnector"]
