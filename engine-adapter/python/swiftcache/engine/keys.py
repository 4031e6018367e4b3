"""Keys of blocks: what of an engine's block hash names a block in the cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b

KEY_BYTES = 16


class Keys:
    """Makes keys from block hashes that name a block and all before it. After a reset they are other ones."""

    def __init__(self) -> None:
        self._reset = b""

    def of(self, hashes: Iterable[bytes], salt: bytes = b"") -> bytes:
        """One key after the other. Before any reset every engine has the same for the same hash and salt. `salt`: what
        tells blocks of equal hash apart, such as the part of a model that they are of; at most 48 bytes."""
        if key := self._reset + salt:
            return b"".join(blake2b(one, key=key, digest_size=KEY_BYTES).digest() for one in hashes)
        # A long prompt has thousands of them, and its first token waits for this: a list takes a third of a generator.
        return b"".join([one[:KEY_BYTES] for one in hashes])

    @staticmethod
    def private() -> str:
        """What no other engine has."""
        return os.urandom(KEY_BYTES).hex()

    def reset(self) -> None:
        """What was stored until now is found no more, by this engine. Others find it."""
        self._reset = os.urandom(KEY_BYTES)
