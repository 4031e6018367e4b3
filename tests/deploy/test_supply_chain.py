"""Checks SwiftCache's dependencies: licences, sources, versions, and the bill of materials."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from license_expression import get_spdx_licensing

from tools import ROOT

sys.path.insert(0, str(ROOT / "deploy" / "supply-chain"))
import sbom  # noqa: E402

DENY = tomllib.loads((ROOT / "deny.toml").read_text())
REGISTRY = f"registry+{DENY['sources']['allow-registry'][0]}"
LICENSING = get_spdx_licensing()


@pytest.fixture(scope="session")
def metadata():
    return sbom.metadata()


def permitted(expression, allowed):
    """Whether the licences in `allowed` are enough to satisfy an SPDX expression."""
    # Old crates write A/B instead of A OR B.
    parsed = LICENSING.parse(re.sub(r"\s*/\s*", " OR ", expression), validate=True)

    def satisfied(node):
        if node.isliteral:
            return node.render() in allowed
        results = [satisfied(argument) for argument in node.args]
        return all(results) if type(node).__name__ == "AND" else any(results)

    return satisfied(parsed)


def faults(metadata):
    allowed = set(DENY["licenses"]["allow"])
    banned = {entry["name"] for entry in DENY["bans"]["deny"]}
    newest = tuple(map(int, workspace()["package"]["rust-version"].split(".")))
    problems = []
    for package in metadata["packages"]:
        name = f"{package['name']} {package['version']}"
        if not package["license"] or not permitted(package["license"], allowed):
            problems.append(f"{name}: licence {package['license']}")
        if package["source"] not in (None, REGISTRY):
            problems.append(f"{name}: from {package['source']}")
        if package["name"] in banned:
            problems.append(f"{name}: banned")
        needs = tuple(map(int, (package["rust_version"] or "1.0").split(".")[:2]))
        if needs > newest:
            problems.append(f"{name}: needs Rust {package['rust_version']}")
    return problems


def workspace():
    return tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]


@pytest.mark.tool("own licence and source check")
def test_every_crate_is_allowed(metadata):
    assert faults(metadata) == []


@pytest.mark.parametrize("change, expected", [
    ({"license": "AGPL-3.0-only"}, "licence AGPL"),
    ({"license": "MIT AND GPL-3.0-only"}, "licence MIT AND GPL"),
    ({"license": None}, "licence None"),
    ({"source": "git+https://example.org/fork"}, "from git+"),
    ({"name": "openssl-sys"}, "banned"),
    ({"rust_version": "1.99"}, "needs Rust 1.99"),
], ids=["copyleft", "half-copyleft", "none", "fork", "banned", "too-new"])
@pytest.mark.tool("own licence and source check")
def test_what_is_not_allowed_is_noticed(metadata, change, expected):
    changed = {"packages": copy.deepcopy(metadata["packages"][:3])}
    changed["packages"][1].update(change)
    found = faults(changed)
    assert len(found) == 1 and expected in found[0], found


def test_a_choice_of_licences_may_contain_one_we_do_not_take():
    assert permitted("MIT OR GPL-3.0-only", {"MIT"})
    assert not permitted("(MIT OR Apache-2.0) AND Unicode-3.0", {"MIT"})


@pytest.mark.tool("cargo-deny")
def test_cargo_deny(tool):
    done = tool("--locked", "check", "licenses", "bans", "sources", cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.tool("cargo-deny")
def test_cargo_deny_notices(tool, tmp_path):
    text = (ROOT / "deny.toml").read_text()
    config = tmp_path / "deny.toml"
    for check, change in {
        "bans": ('{ name = "openssl-sys" }', '{ name = "tokio" }'),
        "licenses": ('    "MIT",\n', ""),
        "sources": ("rust-lang/crates.io-index", "rust-lang/another-index"),
    }.items():
        config.write_text(text.replace(*change))
        done = tool("--locked", "--config", config, "check", check, cwd=ROOT)
        assert done.returncode != 0 and f"{check} FAILED" in done.stderr + done.stdout, (check, done.stderr[-2000:])


@pytest.mark.tool("cargo-deny with advisories")
def test_advisories(tools):
    if "problem" in tools["cargo-deny"]:
        pytest.skip(f"cargo-deny with advisories NOT RUN: {tools['cargo-deny']['problem']}")
    try:
        done = subprocess.run([tools["cargo-deny"]["path"], "--locked", "check", "advisories"],
                              capture_output=True, text=True, timeout=120, cwd=ROOT)
    except subprocess.TimeoutExpired as late:
        pytest.skip(f"cargo-deny with advisories NOT RUN: it took longer than {late.timeout} s")
    if "failed to fetch advisory database" in done.stderr:
        pytest.skip("cargo-deny with advisories NOT RUN: the RustSec database cannot be fetched from here")
    assert done.returncode == 0, done.stderr


def test_crates_of_the_workspace_inherit_version_licence_and_rust(metadata):
    names = set()
    for member in workspace()["members"]:
        package = tomllib.loads((ROOT / member / "Cargo.toml").read_text())["package"]
        names.add(package["name"])
        for key in ("version", "edition", "license", "rust-version"):
            assert package[key] == {"workspace": True}, f"{member}: {key}"
    own = {package["name"] for package in metadata["packages"] if package["source"] is None}
    assert own == names


def test_this_compiler_is_not_older_than_stated():
    stated = workspace()["package"]["rust-version"]
    told = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True).stdout
    here = re.search(r"rustc (\d+)\.(\d+)", told)
    assert (int(here[1]), int(here[2])) >= tuple(map(int, stated.split(".")))


def older_toolchain(stated):
    """rustup's name of the stated compiler, or None if it is not installed."""
    if not shutil.which("rustup"):
        return None
    listed = subprocess.run(["rustup", "toolchain", "list"], capture_output=True, text=True, check=True).stdout
    return next((name for name in listed.split() if re.match(rf"{re.escape(stated)}(\.\d+)?(-|$)", name)), None)


@pytest.mark.tool("oldest compiler")
def test_the_stated_compiler_accepts_everything():
    """Needed only if the installed compiler is newer. Otherwise every build of this run used the stated one."""
    stated = workspace()["package"]["rust-version"]
    told = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True).stdout
    if told.split()[1].startswith(f"{stated}."):
        return
    toolchain = older_toolchain(stated)
    if not toolchain:
        pytest.skip(f"oldest compiler NOT RUN: the compiler here is {told.split()[1]}, and rustup has no {stated}")
    # In a separate target directory, because the two compilers cannot share build results.
    done = subprocess.run(["cargo", f"+{toolchain}", "check", "--locked", "--workspace", "--target-dir",
                           ROOT / "target" / "oldest"], capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def unlocked(text):
    """Builds, tests and checks that could change the locked versions without notice."""
    cargo = re.findall(r"(?:\$\(CARGO\)|\bcargo) (?:build|test|clippy|run|install|bench)\b.*", text)
    return [line for line in cargo if "--locked" not in line and "--version" not in line]


def test_every_build_is_locked():
    for path in ("Makefile", "deploy/image/Dockerfile", ".ci/run"):
        assert unlocked((ROOT / path).read_text()) == [], path
    assert unlocked("\t$(CARGO) build --release\n") == ["$(CARGO) build --release"]


def test_shipped_crates_have_no_heavy_features(metadata):
    """The unwanted features would add code that is never used."""
    unwanted = {"tokio": {"full", "test-util"}, "hdrhistogram": {"serialization"}}
    seen = set()
    for node in sbom.shipped(metadata).values():
        name = sbom.package(metadata, node["id"])["name"]
        assert not unwanted.get(name, set()) & set(node["features"]), name
        seen.add(name)
    assert set(unwanted) <= seen


def problem_of(bill):
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))


@pytest.mark.tool("CycloneDX schema")
def test_the_bill_of_materials_is_sound(metadata):
    bill = sbom.bill(metadata)
    assert problem_of(bill) is None
    names = {component["name"] for component in bill["components"]}
    assert {"tonic", "tokio", "prost"} <= names
    # Tests and build scripts are not shipped.
    assert not {"proptest", "protox", "prost-reflect"} & names
    assert sbom.bill(metadata) == bill, "the same lock file makes the same bill"


@pytest.mark.tool("CycloneDX schema")
def test_an_unsound_bill_is_noticed(metadata):
    bill = sbom.bill(metadata)
    bill["components"][0]["type"] = "gadget"
    assert problem_of(bill) is not None


def test_the_command_writes_it(tmp_path):
    out = tmp_path / "bill.json"
    script = ROOT / "deploy" / "supply-chain" / "sbom.py"
    subprocess.run([sys.executable, script, out], check=True, timeout=120, env=os.environ)
    assert json.loads(out.read_text())["bomFormat"] == "CycloneDX"
