"""SwiftCache as an external cache linker of SGLang: a neighbour's idle HBM behind its radix tree.

    python -m sglang.launch_server --model-path MODEL --page-size 64 \\
      --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic \\
      --unified-cache-external-linker-config \\
      '{"linker":"SwiftCacheLinker","linker_module_path":"swiftcache.sglang"}'
"""

from swiftcache.sglang.linker import SwiftCacheLinker

__all__ = ["SwiftCacheLinker"]
