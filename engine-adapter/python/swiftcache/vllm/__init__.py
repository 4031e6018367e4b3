"""SwiftCache as a KV connector of vLLM: a neighbour's idle HBM as prefix cache.

    vllm serve MODEL --kv-transfer-config \\
      '{"kv_connector":"SwiftCacheConnector","kv_connector_module_path":"swiftcache.vllm","kv_role":"kv_both"}'
"""

from swiftcache.vllm.connector import SwiftCacheConnector

__all__ = ["SwiftCacheConnector"]
