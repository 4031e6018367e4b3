"""An engine of two ranks that lends: a block is lent, and back, when it is on both."""

from __future__ import annotations

import lab as of
from node import Tenant, eventually
from test_engine_3_lending import LENDING, LONGEST, RUNS, busy, quiet_then_busy

RANKS = {"max_model_len": LONGEST, "seed": 1, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_two_ranks_lend_and_take_back(lab, node) -> None:
    want = lab.want("b", quiet_then_busy, **RANKS)
    node.start_broker()
    engine = lab.engine("b")
    of.connect(engine, node, wait=False, connector=LENDING, **RANKS)
    engine.ask("settle")
    assert engine.ask("loans")["lent"] == RUNS
    eventually("both ranks' parts", lambda: node.status()["total"]["offered"] == engine.ask("stats")["lent_bytes"])
    tenant = Tenant(node)
    assert tenant.leased > 0
    taken = []

    def look() -> None:
        loans = engine.ask("loans")
        if not taken and loans["lent"] == loans["returning"] == 0:
            taken.append(node.status()["total"]["offered"])

    assert of.said(busy(engine, look)).items() <= want.items()
    assert taken == [0]
    tenant.end()
    engine.ask("settle")
    assert engine.ask("loans")["lent"] == RUNS, "again"
    engine.ask("stop")
