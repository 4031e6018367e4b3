from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "harness")]

pytest_plugins = ["engine_fixtures"]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch):
    """The fake in place of the native module, empty."""
    import fake_native

    import swiftcache

    fake_native.published.clear()
    fake_native.hosts.clear()
    fake_native.calls.clear()
    fake_native.coming.clear()
    fake_native.lose.clear()
    fake_native.Claim.there.clear()
    fake_native.hold_stores = fake_native.hold_loads = False
    monkeypatch.setattr(swiftcache, "_native", fake_native, raising=False)
    monkeypatch.setitem(sys.modules, "swiftcache._native", fake_native)
    return fake_native
