"""What people get without building it themselves: `make demo` and `make install`, archives, and the workflow of releases."""

import hashlib
import os
import re
import subprocess
import tarfile

import pytest
import yaml

from test_binaries import CLEAN, CLI
from tools import ROOT

BUILT = CLI.parent
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def make(*arguments, **options):
    """make, with programs that are built already."""
    return subprocess.run(["make", "--no-print-directory", "CARGO=true", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=CLEAN, **options)


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_demo_says_where_the_programs_are_and_how_long_the_first_build_takes(tmp_path):
    first = make("demo", f"BUILT={tmp_path}")
    assert "minutes" in first.stdout and first.returncode != 0, "there is no program yet"
    for name in ("swiftcache", "swiftcache-broker"):
        program(tmp_path / name, 'echo "ran $1"')
    done = make("demo", f"BUILT={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "ran demo"
    assert any(f"{tmp_path}/swiftcache-broker" in line and "make install" in line for line in lines), lines
    assert not any("minutes" in line for line in lines), "it is built already"


def test_what_is_installed_works_and_is_removed_again(tmp_path):
    where = [f"BUILT={BUILT}", f"DESTDIR={tmp_path}", "PREFIX=/opt/swiftcache"]
    done = make("install", *where)
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "opt/swiftcache"
    for name in ("swiftcache", "swiftcache-broker"):
        version = subprocess.run([installed / "bin" / name, "--version"], capture_output=True, text=True, timeout=60)
        assert version.returncode == 0 and name in version.stdout
    assert "donate" in (installed / "share/bash-completion/completions/swiftcache").read_text()
    assert ".TH swiftcache" in (installed / "share/man/man1/swiftcache.1").read_text()
    # A private node needs the broker beside the command.
    trace = ROOT / "client/workloads/chat.jsonl"
    words = ["replay", "--quiet", "--requests", "5", "--donors", "1", "--scale", "65536", "--pace", "200", "--trace", trace]
    alone = tmp_path / "alone"
    alone.mkdir()
    os.link(installed / "bin/swiftcache", alone / "swiftcache")
    missing = subprocess.run([alone / "swiftcache", *words], capture_output=True, text=True, timeout=300, env=CLEAN)
    assert missing.returncode == 1 and "swiftcache-broker is missing" in missing.stderr, "the twin"
    played = subprocess.run([installed / "bin/swiftcache", *words], capture_output=True, text=True, timeout=300, env=CLEAN)
    assert played.returncode == 0, played.stderr
    assert make("uninstall", *where).returncode == 0
    assert [path for path in installed.rglob("*") if path.is_file()] == []


def test_an_archive_has_everything_and_is_the_same_each_time(tmp_path):
    made = []
    for name in ("one", "two"):
        done = subprocess.run([ROOT / "deploy/release/package.sh", BUILT, tmp_path / name], capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
        [archive] = (tmp_path / name).glob("*.tar.gz")
        assert {path.name for path in (tmp_path / name).iterdir()} == {archive.name, f"{archive.name}.sha256"}
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert (tmp_path / name / f"{archive.name}.sha256").read_text().split() == [digest, archive.name]
        made.append((archive, digest))
    assert made[0][1] == made[1][1]
    with tarfile.open(made[0][0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path / "out", filter="data")
    assert {"bin/swiftcache", "bin/swiftcache-broker", "LICENSE", "README.md", "swiftcache.cdx.json", "man/swiftcache.1",
            "systemd/swiftcache-broker.service", "systemd/broker.toml"} <= names
    [command] = (tmp_path / "out").glob("*/bin/swiftcache")
    assert subprocess.run([command, "--version"], capture_output=True, timeout=60).returncode == 0
    without = subprocess.run([ROOT / "deploy/release/package.sh", tmp_path / "one", tmp_path / "three"], capture_output=True,
                             timeout=300)
    assert without.returncode != 0 and not list((tmp_path / "three").glob("*")), "the twin: nothing built, nothing left behind"


def jobs():
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


def steps_of(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_builds_what_make_builds():
    found = jobs()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [word for job in found.values() for run in steps_of(job) for word in re.findall(r"\bmake ([a-z-]+)", run)]
    assert called and set(called) <= targets
    oldest = re.search(r'^rust-version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    image = (ROOT / "deploy/image/Dockerfile").read_text()
    container = found["programs"]["container"]
    assert container.endswith(f"rust:{oldest}-bookworm") and f"FROM {container} AS build" in image
    [maturin] = [step["with"] for step in found["wheels"]["steps"] if "maturin" in step.get("uses", "")]
    assert maturin["rust-toolchain"] == oldest
    wheel = re.search(r"maturin build (.*)\\\n\s*(.*)", (ROOT / "Makefile").read_text())
    assert set(maturin["args"].split()) == set(" ".join(wheel.groups()).split())
    for job in ("programs", "wheels"):
        assert found[job]["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]


def test_only_a_tag_of_the_version_is_published_and_only_that_job_may_write():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    found = workflow["jobs"]
    writers = [name for name, job in found.items() if "write" in str(job.get("permissions", ""))]
    assert writers == ["publish"] and set(found["publish"]["needs"]) == {"programs", "wheels"}
    assert found["publish"]["if"] == "github.ref_type == 'tag'"
    [check] = [run for run in steps_of(found["programs"]) if "GITHUB_REF_NAME" in run]
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    for tag, status in ((f"v{version}", 0), ("v999.0.0", 1)):
        done = subprocess.run(["bash", "-euc", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}, timeout=60)
        assert done.returncode == status, tag


@pytest.mark.parametrize("name", ["programs", "wheels", "publish"])
def test_actions_are_pinned_to_a_release(name):
    used = [step["uses"] for step in jobs()[name]["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in used), used
