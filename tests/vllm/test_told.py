"""`told`: what becomes of a call to a process that fails, ends, or does not answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from node import eventually
from told import Told, ToldError

HARNESS = Path(__file__).resolve().parents[1] / "harness"

CHILD = f"""
import asyncio, os, subprocess, sys, time
sys.path.append({str(HARNESS)!r})
from told import Orders
orders = Orders()
print("a library prints this when it is imported")

class Child:
    def double(self, number):
        print("and this when it is called")
        return 2 * number
    def long(self, count):
        return "x" * count
    def fail(self):
        raise ValueError("no such thing")
    def end(self):
        os._exit(3)
    def sleep(self):
        time.sleep(600)
    def bear(self):
        return subprocess.Popen(["sleep", "600"]).pid

class Later:
    def __getattr__(self, name):
        async def call(**arguments):
            await asyncio.sleep(0)
            return getattr(Child(), name)(**arguments)
        return call

asyncio.run(orders.serve_async(Later())) if sys.argv[1:] else orders.serve(Child())
"""


@pytest.fixture(params=["", "async"])
def child(request, tmp_path: Path) -> Iterator[Told]:
    told = Told([sys.executable, "-c", CHILD, *request.param.split()], tmp_path / "log")
    yield told
    told.close()


def test_it_answers_whatever_it_prints_and_however_long_that_is(child: Told) -> None:
    assert child.ask("double", number=21) == 42
    assert len(child.ask("long", count=300_000)) == 300_000
    child.say("double", number=1)
    assert child.answer(within=60) == 2
    assert "and this when it is called" in child.log.read_text()


def test_a_call_that_fails_says_why_and_the_next_one_is_answered(child: Told) -> None:
    with pytest.raises(ToldError, match="fail: ValueError: no such thing"):
        child.ask("fail")
    with pytest.raises(ToldError, match="TypeError"):
        child.ask("double", figure=1)
    assert child.ask("double", number=2) == 4


def test_one_that_ends_is_noticed(child: Told) -> None:
    with pytest.raises(ToldError, match=r"end: the process ended; the end of its log:\n.*a library prints this"):
        child.ask("end")
    with pytest.raises(ToldError, match="double: the process ended"):
        child.ask("double", number=1)


def test_one_that_does_not_answer_is_given_up(child: Told) -> None:
    assert child.ask("double", within=60, number=1) == 2
    with pytest.raises(ToldError, match=r"sleep: no answer within 0\.1 s"):
        child.ask("sleep", within=0.1)


def test_its_own_children_end_with_it(child: Told) -> None:
    grandchild = child.ask("bear")
    os.kill(grandchild, 0)
    child.close()
    eventually("its end", lambda: is_over(grandchild))


def is_over(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    # It may be dead and not waited for.
    return state.rpartition(")")[2].split()[0] in "ZX"
