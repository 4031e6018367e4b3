"""Slabs that are larger than all that may be leased."""

import pytest
from engine import LAYERS, SLAB_BYTES
from node import Node, eventually
from swiftcache import Cache, Connection

SAID = "slabs on offer are larger than the most that may be leased"


@pytest.mark.parametrize("less", [0, 1])
def test_a_cache_that_no_slab_fits_says_so(
    node: Node, connection: Connection, capfd: pytest.CaptureFixture[str], less: int
) -> None:
    """The first case is the twin: one slab fits, and nothing is said."""
    node.start_donor("SIM-1", 4, SLAB_BYTES)
    most = SLAB_BYTES - less
    cache = Cache(connection, namespace="model", layer_bytes=LAYERS, max_leased_bytes=most, device="SIM-0")
    said = ""

    def settled() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return SAID in said if less else cache.stats()["leases"] == 1

    try:
        assert cache.wait_open(60), cache.problem()
        eventually("a lease, or the reason why there is none", settled)
        if less:
            assert f"slab_bytes={SLAB_BYTES}" in said and f"max_bytes={most}" in said
            assert cache.stats()["leases"] == 0
        else:
            assert SAID not in said
    finally:
        cache.close()
