"""SwiftCache as an external cache linker of SGLang: a neighbour's idle HBM behind its radix tree.

    python -m sglang.launch_server --model-path MODEL --page-size 64 \\
      --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic \\
      --unified-cache-external-linker-config \\
      '{"linker":"SwiftCacheLinker","linker_module_path":"swiftcache.sglang"}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swiftcache.sglang.linker import SwiftCacheLinker

__all__ = ["SwiftCacheLinker"]


def __getattr__(name: str) -> Any:
    """The linker imports SGLang, which takes long; the parts it is made of do not need it."""
    if name == "SwiftCacheLinker":
        from swiftcache.sglang.linker import SwiftCacheLinker

        return SwiftCacheLinker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
