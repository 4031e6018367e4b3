"""The fixtures of every suite on a real engine. Each suite has a `lab` of its own: configurations, workloads, and the
tokens that each gives without SwiftCache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lab import Lab
    from node import Node


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    from lab import Lab

    one = Lab(tmp_path_factory.mktemp("engines"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node without a broker as yet."""
    from node import Node

    one = Node(tmp_path_factory.mktemp("node"))
    yield one
    one.close()
