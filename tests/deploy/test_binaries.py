"""Gives the settings and commands of deploy/ to the real programs."""

import os
import re
import signal
import subprocess
import time

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
