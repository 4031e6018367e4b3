"""The layer counter: it waits for every load of its batch, once for each layer and stream, and never raises. What a
forward read without asking is noticed."""

from __future__ import annotations

from fakes import Load, Noted

from swiftcache.sglang.gate import MOST_BATCHES, LayerGate

GATES = [1, 3, 5]
"""K and V of three layers."""


class Stage:
    def __init__(self) -> None:
        self.stream, self.quiet = 7, Noted()
        self.gate = LayerGate(GATES, lambda: self.stream, self.quiet)

    def batch(self, layers: list[int], *, layer_wise: bool = True, load: Load | None = None) -> bool:
        """A batch whose forward waits for these layers."""
        index = self.gate.begin([load or Load()], layer_wise=layer_wise)
        self.gate.set_consumer(index)
        for layer in layers:
            self.gate.wait_until(layer)
        self.gate.set_consumer(-1)
        return self.gate.finish(index)


def test_every_load_is_waited_for_once_for_each_layer_and_stream() -> None:
    stage, loads = Stage(), [Load(), Load()]
    index = stage.gate.begin(loads, layer_wise=True)
    stage.gate.set_consumer(index)
    for layer in (0, 0, 1):
        stage.gate.wait_until(layer)
    stage.stream = 8
    for layer in (1, 2, 2):
        stage.gate.wait_until(layer)
    assert stage.gate.finish(index)
    for load in loads:
        assert load.gated == [(1, 7), (3, 7), (3, 8), (5, 8)] and load.finished


def test_what_has_arrived_is_not_waited_for() -> None:
    loads, gate = [Load(), Load([1])], Stage().gate
    number = gate.begin(loads, layer_wise=True)
    gate.set_consumer(number)
    gate.wait_until(0)
    loads[1].over = True
    for layer in range(1, gate.num_layers):
        gate.wait_until(layer)
    assert len(loads[0].gated) == gate.num_layers and len(loads[1].gated) == 1
    assert not gate.finish(number), "what failed is not there"
    assert gate.proven, "every layer was asked for"


def test_batches_without_loads_wait_for_nothing() -> None:
    stage, load = Stage(), Load()
    index = stage.gate.begin([load], layer_wise=True)
    assert stage.gate.consumer_index == -1
    stage.gate.wait_until(0)
    stage.gate.set_consumer(index + 1)
    stage.gate.wait_until(0)
    assert load.gated == []


def test_a_forward_that_waits_for_every_layer_proves_that_layer_wise_is_safe() -> None:
    stage = Stage()
    assert not stage.gate.proven, "not before one has been seen"
    assert stage.batch([0, 0, 1, 1, 2, 2], layer_wise=False)
    assert stage.gate.proven


def test_a_full_graph_waits_for_the_last_layer_and_that_is_all_of_them() -> None:
    stage = Stage()
    assert stage.batch([2], layer_wise=True) and stage.gate.proven


def test_a_forward_that_skips_a_layer_is_noticed() -> None:
    for layers in ([], [0], [0, 2], [0, 1], [1, 2]):
        stage = Stage()
        assert stage.batch([0, 1, 2]) and stage.gate.proven
        assert not stage.batch(layers), "it may have read too early"
        assert not stage.gate.proven and stage.gate.unwaited_batches == 1
        # One good batch later does not bring the trust back.
        assert stage.batch([0, 1, 2]) and not stage.gate.proven
        # What was loaded before the batch started was there, whatever the forward asked.
        assert stage.batch(layers, layer_wise=False)


def test_a_load_that_fails_fails_its_batch() -> None:
    stage = Stage()
    assert not stage.batch([0, 1, 2], load=Load([3]))
    assert stage.gate.proven, "the forward did wait"


def test_a_gate_that_breaks_neither_raises_nor_passes() -> None:
    stage = Stage()
    assert not stage.batch([0, 1, 2], load=Load(breaks=True))
    assert "a layer could not be waited for" in stage.quiet.kinds


def test_reset_waits_for_everything_and_learns_nothing() -> None:
    stage, load = Stage(), Load()
    stage.batch([0, 1, 2])
    index = stage.gate.begin([load], layer_wise=True)
    stage.gate.set_consumer(index)
    stage.gate.reset()
    assert load.finished and stage.gate.consumer_index == -1 and stage.gate.proven
    assert stage.gate.finish(index), "it is no batch any more"


def test_batches_that_are_never_said_to_be_over_are_ended() -> None:
    stage, loads = Stage(), [Load() for _ in range(MOST_BATCHES + 1)]
    for load in loads:
        stage.gate.begin([load], layer_wise=True)
    assert [load.finished for load in loads] == [True] + [False] * MOST_BATCHES
