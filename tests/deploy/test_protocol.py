"""Checks the protocol with buf. Rust tests check compatibility too, without buf."""

import shutil

import pytest

from tools import ROOT

PROTO = ROOT / "proto"
BASELINE = ROOT / "tests" / "fixtures" / "swiftcache-v1.binpb"


def changed(directory, file, old, new):
    """A copy of the protocol with one change."""
    copy = directory / "proto"
    shutil.copytree(PROTO / "proto", copy / "proto")
    shutil.copy(PROTO / "buf.yaml", copy)
    path = copy / "proto" / "swiftcache" / "v1" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return copy


@pytest.mark.tool("buf")
def test_lint(tool):
    done = tool("lint", PROTO)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tool("buf")
def test_lint_notices(tool, tmp_path):
    done = tool("lint", changed(tmp_path, "broker.proto", "uint32 hit_blocks = 2", "uint32 hitBlocks = 2"))
    assert done.returncode != 0 and "hitBlocks" in done.stdout


@pytest.mark.tool("buf")
def test_nothing_breaks(tool):
    done = tool("breaking", PROTO, "--against", BASELINE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("old, new", [
    ("uint32 hit_blocks = 2", "uint32 hit_blocks = 7"),
    ("uint32 hit_blocks = 2", "sint32 hit_blocks = 2"),
    ("uint32 hit_blocks = 2", "uint32 found_blocks = 2"),
    ("rpc Share(ShareRequest) returns (ShareResponse);", ""),
], ids=["number", "type", "name", "method"])
@pytest.mark.tool("buf")
def test_breaks_are_noticed(tool, tmp_path, old, new):
    done = tool("breaking", changed(tmp_path, "broker.proto", old, new), "--against", BASELINE)
    assert done.returncode != 0 and "broker.proto" in done.stdout
