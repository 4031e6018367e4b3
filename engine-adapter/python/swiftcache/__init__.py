"""SwiftCache: a neighbour's idle HBM as prefix KV cache.

`Connection` is a process's session with the node's broker. `Cache` is an engine worker's cache: it stores blocks of
the engine's KV pool in leased HBM and loads them back, layer by layer. Trouble of any kind is a miss, never an error.
`Loans` keeps what an engine lends of its own pool.

`swiftcache.engine` is what every engine's adapter needs, `swiftcache.vllm` and `swiftcache.sglang` are the adapters for
vLLM and SGLang.
"""

from swiftcache._native import Cache, Connection, Hit, Load, Loans, Mark, Store, __version__

__all__ = ["Cache", "Connection", "Hit", "Load", "Loans", "Mark", "Store", "__version__"]
