"""Runs the commands of docs/operations.md, and checks what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import Client, channel
from tools import ROOT

DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
SOCKET = "/run/swiftcache/broker.sock"
ADMIN_METHODS = set(re.findall(r"^  rpc (\w+)\(", (ROOT / "proto/proto/swiftcache/v1/admin.proto").read_text(),
                               re.MULTILINE))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def grpcurl_commands():
    """Every grpcurl command of the document. A command that stands there twice is listed twice."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("grpcurl ")]


@pytest.fixture
def shell(tools, broker, lent):
    """Runs a line of the document in a shell."""
    if "problem" in tools["grpcurl"]:
        pytest.skip(f"grpcurl NOT RUN: {tools['grpcurl']['problem']}")
    variables = {
        "SOCK": str(broker.socket),
        "GPU": lent.device,
        "REGION": lent.region.hex(),
        "DONOR": lent.donor_label,
        "LEASE": str(lent.grants[1].lease_id),
        "NAMESPACE": lent.namespace,
        "PATH": f"{Path(tools['grpcurl']['path']).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(line):
        return subprocess.run(["bash", "-euc", line], capture_output=True, text=True, timeout=120,
                              env={**os.environ, **variables})
    return run


def name(line):
    words = line.split()
    return " ".join(word for word in words[words.index("localhost") + 1:] if word != "$SOCK")


@pytest.mark.parametrize("line", grpcurl_commands(), ids=name)
@pytest.mark.tool("grpcurl")
def test_grpcurl(shell, line):
    done = shell(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an answer"


@pytest.mark.tool("grpcurl")
def test_grpcurl_notices(shell):
    wrong = "grpcurl -plaintext -unix -authority localhost $SOCK swiftcache.v1.Admin/GetNodes"
    assert shell(wrong).returncode != 0
    bad = wrong.replace("$SOCK swiftcache.v1.Admin/GetNodes", "-d '{\"device_uuid\": \"no such\"}' $SOCK ")
    assert shell(bad + "swiftcache.v1.Admin/Drain").returncode != 0


def test_every_admin_method_is_documented():
    called = set(re.findall(r"swiftcache\.v1\.Admin/(\w+)", "\n".join(grpcurl_commands())))
    assert called == ADMIN_METHODS
    assert len(ADMIN_METHODS) >= 9


@pytest.mark.tool("grpcurl")
def test_answers_carry_no_secrets(shell):
    """Handles and tokens are bearer secrets, so no answer of Admin may contain them."""
    for line in grpcurl_commands():
        if "Admin/List" in line or "Admin/GetNode" in line:
            assert not re.search(r"opaque|grantToken|session_?id", shell(line).stdout, re.IGNORECASE), line


def test_the_python_example(broker):
    [example] = blocks("python")
    assert SOCKET in example
    done = subprocess.run([sys.executable, "-c", example.replace(SOCKET, str(broker.socket))],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "SERVING" in done.stdout, done.stderr


def test_grpcios_own_authority_is_refused_as_documented(broker):
    stub = health_pb2_grpc.HealthStub(channel(broker.socket, options=[]))
    with pytest.raises(grpc.RpcError) as refused:
        stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    assert "RST_STREAM with error code 1" in refused.value.details()


def test_reflection_describes_the_protocol(broker):
    assert Client(broker.socket)("Admin", "GetNode").version


def test_every_file_named_is_there():
    named = set(re.findall(r"(?:deploy|tests)/[\w./-]*\w", DOCUMENT))
    assert len(named) >= 8
    assert [path for path in named if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", DOCUMENT)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_every_alert_is_explained():
    rules = (ROOT / "deploy" / "prometheus" / "rules.yaml").read_text()
    alerts = set(re.findall(r"- alert: (\w+)", rules))
    assert set(re.findall(r"^\| `(SwiftCache\w+)` \|", DOCUMENT, re.MULTILINE)) == alerts


def test_every_kind_of_event_is_named():
    source = (ROOT / "broker" / "src" / "events.rs").read_text()
    kinds = re.search(r"^const KINDS: [^=]*= \[(.*?)^\];", source, re.MULTILINE | re.DOTALL)[1]
    named = re.search(r"its kinds are (.*?)\. ", DOCUMENT, re.DOTALL)[1]
    assert re.findall(r"`([\w-]+)`", named) == re.findall(r'"([\w-]+)"', kinds)
