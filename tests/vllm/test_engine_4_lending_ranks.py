"""An engine of two ranks that lends: a block is lent, and back, when it is on both."""

from __future__ import annotations

import lab as of
from neighbours import Tenant
from node import eventually
from test_engine_3_lending import LENDING, LONGEST, busy_until_whole, lend, quiet_then_busy

RANKS = of.RANKS | {"max_model_len": LONGEST, "seed": 1}


def test_two_ranks_lend_and_take_back(lab, node) -> None:
    want = lab.want("b", quiet_then_busy, **RANKS)
    node.start_broker()
    engine = lab.engine("b")
    of.connect(engine, node, wait=False, connector=LENDING, **RANKS)

    def lent_and_taken_back() -> dict[str, dict]:
        lend(engine)
        eventually(
            "both ranks' parts", lambda: 0 < engine.ask("stats")["lent_bytes"] == node.status()["total"]["offered"]
        )
        tenant = Tenant(node)
        assert tenant.leased > 0
        results = busy_until_whole(engine, node)
        tenant.end()
        return results

    of.matching(want, lent_and_taken_back)
    lend(engine)  # again
    engine.ask("stop")
