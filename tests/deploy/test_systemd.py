"""Checks the systemd units for plain hosts."""

import re

import pytest

from tools import ROOT

UNITS = ROOT / "deploy" / "systemd"
SERVICES = [
    "swiftcache-broker.service", "swiftcache-donor.service", "swiftcache-host-donor@.service", "swiftcache-disk@.service",
]
# The limit of systemd's exposure level, times ten. systemd calls a level below 20 "OK".
EXPOSURE = 20


def installable(directory, change=lambda text: text):
    """Copies of the units that start a program that exists on this machine."""
    paths = []
    for name in SERVICES:
        text = change((UNITS / name).read_text())
        # Of a template, one instance is checked.
        path = directory / name.replace("@.", "@0.")
        path.write_text(re.sub(r"^ExecStart=/usr/bin/[a-z-]+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
        paths.append(path)
    return paths


# Settings of systemd 254. An older one says that it ignores them.
NEW = re.compile(r"Unknown key (name )?'(RestartSteps|RestartMaxDelaySec)' in section .?Service.?, ignoring")


def complaints(done):
    """The complaints about our units. Other units of this machine do not matter."""
    stems = [name.split(".")[0] for name in SERVICES]
    lines = [line for line in done.stderr.splitlines() if any(stem in line for stem in stems)]
    return [line for line in lines if not NEW.search(line)]


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


SPANS = {"ms": 0.001, "s": 1, "min": 60}


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|min)?", text).groups()
    return int(number) * SPANS[unit or "s"]


def starts(unit, version, lasts, each=0.05):
    """When systemd starts a service that fails `each` seconds after every start, for `lasts` seconds, by the rules of
    systemd.service(5) and systemd.unit(5). The last entry is None if it gives up."""
    found = dict(unit)
    interval = seconds(found.get("StartLimitIntervalSec", "10s"))
    burst = int(found.get("StartLimitBurst", 5))
    pause, steps = seconds(found["RestartSec"]), int(found.get("RestartSteps", 0))
    longest = seconds(found.get("RestartMaxDelaySec", found["RestartSec"]))
    at, done = 0, []
    while at < lasts:
        if interval and len([start for start in done if start > at - interval]) >= burst:
            return [*done, None]
        done.append(at)
        step = min(len(done) - 1, steps) if version >= 254 else 0
        at += each + (pause * (longest / pause) ** (step / steps) if step else pause)
    return done


@pytest.mark.parametrize("version", [252, 257])
@pytest.mark.parametrize("name", SERVICES)
def test_a_driver_that_comes_late_finds_the_unit_alive(name, version):
    done = starts(settings(name), version, 600)
    assert done[-1] is not None and len(done) > 10
    pauses = [round(after - before, 6) for before, after in zip(done, done[1:])]
    if version >= 254:
        assert pauses == sorted(pauses) and pauses[0] < 1.1 and 10 < pauses[-1] < 31


def test_a_unit_with_the_usual_limit_is_dead_before_the_driver_comes():
    """The twin: five starts in 1.2 seconds, and then never again."""
    usual = [("Restart", "always"), ("RestartSec", "200ms")]
    done = starts(usual, 257, 600)
    assert done[-1] is None and len(done) == 6 and done[-2] < 1.3


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


@pytest.mark.parametrize("name", SERVICES[1:])
def test_the_donor_stops_first_and_outlives_the_broker(name):
    donor = settings(name)
    assert ("After", "swiftcache-broker.service") in donor
    assert not [key for key, _ in donor if key in ("Requires", "BindsTo", "PartOf")]


def test_the_donor_of_host_memory_lends_its_own_numa_node():
    [command] = [value for key, value in settings(SERVICES[2]) if key == "ExecStart"]
    assert "--device=HOST-%i" in command and "--bytes=${SWIFTCACHE_HOST_BYTES}" in command


def test_a_disk_keeps_its_file_where_it_may_write_and_nobody_else_reads():
    disk = settings(SERVICES[3])
    [command] = [value for key, value in disk if key == "ExecStart"]
    assert "--device=DISK-%i" in command and "--path=%S/swiftcache-disk-%i " in command
    assert "--bytes=${SWIFTCACHE_DISK_BYTES}" in command
    assert {("StateDirectory", "swiftcache-disk-%i"), ("StateDirectoryMode", "0700")} <= set(disk)
    assert ("ProtectSystem", "strict") in disk, "it may write there only"
