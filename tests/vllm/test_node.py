"""`node`: what becomes of a donor that does not come."""

from __future__ import annotations

import pytest
from node import Node


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    made.start_broker()
    yield made
    made.close()


def test_a_donor_that_refuses_its_options_is_not_waited_for(node) -> None:
    with pytest.raises(AssertionError, match=r"it refuses `--device SIM-1 .*--bytes 1099511627776 .*`, and says why"):
        node.start_donor("SIM-1", 1 << 20, 1 << 20)
    assert node.status()["donors"] == []


def test_the_twin_a_donor_that_ends_for_another_reason_is_started_again(node) -> None:
    start, started = node._start, []

    def first_fails(*command: str):
        socket = node.socket if started else "/nowhere"
        started.append(start(*(socket if word == node.socket else word for word in command)))
        return started[-1]

    node._start = first_fails
    assert node.start_donor("SIM-1", 2, 1 << 20) is started[1]
    assert started[0].returncode not in (0, 2)
