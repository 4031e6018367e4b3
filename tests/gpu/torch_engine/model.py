"""A decoder with the shapes of real models and random weights, and a paged KV pool with vLLM's layout."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention, silu

BLOCK_TOKENS = 16
CHUNK = 8192
"""Tokens of a prefix that are computed in one step."""


@dataclass(frozen=True)
class Shape:
    """Sizes from the model's `config.json`."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    ffn: int

    @property
    def piece_bytes(self) -> int:
        """Bytes of K (or of V) of one block in one layer, with 2 bytes for each number."""
        return BLOCK_TOKENS * self.kv_heads * self.head * 2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-8b", layers=36, hidden=4096, heads=32, kv_heads=8, head=128, ffn=12288),
        Shape("tiny", layers=4, hidden=128, heads=4, kv_heads=2, head=64, ffn=256),
    )
}


class Model:
    """Computes hidden states of tokens, layer by layer, and writes the KV of each token into the pool."""

    def __init__(self, shape: Shape, blocks: int, device: torch.device) -> None:
        self.shape, self.device, self.blocks = shape, device, blocks
        self.pool = [
            torch.zeros(2, blocks, BLOCK_TOKENS, shape.kv_heads, shape.head, dtype=torch.bfloat16, device=device)
            for _ in range(shape.layers)
        ]
        torch.manual_seed(1)
        qkv = (shape.heads + 2 * shape.kv_heads) * shape.head
        self._weights = [
            tuple(
                self._matrix(rows, columns)
                for rows, columns in (
                    (shape.hidden, qkv),
                    (shape.heads * shape.head, shape.hidden),
                    (shape.hidden, 2 * shape.ffn),
                    (shape.ffn, shape.hidden),
                )
            )
            for _ in range(shape.layers)
        ]

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        matrix = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.device)
        return matrix.normal_(std=1 / math.sqrt(rows))

    def layer_bytes(self) -> list[int]:
        """The layer sizes for `Cache`. K and V of a layer count as two layers."""
        return [self.shape.piece_bytes] * (2 * self.shape.layers)

    def places(self) -> list[tuple[int, int, int, int]]:
        """The layers' places for `Cache.register_pool`."""
        piece = self.shape.piece_bytes
        return [
            (layer.data_ptr(), layer.nbytes, half * self.blocks * piece, piece)
            for layer in self.pool
            for half in range(2)
        ]

    def tokens(self, conversation: int, count: int) -> torch.Tensor:
        """The embeddings of a conversation's tokens: [count, hidden]."""
        generator = torch.Generator(self.device).manual_seed(conversation)
        shape = (count, self.shape.hidden)
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=generator)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: torch.Tensor,
        table: torch.Tensor,
        before_layer: Callable[[int], None] = lambda layer: None,
        kv_written: Callable[[int], None] = lambda layer: None,
    ) -> torch.Tensor:
        """Queues the computation of a sequence's last tokens. They must be whole blocks.

        `table` has the pool's blocks of the whole sequence. A layer reads the blocks before `tokens` only after
        `before_layer` has returned. `kv_written` is called when the kernels that write the layer's new KV are queued.
        Returns the hidden state of the last token.
        """
        shape, count = self.shape, len(tokens)
        fresh = table[-(count // BLOCK_TOKENS) :]
        mask = causal_lower_right(count, len(table) * BLOCK_TOKENS)
        widths = (shape.heads * shape.head, shape.kv_heads * shape.head, shape.kv_heads * shape.head)
        state = tokens
        for layer, (into, out, up, down) in enumerate(self._weights):
            before_layer(layer)
            query, key, value = (_normal(state) @ into).split(widths, dim=-1)
            for half, new in enumerate((key, value)):
                paged = new.reshape(-1, BLOCK_TOKENS, shape.kv_heads, shape.head)
                self.pool[layer][half].index_copy_(0, fresh, paged)
            kv_written(layer)
            query = query.reshape(1, count, shape.heads, shape.head).transpose(1, 2)
            key, value = (self._whole(layer, half, table) for half in range(2))
            seen = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            state = state + seen.transpose(1, 2).reshape(count, -1) @ out
            gate, linear = (_normal(state) @ up).chunk(2, dim=-1)
            state = state + (silu(gate) * linear) @ down
        return state[-1]

    def prefill_in_chunks(
        self, tokens: torch.Tensor, table: torch.Tensor, kv_written: Callable[[int], None] = lambda layer: None
    ) -> torch.Tensor:
        """Like `prefill`, for a whole sequence, chunk by chunk. Calls `kv_written` for each layer of each chunk."""
        state = tokens[-1]
        for begin in range(0, len(tokens), CHUNK):
            end = min(begin + CHUNK, len(tokens))
            state = self.prefill(tokens[begin:end], table[: end // BLOCK_TOKENS], kv_written=kv_written)
        return state

    def _whole(self, layer: int, half: int, table: torch.Tensor) -> torch.Tensor:
        """A sequence's K or V: [1, KV heads, tokens, head]."""
        paged = self.pool[layer][half].index_select(0, table)
        return paged.reshape(1, -1, self.shape.kv_heads, self.shape.head).transpose(1, 2)

    def kv(self, blocks: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """A copy of the KV of `blocks`, as integers, so that every bit can be compared: [layers, 2, blocks, ...]."""
        index = torch.as_tensor(blocks, device=self.device)
        return torch.stack([layer.index_select(1, index) for layer in self.pool]).view(torch.int16)


def _normal(state: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(state, state.shape[-1:])
