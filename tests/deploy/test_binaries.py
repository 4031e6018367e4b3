"""Gives the settings and commands of deploy/ to the real programs."""

import os
import re
import signal
import subprocess
import time

import pytest

from conftest import BROKER
from manifest_rules import containers, documents, pod_specs
from tools import ROOT

CLI = ROOT / "target" / "debug" / "swiftcache"
MANIFEST = ROOT / "deploy" / "manifests" / "swiftcache.yaml"
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("SWIFTCACHE_")}


def run(*command, env=CLEAN):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def config_problem(text, path):
    path.write_text(text)
    done = run(BROKER, "--config", path, "--check-config")
    return None if done.returncode == 0 else done.stderr


def test_the_broker_accepts_its_settings(tmp_path):
    config = next(found for found in documents(MANIFEST.read_text()) if found["kind"] == "ConfigMap")
    assert config_problem(config["data"]["broker.toml"], tmp_path / "chart.toml") is None
    systemd = (ROOT / "deploy" / "systemd" / "broker.toml").read_text()
    assert config_problem(systemd, tmp_path / "systemd.toml") is None


def test_settings_the_broker_does_not_know_are_noticed(tmp_path):
    problem = config_problem("drian_ms = 2000\n", tmp_path / "bad.toml")
    assert problem and "drian_ms" in problem


# What cannot start, and what `--check-config` must name.
UNFIT = {
    "unknown key": ("drian_ms = 2000", "drian_ms"),
    "text for a number": ('drain_ms = "abc"', "drain_ms"),
    "topology": ('probe = "simulated"\ntopology = "hgx-9"', "hgx-9"),
    "broken topology": ('probe = "simulated"\ntopology = "{here}/broken.toml"', "broken.toml"),
    "group of the socket": ('socket_group = "no-such-group"', "socket_group"),
    "group of operators": ('admin_group = "no-such-group"', "admin_group"),
    "no certificate": ('listen_tcp = "127.0.0.1:0"\ntls_cert = "{here}/no.pem"\ntls_key = "{tls}/server-key.pem"\n'
                       'tls_client_ca = "{tls}/ca.pem"', "no.pem"),
    "no key": ('listen_tcp = "127.0.0.1:0"\ntls_cert = "{tls}/server.pem"\ntls_key = "{here}/broken.toml"\n'
               'tls_client_ca = "{tls}/ca.pem"', "tls_key"),
    "no authority": ('listen_tcp = "127.0.0.1:0"\ntls_cert = "{tls}/server.pem"\ntls_key = "{tls}/server-key.pem"\n'
                     'tls_client_ca = "{here}/broken.toml"', "tls_client_ca"),
}
TLS = ROOT / "broker" / "tests" / "broker" / "tls"


@pytest.mark.parametrize("case", UNFIT, ids=lambda case: case.replace(" ", "-"))
def test_what_cannot_start_is_refused_before_it_is_started(case, tmp_path):
    """A check and a start say the same, with the status that keeps the unit from trying again."""
    (tmp_path / "broken.toml").write_text("not a topology\n")
    text, named = UNFIT[case]
    path = tmp_path / "broker.toml"
    path.write_text(f'socket = "{tmp_path}/b.sock"\n' + text.format(here=tmp_path, tls=TLS))
    for flags in (["--check-config"], []):
        done = run(BROKER, "--config", path, *flags)
        assert done.returncode == 2, (flags, done)
        assert named in done.stderr, (flags, done.stderr)
    assert not (tmp_path / "b.sock").exists()


def test_what_can_start_is_not_refused(tmp_path):
    """The twin of the test above."""
    text = (f'probe = "simulated"\ntopology = "hgx-8"\nsocket_group = "0"\nadmin_group = "root"\n'
            f'listen_tcp = "127.0.0.1:0"\ntls_cert = "{TLS}/server.pem"\ntls_key = "{TLS}/server-key.pem"\n'
            f'tls_client_ca = "{TLS}/ca.pem"\n')
    assert config_problem(text, tmp_path / "good.toml") is None


def test_a_mistyped_variable_is_named():
    def check(name, value="2000"):
        return run(BROKER, "--check-config", env={**CLEAN, name: value})

    for name, meant in (("SWIFTCACHE_DRAIM_MS", "SWIFTCACHE_DRAIN_MS"), ("SWIFTCACHE_METRIC_LISTEN",
                        "SWIFTCACHE_METRICS_LISTEN"), ("SWIFTCACHE_SOKCET", "SWIFTCACHE_SOCKET")):
        done = check(name)
        assert done.returncode == 2 and name in done.stderr and meant in done.stderr, done.stderr
    # The twins: the right name, variables of engines and tests, and what Kubernetes sets for a service of this name.
    for name in ("SWIFTCACHE_DRAIN_MS", "SWIFTCACHE_LOAD", "SWIFTCACHE_LOOKUP_MS", "SWIFTCACHE_PORT",
                 "SWIFTCACHE_SERVICE_HOST", "SWIFTCACHE_PORT_9477_TCP", "SWIFTCACHE_LIBNVML"):
        assert check(name).returncode == 0, name


def test_a_driver_that_is_not_there_yet_is_no_wrong_setting(tmp_path):
    """The unit starts again after every status but that of a wrong setting."""
    done = run(BROKER, "--socket", tmp_path / "b.sock", "--probe=nvml",
               env={**CLEAN, "SWIFTCACHE_LIBNVML": str(tmp_path / "libnvidia-ml.so.1")})
    unit = (ROOT / "deploy" / "systemd" / "swiftcache-broker.service").read_text()
    prevented = re.search(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)[1].split()
    assert str(done.returncode) not in prevented and done.returncode != 0, done.stderr
    assert "2" in prevented


def commands():
    """Every command of our programs that deploy/ runs, as a list of words."""
    found = []
    for _, spec in pod_specs(documents(MANIFEST.read_text())):
        for container in containers(spec):
            found.append(container.get("command", []) + container.get("args", []))
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    found.append(container[probe]["exec"]["command"])
    for unit in UNITS:
        line = re.search(r"^ExecStart=/usr/bin/(.*)$", unit.read_text(), re.MULTILINE)[1]
        found.append([word for word in line.split() if not word.startswith("$")])
    return [command for command in found if command and command[0].startswith("swiftcache")]


def unknown_words(command):
    """The subcommands and flags of a command that the program's own help does not name."""
    program, *words = command
    path = {"swiftcache": CLI, "swiftcache-broker": BROKER}[program]
    subcommand = [word for word in words[:1] if not word.startswith("-")]
    done = run(path, *subcommand, "--help")
    if done.returncode != 0:
        return subcommand
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if f" {flag}" not in done.stdout]


def test_the_programs_know_every_command():
    found = commands()
    assert len(found) >= 7, found
    assert [(command, unknown_words(command)) for command in found if unknown_words(command)] == []


def test_unknown_commands_are_noticed():
    assert unknown_words(["swiftcache", "lend"]) == ["lend"]
    assert unknown_words(["swiftcache", "status", "--forever"]) == ["--forever"]


def test_probes_tell_a_broker_that_answers_from_one_that_does_not(broker, tmp_path):
    [probe] = {tuple(command) for command in commands() if command[:2] == ["swiftcache", "status"]}
    words = [CLI, *probe[1:]]
    assert run(*words, env={**CLEAN, "SWIFTCACHE_SOCKET": str(broker.socket)}).returncode == 0
    absent = run(*words, env={**CLEAN, "SWIFTCACHE_SOCKET": str(tmp_path / "none.sock")})
    assert absent.returncode != 0


def test_the_donor_of_the_chart_starts_and_leaves(broker, lent):
    """With the chart's flags, the donor has a session for each device, and gives everything back at SIGTERM."""
    containers_of = [container for _, spec in pod_specs(documents(MANIFEST.read_text()))
                     for container in containers(spec)]
    [donating] = [found for found in containers_of if found["name"] == "donor"]
    command = donating["command"] + donating["args"]
    donor = subprocess.Popen([CLI, *command[1:], "--name=of-the-chart"], stderr=subprocess.PIPE, text=True,
                             env={**CLEAN, "SWIFTCACHE_SOCKET": str(broker.socket)})
    try:
        devices = lent.donor("Admin", "GetNode").devices
        deadline = time.monotonic() + 120
        while True:
            sessions = lent.donor("Admin", "ListSessions").sessions
            attached = [s for s in sessions if s.name == "of-the-chart" and s.attached]
            if len(attached) == len(devices):
                break
            assert donor.poll() is None, donor.stderr.read()
            assert time.monotonic() < deadline, sessions
            time.sleep(0.05)
        donor.send_signal(signal.SIGTERM)
        assert donor.wait(timeout=120) == 0, donor.stderr.read()
    finally:
        donor.kill()
        donor.wait()
