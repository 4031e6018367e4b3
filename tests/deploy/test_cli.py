"""Runs the `swiftcache` command like people and scripts: the real program, a real broker, a real terminal."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import time

import pytest

from test_binaries import CLEAN, CLI, run

# The limit for a hang, seconds. It measures nothing.
PATIENCE = 120


@pytest.fixture
def env(broker):
    return {**CLEAN, "SWIFTCACHE_SOCKET": str(broker.socket)}


def test_status_watch_is_a_document_a_line_until_it_is_interrupted(env, lent):
    # Unbuffered, because `communicate` would not get lines that are already in a buffer.
    watching = subprocess.Popen([CLI, "status", "--watch=10ms", "--json"], stdin=subprocess.DEVNULL, bufsize=0,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    try:
        first, second = [json.loads(watching.stdout.readline()) for _ in range(2)]
        assert first["boot_id"] == second["boot_id"]
        assert second["uptime_ms"] >= first["uptime_ms"]
        watching.send_signal(signal.SIGINT)
        rest, complaints = watching.communicate(timeout=PATIENCE)
        assert (watching.returncode, complaints) == (130, b"")
        for line in rest.splitlines():
            json.loads(line)
    finally:
        watching.kill()


def test_status_says_who_holds_what_and_what_moved(env, lent):
    done = run(CLI, "status", "--json", env=env)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    [lease] = [found for found in status["leases"] if found["namespace"] == lent.namespace]
    assert lease["waiting_for_pids"] == [], "nothing is revoked"
    found = {"lookup_blocks", "own_blocks", "replica_blocks", "host_blocks"}
    assert set(status["traffic"]) == found | {"links", "failed_operations", "routes_down"}
    assert status["traffic"]["failed_operations"] == 0 and status["traffic"]["routes_down"] == 0
    table = run(CLI, "status", env=env).stdout
    assert lent.namespace in table and "a borrower" in table


@pytest.mark.parametrize("there", [True, False], ids=["broker", "no-broker"])
def test_doctor_says_what_to_do_about_everything_that_is_not_well(env, tmp_path, there):
    socket = {} if there else {"SWIFTCACHE_SOCKET": str(tmp_path / "none.sock")}
    done = run(CLI, "doctor", "--json", env={**env, **socket})
    findings = json.loads(done.stdout)["findings"]
    assert {"kernel", "socket-dir", "nvml"} <= {found["check"] for found in findings}
    for found in findings:
        assert found["verdict"] in ("ok", "warn", "fail") and found["found"]
        assert (found["verdict"] == "ok") == ("advice" not in found), found
        assert found.get("advice") != ""
    failed = [found["check"] for found in findings if found["verdict"] == "fail"]
    assert done.returncode == (1 if failed else 0), failed
    if not there:
        assert "socket" in failed, "a broker that is not there is a failure"


SHELLS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


def check_syntax(shell, script):
    return subprocess.run([*SHELLS[shell], script], capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("shell", [
    pytest.param(shell, marks=pytest.mark.tool(f"completions for {shell}")) for shell in SHELLS
])
def test_completions_are_the_shells_language(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"completions for {shell} NOT RUN: there is no {shell} on this machine")
    done = run(CLI, "completions", shell)
    script = tmp_path / f"swiftcache.{shell}"
    script.write_text(done.stdout)
    assert done.returncode == 0 and "doctor" in done.stdout
    found = check_syntax(shell, script)
    assert (found.returncode, found.stderr) == (0, "")
    script.write_text(done.stdout + "\nif then (\n")
    assert check_syntax(shell, script).returncode != 0


def formatted(page, path):
    """The text of a manual page as a terminal shows it, and the formatter's warnings."""
    path.write_text(page)
    if shutil.which("man"):
        command = ["man", "--warnings", "--local-file", path]
    else:
        command = ["groff", "-man", "-Tascii", "-ww", path]
    # Without a locale that exists, `man` prints a warning.
    plain = {**CLEAN, "LC_ALL": "C.UTF-8", "MANPAGER": "cat"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=plain)
    assert done.returncode == 0, done.stderr
    # Remove the codes for bold and underlined letters.
    return re.sub(r".\x08|\x1b\[[\d;]*m", "", done.stdout), done.stderr


@pytest.mark.tool("manual page")
def test_the_manual_page_is_formatted_without_a_warning(tmp_path):
    if not (shutil.which("man") or shutil.which("groff")):
        pytest.skip("manual page NOT RUN: there is neither man nor groff on this machine")
    for command in ([], ["donate"], ["doctor"]):
        page = run(CLI, "man", *command)
        assert page.returncode == 0, page.stderr
        text, complaints = formatted(page.stdout, tmp_path / "swiftcache.1")
        assert complaints == ""
        assert "SYNOPSIS" in text and "--help" in text, text
    _, complaints = formatted(page.stdout + ".no-such-macro x\n", tmp_path / "swiftcache.1")
    assert complaints, "a macro that does not exist is noticed"


class Terminal:
    """A program that runs on a terminal of 80 columns and 24 rows."""

    def __init__(self, *command, env):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                                        env={**env, "TERM": "xterm-256color"})
        os.close(slave)
        self.text = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read_until(self, done, what):
        deadline = time.monotonic() + PATIENCE
        while not done(self.text):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{what} never came: {self.text!r}"
            try:
                chunk = os.read(self.master, 65536)
            except OSError:
                chunk = b""  # The other end is closed.
            if not chunk:
                break
            # Remove the codes for cursor positions and colours.
            self.text += re.sub(r"\x1b\[[?\d;]*[A-Za-z]", " ", self.decoder.decode(chunk))
        return self.text

    def press(self, key):
        os.write(self.master, key.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


HEADINGS = ["swiftcache ", "q quits", "devices", "lease holder", "namespace", "events (newest first, UTC)"]


@pytest.mark.parametrize(("key", "status"), [("q", 0), ("\x03", 130)], ids=["q", "control-c"])
def test_top_fills_a_small_terminal_and_a_key_ends_it(env, lent, key, status):
    terminal = Terminal(CLI, "top", env=env)
    try:
        text = terminal.read_until(lambda text: all(heading in text for heading in HEADINGS), "a heading")
        assert all(heading in text for heading in HEADINGS), text
        assert "a borrower" in text
        terminal.press(key)
        terminal.read_until(lambda _: False, "its end")
        assert terminal.process.wait(timeout=PATIENCE) == status
    finally:
        terminal.close()


def table_lines(text):
    return [line for line in text.splitlines() if line.startswith(("\u2502", "\u250c", "\u2514", "\u255e"))]


def test_status_folds_on_a_small_terminal(env, lent):
    terminal = Terminal(CLI, "status", env=env)
    try:
        text = terminal.read_until(lambda _: False, "its end")
        assert terminal.process.wait(timeout=PATIENCE) == 0
    finally:
        terminal.close()
    lines = table_lines(text)
    assert len(lines) > 12 and max(map(len, lines)) <= 80, text
    # The twin: where there is no terminal, a row is a line, for grep.
    plain = table_lines(run(CLI, "status", env=env).stdout)
    assert max(map(len, plain)) > 80, plain


def test_top_without_a_terminal_says_what_to_use(env):
    done = run(CLI, "top", env=env)
    assert done.returncode == 2 and "status --watch" in done.stderr
