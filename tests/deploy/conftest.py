"""Fixtures: the prepared tools and a running broker. The summary has one line for each tool, and the totals."""

import json
import os
import signal
import socket
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

from client import Client
from tools import ROOT, STATUS

BROKER = ROOT / "target" / "debug" / "swiftcache-broker"
OUTCOMES = defaultdict(list)
TOTALS = defaultdict(int)


@pytest.fixture(scope="session")
def tools():
    return json.loads(STATUS.read_text())


@pytest.fixture
def tool(request, tools):
    """Runs the program that the test's mark `tool` names."""
    name = request.node.get_closest_marker("tool").args[0]
    if "problem" in tools[name]:
        pytest.skip(f"{name} NOT RUN: {tools[name]['problem']}")

    def call(*arguments, **options):
        command = [tools[name]["path"], *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)

    call.path = tools[name]["path"]
    return call


def on_a_free_port(start, log):
    """Starts a program on a free port. Tries another port if somebody takes the first one meanwhile."""
    for attempt in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            return start(port)
        except AssertionError:
            if attempt == 2 or "address already in use" not in log.read_text().lower():
                raise


class RunningBroker:
    """A real broker over a simulated node."""

    def __init__(self, directory):
        self.socket = directory / "broker.sock"
        self.log = directory / "broker.log"
        on_a_free_port(self.start, self.log)

    def start(self, metrics_port):
        self.metrics_port = metrics_port
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SWIFTCACHE_")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [BROKER, "--socket", self.socket, "--probe", "simulated", "--topology", "pcie-4",
                 "--metrics-listen", f"127.0.0.1:{metrics_port}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )
        try:
            self.await_connection()
        except Exception:
            self.process.kill()
            self.process.wait()
            raise

    def await_connection(self):
        deadline = time.monotonic() + 120
        while True:
            with socket.socket(socket.AF_UNIX) as probe, socket.socket() as metrics:
                try:
                    probe.connect(str(self.socket))
                    metrics.connect(("127.0.0.1", self.metrics_port))
                    return
                except OSError:
                    gone = self.process.poll() is not None
                    if gone or time.monotonic() > deadline:
                        raise AssertionError(f"the broker does not listen:\n{self.log.read_text()}") from None
            time.sleep(0.02)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


@pytest.fixture(scope="session")
def broker(tmp_path_factory):
    # Directly under the base directory, because the path of a Unix socket must be short.
    running = RunningBroker(tmp_path_factory.mktemp("b"))
    yield running
    assert running.stop() == 0, running.log.read_text()


SLAB = 64 << 20


class Lent:
    """A donor and a borrower in this process, with what they offered, leased and published."""

    def __init__(self, broker):
        self.donor, self.borrower = Client(broker.socket), Client(broker.socket)
        device, other = [found.device.uuid for found in self.donor("Admin", "GetNode").devices[:2]]
        self.device = device
        donating = self.donor("Broker", "Register", name="a donor").session_id
        self.region = bytes(range(16))
        self.donor("Broker", "Offer", session_id=donating, region_id=self.region, device_uuid=device,
                   allocation_id=bytes(16), bytes=4 * SLAB, slab_bytes=SLAB,
                   handle={"kind": "HANDLE_KIND_CUDA_IPC", "opaque": bytes(64)})
        self.namespace = "a-model"
        borrowing = self.borrower("Broker", "Register", name="a borrower").session_id
        granted = self.borrower("Broker", "Lease", session_id=borrowing, namespace=self.namespace,
                                device_uuid=other, bytes=2 * SLAB, block_bytes=1 << 20)
        self.grants = list(granted.grants)
        assert len(self.grants) == 2
        hashes = b"".join(bytes([index] * 16) for index in range(1, 5))
        self.borrower("Broker", "Publish", session_id=borrowing, lease_id=self.grants[0].lease_id,
                      generation=self.grants[0].generation, hashes=hashes, slots=[0, 1, 2, 3])
        found = self.borrower("Broker", "Lookup", session_id=borrowing, namespace=self.namespace, hashes=hashes)
        assert found.hit_blocks == 4
        sessions = self.donor("Admin", "ListSessions").sessions
        self.donor_label = next(session.label for session in sessions if session.name == "a donor")


@pytest.fixture(scope="session")
def lent(broker):
    return Lent(broker)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if not (report.when == "call" or report.skipped or report.failed):
        return
    TOTALS[report.outcome] += 1
    marker = item.get_closest_marker("tool")
    if marker:
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
        OUTCOMES[marker.args[0]].append((report.outcome, reason))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("tools")
    for name, outcomes in sorted(OUTCOMES.items()):
        skipped = [reason for outcome, reason in outcomes if outcome == "skipped"]
        if any(outcome == "failed" for outcome, _ in outcomes):
            terminalreporter.line(f"FAIL     {name}")
        elif skipped:
            terminalreporter.line(f"NOT RUN  {name}: {skipped[0].removeprefix(f'{name} NOT RUN: ')}")
        else:
            terminalreporter.line(f"PASS     {name} ({len(outcomes)} checks)")


def pytest_unconfigure(config):
    print(f"{TOTALS['passed']} passed, {TOTALS['failed']} failed, {TOTALS['skipped']} skipped")
