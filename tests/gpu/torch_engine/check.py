"""Checks the Python module under PyTorch: on this machine's GPUs, or in shared memory with `--device cpu`.

What is checked: write-back behind kernels that have not run yet, loads into scattered blocks gated layer by layer on
the engine's stream, a replica in another process, and parts of a PyTorch pool lent and taken back. Every number of
KV is compared bit by bit. Exits with 1 at the first that is wrong.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import torch
from engine import Engine
from model import BLOCK_TOKENS, SHAPES, Model
from node import Node, eventually

from swiftcache import Connection

PREFIX = 96
TURN = 8
POOL = 3 * (2 * PREFIX + TURN)
MIB = 1 << 20


def delay(engine: Engine) -> None:
    """Keeps the stream busy for a while: who does not wait for it is too early."""
    if engine.cuda:
        torch.cuda._sleep(200_000_000)


def expect(holds: bool, what: str) -> None:
    if not holds:
        print(f"FAILED: {what}")
        sys.exit(1)


def checksum(kv: torch.Tensor) -> int:
    flat = kv.reshape(-1).to(torch.int64)
    return int((flat * (torch.arange(len(flat), device=flat.device) % 65521)).sum())


def turns(engine: Engine) -> torch.Tensor:
    """A prefix is stored while it computes, forgotten, and loaded while the next turn computes. Returns its KV."""
    model = engine.model
    home, away = engine.table(0, PREFIX + TURN), engine.table(PREFIX + TURN, PREFIX)
    delay(engine)
    store = engine.prefill_and_store(1, home[:PREFIX])
    outcome = store.finish()
    expect(outcome["stored"] == PREFIX, f"stored {outcome}")
    right = model.kv(home[:PREFIX])
    expect(bool(right.any()), "the model computes nothing")
    turn = model.tokens(2, TURN * BLOCK_TOKENS)
    resident = model.prefill(turn, home)

    # The garbage is queued before the load is, and written after that: a load that does not wait is overwritten.
    delay(engine)
    for layer in model.pool:
        layer[:, away] = -1
    load = engine.load(1, away.tolist())
    table = torch.cat([away, home[PREFIX:]])
    loaded = engine.next_turn(turn, table, load)
    seen = model.kv(away)
    engine.synchronize()
    expect(load.finish() == [], "blocks failed to load")
    expect(torch.equal(seen, right), "what was loaded is not what was stored")
    expect(torch.equal(loaded, resident), "the next turn's result depends on where its prefix was")
    print(f"{PREFIX} blocks stored behind their kernels and loaded before the next turn's, bit by bit")
    return right


def ungated(engine: Engine, right: torch.Tensor) -> None:
    """The twin: without gates the next turn reads what is not there yet."""
    if not engine.cuda:
        return
    away = engine.table(PREFIX + TURN, PREFIX)
    for layer in engine.model.pool:
        layer[:, away] = -1
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        delay(engine)
        load = engine.load(1, away.tolist())
    seen = engine.model.kv(away)
    torch.cuda.current_stream().synchronize()
    expect(not torch.equal(seen, right), "a turn without gates reads a prefix that cannot be there")
    expect(load.finish() == [], "blocks failed to load")
    expect(torch.equal(engine.model.kv(away), right), "what was loaded is not what was stored")
    print("without gates the same is read too early")


def replica(arguments: argparse.Namespace) -> None:
    """Another process: prints the checksum of what it loads."""
    connection = Connection(arguments.replica, name="a replica")
    model = Model(SHAPES[arguments.shape], POOL, torch.device(arguments.device))
    engine = Engine(model, connection, arguments.uuid, leased_bytes=0)
    table = engine.table(0, PREFIX)
    expect(engine.load(1, table.tolist()).finish() == [], "blocks failed to load")
    print(checksum(model.kv(table)))


def replicas(arguments: argparse.Namespace, node: Node, right: torch.Tensor) -> None:
    command = [sys.executable, __file__, "--device", arguments.device, "--shape", arguments.shape]
    command += ["--replica", node.socket, "--uuid", node.devices[0]]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    expect(answer.returncode == 0, f"the replica: {answer.stdout}")
    expect(int(answer.stdout) == checksum(right), "a replica in another process loaded something else")
    print("a replica in another process loads the same")


def lending(node: Node, device: torch.device) -> None:
    """The tail of a PyTorch pool, lent to a borrower and taken back."""
    shape = SHAPES["tiny"]
    blocks, lent = 4096, 2048
    lender_connection = Connection(node.socket, name="an engine that lends")
    pool = Model(shape, blocks, device)
    where = node.devices[-1 if device.type == "cpu" else 0]
    lender = Engine(pool, lender_connection, where, leased_bytes=0, namespace="a lender", lend_drain_ms=60_000)
    for layer in pool.pool:
        layer.copy_(torch.randn_like(layer))
    tail = range(blocks - lent, blocks)
    kept, before = pool.kv(range(blocks - lent)), pool.kv(tail)
    piece = shape.piece_bytes
    ranges = [
        (layer.data_ptr() + (half * blocks + blocks - lent) * piece, lent * piece)
        for layer in pool.pool
        for half in range(2)
    ]
    lender.synchronize()
    lender.cache.lend(1, ranges)

    def out() -> bool:
        expect(lender.cache.lend_problem() == "", lender.cache.lend_problem())
        # Only whole pages are lent: the tail's ends stay the lender's.
        return lender.cache.stats()["lent_bytes"] >= 0.9 * sum(size for _, size in ranges)

    eventually("the pool's tail to be on offer", out)
    bytes_lent = int(lender.cache.stats()["lent_bytes"])

    connection = Connection(node.socket, name="a borrower")
    borrower = Engine(
        Model(shape, POOL, device), connection, node.devices[0], leased_bytes=bytes_lent, namespace="a borrower"
    )
    turns(borrower)
    now = pool.kv(tail)
    expect(bool(((now != 0) & (now != before)).any()), "the borrower's blocks are not in the lender's pool")
    expect(torch.equal(pool.kv(range(blocks - lent)), kept), "what was not lent has changed")
    lender.cache.take_back([1])
    eventually("the loan", lambda: lender.cache.returned_loans() == [1])
    now = pool.kv(tail)
    expect(bool(((now == 0) | (now == before)).all()), "a borrower's bytes are left in the lender's pool")
    expect(int((now == 0).sum()) >= bytes_lent // 2, "what came back is not empty")
    expect(torch.equal(pool.kv(range(blocks - lent)), kept), "what was not lent has changed")
    failed = borrower.load(1, borrower.table(0, PREFIX).tolist()).finish()
    expect(len(failed) == PREFIX, "a borrower reads what it gave back")
    for engine in (borrower, lender):
        engine.cache.close()
    for one in (connection, lender_connection):
        one.close()
    print(f"{bytes_lent >> 20} MiB of a PyTorch pool lent, borrowed from, taken back and empty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default="target/release", help="where the programs are")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--replica", help=argparse.SUPPRESS)
    parser.add_argument("--uuid", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replica:
        return replica(arguments)
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as directory:
        node = Node(arguments.programs.resolve(), pathlib.Path(directory), device.type == "cuda")
        try:
            model = Model(SHAPES[arguments.shape], POOL, device)
            block = sum(model.layer_bytes())
            slab = max(16 * block, 1 * MIB)
            donor = node.start_donor(node.devices[-1], 16 * slab, slab)
            connection = Connection(node.socket, name="a PyTorch engine")
            engine = Engine(model, connection, node.devices[0], leased_bytes=16 * slab)
            right = turns(engine)
            ungated(engine, right)
            replicas(arguments, node, right)
            engine.cache.close()
            connection.close()
            node.end(donor)
            lending(node, device)
        finally:
            node.close()


main()
