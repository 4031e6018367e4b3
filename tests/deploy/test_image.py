"""Checks the image's Dockerfile by hadolint, by our own rules for its instructions, and by Docker's own check."""

import re
import tomllib

import pytest
from dockerfile_parse import DockerfileParser

from tools import ROOT

DOCKERFILE = ROOT / "deploy" / "image" / "Dockerfile"
CARGO = tomllib.loads((ROOT / "Cargo.toml").read_text())


def instructions(text, tmp_path):
    path = tmp_path / "Dockerfile"
    path.write_text(text)
    parser = DockerfileParser(str(path))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def faults(text, tmp_path):
    steps = instructions(text, tmp_path)
    problems = []
    stages = [value for name, value in steps if name == "FROM"]
    if len(stages) < 2 or any("cargo" in value for name, value in after_last_stage(steps) if name == "RUN"):
        problems.append("the image contains its build tools")
    users = [value for name, value in after_last_stage(steps) if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        problems.append("the user is not a number other than 0")
    if any(re.search(r":latest$|^[^:@]+$", value.split()[0]) for value in stages):
        problems.append("a base image without a version")
    rust = CARGO["workspace"]["package"]["rust-version"]
    if not any(f"rust:{rust}" in value for value in stages):
        problems.append(f"not built by Rust {rust}")
    builds = " ".join(value for name, value in steps if name == "RUN" and "cargo build" in value)
    if "--locked" not in builds or "--release" not in builds:
        problems.append("the build is not --locked --release")
    for name, value in steps:
        if name == "ADD":
            problems.append("ADD fetches and unpacks: use COPY")
        if name == "COPY" and not value.startswith("--from"):
            for source in value.split()[:-1]:
                if not (ROOT / source).exists():
                    problems.append(f"COPY of {source}, which is not there")
        if name == "ENV" and "NVIDIA_VISIBLE_DEVICES" in value:
            problems.append("the manifest, not the image, must say which GPUs a container sees")
    for program in ("swiftcache-broker", "swiftcache"):
        if not re.search(rf"--bin {program}(\s|$)", builds):
            problems.append(f"{program} is not in the image")
    return problems


def after_last_stage(steps):
    last = max(index for index, (name, _) in enumerate(steps) if name == "FROM")
    return steps[last:]


def test_rules(tmp_path):
    assert faults(DOCKERFILE.read_text(), tmp_path) == []


@pytest.mark.parametrize("old, new, expected", [
    ("USER 10001:10002", "USER root", "not a number"),
    ("USER 10001:10002\n", "", "not a number"),
    ("debian:12-slim", "debian", "without a version"),
    ("rust:1.95-bookworm", "rust:1.80-bookworm", "not built by Rust"),
    (" --locked", "", "--locked"),
    ("COPY LICENSE", "COPY LICENCE", "LICENCE"),
    ("COPY LICENSE", "ADD LICENSE", "ADD"),
    (" --bin swiftcache \\", " \\", "swiftcache is not"),
    ("ENTRYPOINT []", "ENV NVIDIA_VISIBLE_DEVICES=all", "the manifest"),
])
def test_faults_are_noticed(old, new, expected, tmp_path):
    text = DOCKERFILE.read_text()
    assert old in text
    assert any(expected in fault for fault in faults(text.replace(old, new), tmp_path))


def test_the_workspace_is_copied_whole():
    """Cargo refuses a workspace whose members are missing."""
    copied = re.findall(r"^COPY ([\w-]+) [\w-]+$", DOCKERFILE.read_text(), re.MULTILINE)
    for member in CARGO["workspace"]["members"]:
        assert member.split("/")[0] in copied
    # Without them an image for ARM has an allocator that does not start on every kernel.
    assert "COPY .cargo .cargo" in DOCKERFILE.read_text()


def test_the_manifests_user_is_the_images():
    manifest = (ROOT / "deploy" / "manifests" / "swiftcache.yaml").read_text()
    assert "runAsUser: 10001" in manifest and "runAsGroup: 10002" in manifest
    assert "USER 10001:10002" in DOCKERFILE.read_text()


@pytest.mark.tool("hadolint")
def test_hadolint(tool):
    done = tool("--failure-threshold", "style", DOCKERFILE)
    assert done.returncode == 0, done.stdout


@pytest.mark.tool("hadolint")
def test_hadolint_notices(tool, tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace("WORKDIR /src", "WORKDIR src\nRUN cd /src && sudo true"))
    assert tool(bad).returncode != 0


@pytest.mark.tool("docker")
def test_the_engines_own_check(tool):
    done = tool("build", "--check", "--file", DOCKERFILE, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
