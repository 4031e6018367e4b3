import pathlib
import sys
from collections.abc import Callable, Iterator

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "harness")]

from engine import LAYERS, SLAB_BYTES, Engine, Pool  # noqa: E402
from node import Node, eventually  # noqa: E402
from swiftcache import Cache, Connection  # noqa: E402


@pytest.fixture
def bare_node(tmp_path: pathlib.Path) -> Iterator[Node]:
    """A node whose broker is not started yet."""
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def node(bare_node: Node) -> Node:
    """A node with a broker."""
    bare_node.start_broker()
    return bare_node


@pytest.fixture
def connection(bare_node: Node) -> Iterator[Connection]:
    connection = Connection(bare_node.socket, name="an engine under test")
    yield connection
    connection.close()


@pytest.fixture
def cache(connection: Connection) -> Iterator[Callable[..., Cache]]:
    """Makes caches, and closes them at the end of the test."""
    made: list[Cache] = []

    def make(namespace: str = "model", slabs: int = 2, **settings: object) -> Cache:
        one = Cache(
            connection,
            namespace=namespace,
            layer_bytes=LAYERS,
            max_leased_bytes=slabs * SLAB_BYTES,
            lease_step_bytes=SLAB_BYTES,
            **settings,
        )
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture
def engine(cache: Callable[..., Cache]) -> Callable[..., Engine]:
    """Makes engines whose cache is open and has leased a slab. A donor must be running."""

    def make(pool: Pool | None = None, **settings: object) -> Engine:
        one = Engine(cache(**settings), pool)
        assert one.cache.wait_open(60), one.cache.problem()
        eventually("a lease", lambda: one.cache.stats()["leases"])
        return one

    return make
