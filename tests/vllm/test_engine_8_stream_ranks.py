"""An engine of two ranks with a stitched pool each, of slabs that are too few for what they ask for."""

from __future__ import annotations

import lab as of
from test_engine_7_stream import PAGE, SETTINGS, STITCHED, UNIT, WINDOW, gone

OWN = {"kv_cache_memory_bytes": (2 * 80 + 17 * 4) * PAGE // 2, "num_gpu_blocks_override": None, "max_model_len": 1024}
"""A rank's page is half as large. 16 blocks are local."""


def test_two_ranks_with_a_short_grant_and_every_slab_withdrawn(lab, node) -> None:
    want = lab.want("b", **of.RANKS)
    node.start_broker()
    engine = lab.engine("b")
    # Each asks for 16 slabs, four rows of 32 blocks. vLLM takes the fewer rows.
    donor = node.start_donor("SIM-1", 23, UNIT)
    settings = SETTINGS | {"stream_bytes": 16 * UNIT, "stream_window_bytes": WINDOW // 2, "max_leased_bytes": 0}
    of.connect(
        engine, node, wait=False, connector=settings, **(of.RANKS | OWN | {"worker_cls": STITCHED["worker_cls"]})
    )
    found = engine.ask("stitched")
    assert len(found) == 2 and len({one["blocks"] for one in found}) == 1
    assert found[0]["blocks"] in (16 + 32, 16 + 2 * 32), "of 23 slabs one rank has less than three rows"
    assert all(one["local_blocks"] >= 16 and one["laid_out"] > 0 for one in found)

    def played() -> dict[str, dict]:
        assert engine.ask("reset")
        return of.play(engine)

    of.matching(want, played, 1)
    node.withdraw(donor)
    of.matching(want, played, 1)
    gone(donor)
    assert all(one["on_floor"] == one["laid_out"] for one in engine.ask("stitched"))
    engine.ask("stop")
