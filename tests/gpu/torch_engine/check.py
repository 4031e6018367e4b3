"""Checks the Python module under PyTorch: on this machine's GPUs, or in shared memory with `--device cpu`.

It checks write-back that is queued behind kernels that have not run yet, loads into scattered blocks that the engine's
stream waits for layer by layer, a replica in another process, and parts of a PyTorch pool that are lent and taken back.
It compares every number of the KV bit by bit, and exits with 1 at the first wrong one.
"""

import argparse
import subprocess
import sys

import torch
from engine import Engine
from machine import Machine, eventually, options, started
from model import BLOCK_TOKENS, SHAPES, Model

from swiftcache import Connection

PREFIX = 96
TURN = 8
POOL = 3 * (2 * PREFIX + TURN)


def delay(engine: Engine) -> None:
    """Keeps the stream busy for about a second. Work that does not wait for the stream then runs too early."""
    if engine.cuda:
        torch.cuda._sleep(1_500_000_000)


def late(engine: Engine, what: str) -> None:
    """Checks that the stream is still busy, so that `what` was queued before the stream's earlier work was over."""
    busy = not engine.cuda or not torch.cuda.current_stream().query()
    expect(busy, f"{what} after the stream was idle, so this run shows nothing")


def expect(holds: bool, what: str) -> None:
    if not holds:
        print(f"FAILED: {what}")
        sys.exit(1)


def checksum(kv: torch.Tensor) -> int:
    flat = kv.reshape(-1).to(torch.int64)
    return int((flat * (torch.arange(len(flat), device=flat.device) % 65521)).sum())


def turns(engine: Engine) -> torch.Tensor:
    """Stores a prefix while it computes, and loads it into other blocks while the next turn computes.

    Returns the prefix's KV.
    """
    model = engine.model
    own, other = engine.blocks(0, PREFIX + TURN), engine.blocks(PREFIX + TURN, PREFIX)
    home, away = engine.table(own), engine.table(other)
    # The first call loads and compiles the kernels, which takes longer than the delay.
    engine.prefill_and_store(3, own[:PREFIX]).finish()
    engine.load(3, other).finish()
    store = engine.prefill_and_store(1, own[:PREFIX], lambda: delay(engine))
    late(engine, "the write-back is queued")
    outcome = store.finish()
    expect(outcome["stored"] == PREFIX, f"stored {outcome}")
    right = model.kv(home[:PREFIX])
    expect(bool(right.any()), "the model computes nothing")
    turn = model.tokens(2, TURN * BLOCK_TOKENS)
    resident = model.prefill(turn, home)
    table = torch.cat([away, home[PREFIX:]])
    # Allocate memory and free it at once, so that the copy below finds free memory. Otherwise the driver may wait for
    # the stream before it allocates.
    model.kv(away)

    # The garbage is queued before the load, and the delay holds it up. If the load does not wait for the stream, the
    # garbage overwrites it.
    delay(engine)
    for layer in model.pool:
        layer.index_fill_(1, away, -1)
    load = engine.load(1, other)
    loaded = engine.next_turn(turn, table, load)
    seen = model.kv(away)
    late(engine, "the load and the next turn are queued")
    engine.synchronize()
    expect(load.finish() == [], "blocks failed to load")
    expect(torch.equal(seen, right), "what was loaded is not what was stored")
    expect(torch.equal(loaded, resident), "the next turn's result depends on where its prefix was")
    print(f"{PREFIX} blocks stored behind their kernels and loaded before the next turn's, bit by bit")
    return right


def ungated(engine: Engine, right: torch.Tensor) -> None:
    """The twin: without gates the next turn reads the blocks before the load has written them."""
    if not engine.cuda:
        return
    blocks = engine.blocks(PREFIX + TURN, PREFIX)
    away = engine.table(blocks)
    for layer in engine.model.pool:
        layer.index_fill_(1, away, -1)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        delay(engine)
        load = engine.load(1, blocks)
    seen = engine.model.kv(away)
    torch.cuda.current_stream().synchronize()
    expect(not torch.equal(seen, right), "a turn without gates reads the prefix although it cannot be loaded yet")
    expect(load.finish() == [], "blocks failed to load")
    expect(torch.equal(engine.model.kv(away), right), "what was loaded is not what was stored")
    print("without gates the prefix is read too early")


def replica(arguments: argparse.Namespace) -> None:
    """Runs in another process: loads the prefix and prints its checksum."""
    connection = Connection(arguments.replica, name="a replica")
    model = Model(SHAPES[arguments.shape], POOL, torch.device(arguments.device))
    engine = Engine(model, connection, arguments.uuid, leased_bytes=0)
    blocks = engine.blocks(0, PREFIX)
    expect(engine.load(1, blocks).finish() == [], "blocks failed to load")
    print(checksum(model.kv(blocks)))


def replicas(arguments: argparse.Namespace, machine: Machine, right: torch.Tensor) -> None:
    command = [sys.executable, __file__, "--device", arguments.device, "--shape", arguments.shape]
    command += ["--replica", machine.socket, "--uuid", machine.devices[0]]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    expect(answer.returncode == 0, f"the replica: {answer.stdout}")
    expect(int(answer.stdout) == checksum(right), "a replica in another process loaded something else")
    print("a replica in another process loads the same")


LENT, POOLED = 2048, 4096
"""Blocks that a lender lends, which are the last of its pool, and blocks of the whole pool."""


def lender(arguments: argparse.Namespace) -> None:
    """Runs in another process: an engine that lends the tail of its pool, and checks it after each line of input."""
    connection = Connection(arguments.lender, name="an engine that lends")
    device = torch.device(arguments.on)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = Model(SHAPES["tiny"], POOLED, device)
    engine = Engine(model, connection, arguments.uuid, leased_bytes=0, namespace="a lender", lend_drain_ms=60_000)
    for layer in model.pool:
        layer.copy_(torch.randn_like(layer))
    head, tail = range(POOLED - LENT), range(POOLED - LENT, POOLED)
    kept, before = model.kv(head), model.kv(tail)
    piece = model.shape.piece_bytes
    ranges = [
        (layer.data_ptr() + (half * POOLED + POOLED - LENT) * piece, LENT * piece)
        for layer in model.pool
        for half in range(2)
    ]
    engine.synchronize()
    engine.cache.lend(1, ranges)

    def out() -> bool:
        expect(engine.cache.lend_problem() == "", engine.cache.lend_problem())
        # Only whole pages are lent, so the lender keeps the two ends of the tail.
        return engine.cache.stats()["lent_bytes"] >= 0.9 * sum(size for _, size in ranges)

    eventually("the pool's tail to be on offer", out)
    lent_bytes = int(engine.cache.stats()["lent_bytes"])
    print(lent_bytes, flush=True)
    sys.stdin.readline()
    now = model.kv(tail)
    expect(bool(((now != 0) & (now != before)).any()), "the borrower's blocks are not in the lender's pool")
    expect(torch.equal(model.kv(head), kept), "blocks that were not lent have changed")
    engine.cache.take_back([1])
    eventually("the loan", lambda: engine.cache.returned_loans() == [1])
    now = model.kv(tail)
    expect(bool(((now == 0) | (now == before)).all()), "a borrower's bytes are left in the lender's pool")
    expect(int((now == 0).sum()) >= lent_bytes // 2, "the returned blocks are not empty")
    expect(torch.equal(model.kv(head), kept), "blocks that were not lent have changed")
    print("empty", flush=True)
    sys.stdin.readline()


def lending(arguments: argparse.Namespace, machine: Machine) -> None:
    """Borrows the tail of another engine's pool, and loses it when that engine takes it back."""
    command = [sys.executable, __file__, "--device", arguments.device]
    command += ["--lender", machine.socket, "--uuid", machine.devices[-1], "--on", machine.last]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def say(word: str) -> None:
            process.stdin.write(f"{word}\n")
            process.stdin.flush()

        def heard() -> str:
            line = process.stdout.readline().strip()
            expect(bool(line) and "FAILED" not in line, f"the lender: {line}")
            return line

        lent = int(heard())
        connection = Connection(machine.socket, name="a borrower")
        model = Model(SHAPES["tiny"], POOL, torch.device(arguments.device))
        borrower = Engine(model, connection, machine.devices[0], leased_bytes=lent, namespace="a borrower")
        turns(borrower)
        say("look, and take it back")
        expect(heard() == "empty", "the lender does not have its blocks back")
        failed = borrower.load(1, borrower.blocks(0, PREFIX)).finish()
        expect(len(failed) == PREFIX, "the borrower can still read blocks that it gave back")
        borrower.cache.close()
        connection.close()
        say("leave")
    expect(process.returncode == 0, f"the lender ended with status {process.returncode}")
    print(f"{lent >> 20} MiB of a PyTorch pool were lent, borrowed, and taken back empty")


def main() -> None:
    parser = options(__doc__)
    for role in ("--replica", "--lender", "--uuid", "--on"):
        parser.add_argument(role, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replica:
        return replica(arguments)
    if arguments.lender:
        return lender(arguments)
    with started(arguments) as machine:
        model = Model(SHAPES[arguments.shape], POOL, torch.device(arguments.device))
        slab = max(16 * sum(model.layer_bytes()), 1 << 20)
        donor = machine.start_donor(machine.devices[-1], 16, slab)
        connection = Connection(machine.socket, name="a PyTorch engine")
        engine = Engine(model, connection, machine.devices[0], leased_bytes=16 * slab)
        right = turns(engine)
        ungated(engine, right)
        replicas(arguments, machine, right)
        engine.cache.close()
        connection.close()
        machine.withdraw(donor)
        expect(donor.wait(timeout=120) == 0, f"the donor ended with status {donor.returncode}")
        lending(arguments, machine)


main()
