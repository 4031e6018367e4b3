"""Checks the systemd units for plain hosts."""

import re

import pytest

from tools import ROOT

UNITS = ROOT / "deploy" / "systemd"
SERVICES = ["swiftcache-broker.service", "swiftcache-donor.service"]
# The limit of systemd's exposure level, times ten. systemd calls a level below 20 "OK".
EXPOSURE = 20


def installable(directory, change=lambda text: text):
    """Copies of the units that start a program that exists on this machine."""
    paths = []
    for name in SERVICES:
        text = change((UNITS / name).read_text())
        path = directory / name
        path.write_text(re.sub(r"^ExecStart=/usr/bin/[a-z-]+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
        paths.append(path)
    return paths


def complaints(done):
    """The complaints about our units. Other units of this machine do not matter."""
    return [line for line in done.stderr.splitlines() if any(name in line for name in SERVICES)]


@pytest.mark.tool("systemd-analyze")
def test_verify(tool, tmp_path):
    done = tool("verify", "--man=no", *installable(tmp_path))
    assert (done.returncode, complaints(done)) == (0, [])


@pytest.mark.tool("systemd-analyze")
def test_verify_notices(tool, tmp_path):
    units = installable(tmp_path, lambda text: text.replace("ProtectSystem=strict", "ProtectSystem=sometimes"))
    assert "protect system value" in "".join(complaints(tool("verify", "--man=no", *units)))


@pytest.mark.parametrize("index", range(len(SERVICES)), ids=SERVICES)
@pytest.mark.tool("systemd-analyze")
def test_exposure(tool, tmp_path, index):
    unit = installable(tmp_path)[index]
    done = tool("security", "--offline=true", f"--threshold={EXPOSURE}", unit)
    assert done.returncode == 0, done.stdout


@pytest.mark.tool("systemd-analyze")
def test_exposure_is_noticed(tool, tmp_path):
    def soften(text):
        return re.sub(r"^(Protect|Restrict|SystemCall|Capability|NoNew).*\n", "", text, flags=re.MULTILINE)
    unit = installable(tmp_path, soften)[0]
    assert tool("security", "--offline=true", f"--threshold={EXPOSURE}", unit).returncode != 0


def settings(name):
    return re.findall(r"^(\w+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE)


def test_the_broker_sees_the_processes_it_watches():
    """ProtectProc= would hide /proc/<pid>/stat from the death watch. PrivateUsers= would hide the uids, which decide
    tenants."""
    keys = [key for key, _ in settings(SERVICES[0])]
    assert not {"ProtectProc", "PrivateUsers", "PrivatePIDs"} & set(keys)


def test_the_broker_may_give_its_socket_to_a_group():
    calls = [value for key, value in settings(SERVICES[0]) if key == "SystemCallFilter"]
    assert calls.index("@chown") > next(index for index, value in enumerate(calls) if "@privileged" in value)


def test_the_donor_stops_first_and_outlives_the_broker():
    donor = settings(SERVICES[1])
    assert ("After", "swiftcache-broker.service") in donor
    assert not [key for key, _ in donor if key in ("Requires", "BindsTo", "PartOf")]
