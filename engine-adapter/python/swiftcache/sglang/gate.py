"""SGLang's layer counter: whoever reads a layer's KV asks it to wait first.

It never raises: SGLang reports a failed load after the forward, and drops the output of its requests. So that this is
never needed, a load of which a forward could read too early is not left to the counter: only own blocks are
(`linker`), and only once a forward has been seen to wait for every layer. Kernels that read the pool without asking
are noticed at the end of their batch: its output is dropped, and from then on loads are waited for before their batch
starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftcache._native import Load
    from swiftcache.engine.quiet import Quiet

MOST_BATCHES = 64
"""Batches that SGLang may start without saying that they are over. There is one as a rule."""


@dataclass
class _Batch:
    loads: Sequence[Load]
    layer_wise: bool
    """Whether any of its loads is not over when it starts."""
    gated: set[tuple[int, int]] = field(default_factory=set)
    """Layers and streams."""
    reached: int = -1
    """The last layer that was waited for."""
    in_order: bool = True
    tainted: bool = False

    def waited_for_all(self, layers: int) -> bool:
        return self.in_order and not self.tainted and self.reached == layers - 1


class LayerGate:
    """`num_layers` and `consumer_index` are SGLang's to read."""

    def __init__(self, gates: Sequence[int], stream: Callable[[], int], quiet: Quiet) -> None:
        """`gates`: for each layer, the entry of the layout that comes last. `stream`: the one that computes now."""
        self.num_layers, self.consumer_index = len(gates), -1
        self.proven = False
        """Whether forwards wait for every layer, as far as has been seen."""
        self.unwaited_batches = 0
        self._gates, self._stream, self._quiet = gates, stream, quiet
        self._disproven = False
        self._batches: dict[int, _Batch] = {}
        self._next = 0

    # What SGLang calls, from the thread that launches a forward.

    def set_consumer(self, index: int) -> None:
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        batch = self._batches.get(self.consumer_index)
        if batch is not None:
            self._quiet.attempt("a layer could not be waited for", self._wait, batch, layer)

    # What the linker calls.

    def begin(self, loads: Sequence[Load], *, layer_wise: bool) -> int:
        """A batch starts that needs these loads. Returns its number."""
        while len(self._batches) >= MOST_BATCHES:
            self._end(self._batches.pop(next(iter(self._batches))))
        index, self._next = self._next, self._next + 1
        self._batches[index] = _Batch(loads, layer_wise)
        return index

    def finish(self, index: int) -> bool:
        """A batch's forward has been launched: waits for its loads. Whether what it read is right."""
        batch = self._batches.pop(index, None)
        if batch is None:
            return True
        landed, waited = self._end(batch), batch.waited_for_all(self.num_layers)
        self._learn(waited)
        return landed and (waited or not batch.layer_wise)

    def reset(self) -> None:
        """Waits for all loads. No forward needs them any more."""
        while self._batches:
            self._end(self._batches.popitem()[1])
        self.consumer_index = -1

    def _end(self, batch: _Batch) -> bool:
        """Waits for a batch's loads. Whether all are there."""
        ends = [self._quiet.attempt("a load did not end", load.finish) for load in batch.loads]
        return all(end == [] for end in ends)

    def _wait(self, batch: _Batch, layer: int) -> None:
        key = (layer, self._stream())
        if key in batch.gated:
            return
        # A full CUDA graph waits for the last layer, and with it for all.
        whole = layer == self.num_layers - 1 and batch.reached < 0
        if layer > batch.reached + 1 and not whole:
            batch.in_order = False
        batch.reached = max(batch.reached, layer)
        batch.gated.add(key)
        try:
            for load in batch.loads:
                # A stream that is made to wait costs the thread that launches the forward 20 to 50 us.
                if not load.is_done():
                    load.gate_layer(self._gates[layer], key[1])
        except BaseException:
            batch.tainted = True
            raise

    def _learn(self, waited: bool) -> None:
        if waited:
            self.proven = not self._disproven
            return
        self.unwaited_batches += 1
        self._quiet.trouble(
            "SGLang ran a forward without waiting for the layers of its loads",
            "loads are waited for before their batch from now on",
        )
        self._disproven, self.proven = True, False
