"""What operators set: read from what the engine was told and from the environment, and refused by name."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from swiftcache._native import MAX_DRAIN_MS, MAX_TENANT_BYTES
from swiftcache.engine.settings import Settings

WHERE = "the engine's extra settings"


def read(extra: Mapping[str, object] | None, environment: Mapping[str, str]) -> Settings:
    return Settings.read(WHERE, extra, environment)


def test_defaults_need_nothing() -> None:
    settings = read(None, {})
    assert settings.socket == "/run/swiftcache/broker.sock"
    assert settings.load == "auto"
    assert settings.max_leased_bytes > 0


def test_the_flag_wins_over_the_environment() -> None:
    environment = {"SWIFTCACHE_SOCKET": "/a", "SWIFTCACHE_MAX_LEASED_BYTES": "2GiB", "SWIFTCACHE_SHARE": "no"}
    settings = read({"socket": "/b", "lease_step_bytes": "64M"}, environment)
    assert (settings.socket, settings.max_leased_bytes, settings.share) == ("/b", 2 << 30, False)
    assert settings.lease_step_bytes == 64 << 20


def test_sizes() -> None:
    sizes: list[tuple[object, int]] = [
        ("1.5GiB", 3 << 29),
        ("64M", 64 << 20),
        (4096, 4096),
        ("1024TiB", 1 << 50),
        ("7B", 7),
    ]
    # As the broker and the command line read them.
    for text, size in [*sizes, ("64 MB", 64_000_000), ("2g", 2 << 30), ("1.5 gb", 1_500_000_000), ("4KB", 4_000)]:
        assert read({"max_leased_bytes": text}, {}).max_leased_bytes == size


@pytest.mark.parametrize("variable", ["LOKUP_MS", "SOKCET", "MAX_LEASE_BYTES", "SHARES", "LEND_RESERV"])
def test_a_mistyped_variable_is_named(variable: str) -> None:
    with pytest.raises(ValueError, match=f"SWIFTCACHE_{variable} is no setting"):
        read(None, {f"SWIFTCACHE_{variable}": "1"})


def test_variables_of_the_broker_and_of_kubernetes_are_left_alone() -> None:
    others = [
        "DRAIN_MS",
        "FD_SOCKET",
        "LOG",
        "STATE_DIR",
        "PORT_9477_TCP",
        "SERVICE_HOST",
        "CONFIG",
        "LIBCUDA",
        "STUB_DIR",
    ]
    assert read(None, {f"SWIFTCACHE_{name}": "1" for name in others}) == Settings()


@pytest.mark.parametrize(
    ("value", "share"), [(0, 0.0), ("0.5", 0.5), (0.25, 0.25), (1, 1.0), ("1.0", 1.0), (".5", 0.5)]
)
def test_shares(value: object, share: float) -> None:
    assert read({"lend": value}, {}).lend == share


def test_the_largest_values_are_taken() -> None:
    settings = read({"lend_drain_ms": MAX_DRAIN_MS, "tenant": "t" * MAX_TENANT_BYTES}, {})
    assert settings.lend_drain_ms == MAX_DRAIN_MS and len(settings.tenant) == MAX_TENANT_BYTES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_leased_bytes", "plenty"),
        ("max_leased_bytes", True),
        ("max_leased_bytes", -1),
        ("max_leased_bytes", 1.5),
        ("max_leased_bytes", "1.5"),
        ("max_leased_bytes", 1 << 63),
        ("host_tier_bytes", "1025TiB"),
        ("lease_step_bytes", 0),
        ("lookup_ms", 0),
        ("lookup_ms", "soon"),
        ("share", "perhaps"),
        ("load", "lazily"),
        ("backend", "rocm"),
        ("socket", ""),
        ("device", 3),
        ("tenant", "t" * (MAX_TENANT_BYTES + 1)),
        ("lend", 1.5),
        ("lend", "half"),
        ("lend", True),
        ("lend_reserve", -0.1),
        ("lend_after_ms", -1),
        ("lend_drain_ms", 0),
        ("lend_drain_ms", MAX_DRAIN_MS + 1),
        ("lookup_ms", 10**12),
        ("stream_bytes", "plenty"),
        ("stream_bytes", -1),
        ("stream_window_bytes", 0),
        ("stream_spare_units", "1.5"),
        ("stream_step_ms", 0),
        ("sokcet", "/x"),
    ],
)
def test_a_bad_setting_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{WHERE}: .*{key}"):
        read({key: value}, {})


def test_a_worker_does_not_lend_from_a_pool_that_it_leases_for() -> None:
    with pytest.raises(ValueError, match=f"{WHERE}: lend and stream_bytes"):
        read({"lend": 0.5}, {"SWIFTCACHE_STREAM_BYTES": "1GiB"})


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(ValueError, match="SWIFTCACHE_LOAD"):
        read({}, {"SWIFTCACHE_LOAD": "lazily"})
