"""SwiftCache as a KV connector of vLLM: a neighbour's idle HBM as prefix cache.

    vllm serve MODEL --kv-transfer-config \\
      '{"kv_connector":"SwiftCacheConnector","kv_connector_module_path":"swiftcache.vllm","kv_role":"kv_both"}'
"""

import contextlib

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from swiftcache.vllm.connector import SwiftCacheConnector

# vLLM's MultiConnector finds the counters of its connectors by name only.
with contextlib.suppress(ValueError):
    KVConnectorFactory.register_connector("SwiftCacheConnector", "swiftcache.vllm", "SwiftCacheConnector")

__all__ = ["SwiftCacheConnector"]
