"""An engine: a model with its SwiftCache. It computes the next turn of a conversation from a cached prefix, on its own
stream."""

import functools
import hashlib
from collections.abc import Callable

import torch
from machine import eventually
from model import BLOCK_TOKENS, Model

from swiftcache import Cache, Connection, Load, Store


@functools.cache
def hashes(conversation: int, blocks: int) -> bytes:
    return b"".join(hashlib.md5(f"{conversation}/{n}".encode()).digest() for n in range(blocks))


class Engine:
    """Runs everything on one stream, as real engines do."""

    def __init__(
        self,
        model: Model,
        connection: Connection,
        device: str,
        *,
        leased_bytes: int,
        host_bytes: int = 0,
        namespace: str = "a PyTorch engine",
        lend_drain_ms: int = 0,
    ) -> None:
        self.model = model
        self.cuda = model.device.type == "cuda"
        self.cache = Cache(
            connection,
            namespace=namespace,
            layer_bytes=model.layer_bytes(),
            max_leased_bytes=leased_bytes,
            lease_step_bytes=leased_bytes or None,
            host_tier_bytes=host_bytes,
            device=device,
            backend="cuda" if self.cuda else "host",
            lookup_ms=60_000,
            lend_drain_ms=lend_drain_ms,
        )
        self.cache.register_pool(model.places(), model.blocks, model.pool)
        if not self.cache.wait_open(120) or self.cache.problem():
            raise RuntimeError(f"the cache is not open: {self.cache.problem()}")
        eventually("the leases", lambda: self.cache.stats()["leased_bytes"] >= leased_bytes)

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.cuda else 0

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def blocks(self, first: int, count: int) -> list[int]:
        """Scattered blocks of the pool: every third from `first` on, so that no two are neighbours."""
        order = torch.arange(self.model.blocks).reshape(-1, 3).T.reshape(-1)
        return order[first : first + count].tolist()

    def table(self, blocks: list[int]) -> torch.Tensor:
        """The block table for the kernels. Like every copy from pageable memory, this waits for the stream."""
        return torch.tensor(blocks, device=self.model.device)

    def prefill_and_store(
        self, conversation: int, blocks: list[int], before: Callable[[], None] = lambda: None
    ) -> Store:
        """Calls `before`, then queues the computation of a prefix and, layer by layer behind its kernels, the
        write-back. Waits for neither."""
        tokens = self.model.tokens(conversation, len(blocks) * BLOCK_TOKENS)
        table = self.table(blocks)
        before()
        marks = {}

        def written(layer: int) -> None:
            marks[layer] = self.cache.mark(self.stream())

        self.model.prefill_in_chunks(tokens, table, written)
        of_layers = [marks[layer] for layer in range(self.model.shape.layers) for _ in range(2)]
        return self.cache.store(hashes(conversation, len(blocks)), blocks, of_layers)

    def load(self, conversation: int, blocks: list[int]) -> Load:
        """Queues the copies of a prefix into blocks of the pool, behind everything that the stream already has."""
        after = self.cache.mark(self.stream()) if self.cuda else None
        return self.cache.load(hashes(conversation, len(blocks)), blocks, after)

    def next_turn(self, tokens: torch.Tensor, table: torch.Tensor, load: Load | None) -> torch.Tensor:
        """Queues the next turn. On the device, each layer waits for its part of the prefix."""

        def gate(layer: int) -> None:
            if load is not None:
                for entry in (2 * layer, 2 * layer + 1):
                    load.gate_layer(entry, self.stream())

        return self.model.prefill(tokens, table, before_layer=gate)
