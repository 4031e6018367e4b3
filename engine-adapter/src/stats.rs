//! Numbers, flat and named with their units.

use swiftcache_client::{
    cache::{BlocksByTier, BytesByLink, Latency, Stats},
    donor::DonorStatus,
    stream::StreamStats,
};
use swiftcache_proto::domain::LinkKind;

/// Every number with its name; `_native.pyi` lists them.
pub(crate) fn flat(stats: &Stats) -> Vec<(&'static str, u64)> {
    let BlocksByTier {
        donor,
        shared,
        host,
    } = stats.hits;
    let mut flat = vec![
        ("lookups", stats.lookups),
        ("lookup_blocks", stats.lookup_blocks),
        ("hit_donor_blocks", donor),
        ("hit_shared_blocks", shared),
        ("hit_host_blocks", host),
        ("failed_blocks", stats.failed_blocks),
        ("late_blocks", stats.late_blocks),
        ("failed_operations", stats.failed_operations),
        ("routes_down", stats.routes_down.into()),
        ("stored_blocks", stats.stored_blocks),
        ("known_blocks", stats.known_blocks),
        ("duplicate_blocks", stats.duplicate_blocks),
        ("unplaced_blocks", stats.unplaced_blocks),
        ("evicted_blocks", stats.evicted_blocks),
        ("demoted_blocks", stats.demoted_blocks),
        ("promoted_blocks", stats.promoted_blocks),
        ("moved_to_donor_blocks", stats.moved_to_donor),
        ("moved_to_host_blocks", stats.moved_to_host),
        ("dropped_blocks", stats.dropped_blocks),
        ("revocations", stats.revocations),
        ("refused_leases", stats.refused_leases),
        ("broker_misses", stats.broker_misses),
        ("leases", stats.leases.into()),
        ("shared_leases", stats.shared_leases.into()),
        ("leased_bytes", stats.leased_bytes),
        ("host_leased_bytes", stats.host_leased_bytes),
        ("donor_blocks", stats.donor_blocks),
        ("host_blocks", stats.host_blocks),
        ("unsettled_slabs", stats.unsettled_slabs.into()),
    ];
    flat.extend(crossed(&stats.loaded, LOADED));
    flat.extend(crossed(&stats.stored, STORED));
    flat.extend(took(&stats.drain, DRAIN));
    flat.extend(took(&stats.acknowledge, ACKNOWLEDGE));
    flat
}

/// What the engine itself lends.
pub(crate) fn lent(status: &DonorStatus) -> Vec<(&'static str, u64)> {
    let mut flat = vec![
        ("lent_bytes", status.offered_bytes),
        ("returning_bytes", status.withdrawing_bytes),
        ("stranded_bytes", status.stranded_bytes),
        ("returned_slabs", status.returned),
    ];
    flat.extend(took(&status.give_back, GIVE_BACK));
    flat
}

/// Where a stitched pool's units are, and what has become of them.
pub(crate) fn stitched(stats: &StreamStats) -> Vec<(&'static str, u64)> {
    let homes = &stats.homes;
    let mut flat = vec![
        ("units", stats.units.into()),
        ("unit_bytes", stats.unit_bytes),
        ("in_slabs", homes.in_slabs.into()),
        ("in_spares", homes.in_spares.into()),
        ("on_floor", homes.on_floor.into()),
        ("free_slabs", homes.free_slabs.into()),
        ("to_vacate", homes.to_vacate.into()),
        ("leased_bytes", stats.leased_bytes),
        ("floor_bytes", stats.floor_bytes),
        ("connected", stats.connected.into()),
        ("moved_units", stats.moved_units),
        ("failed_moves", stats.failed_moves),
        ("revocations", stats.revocations),
        ("refused_leases", stats.refused_leases),
    ];
    flat.extend(stats.by_link.iter().map(|(link, units)| {
        let name = match link {
            LinkKind::SameDevice => "same_device_units",
            LinkKind::Nvlink => "nvlink_units",
            LinkKind::Pcie => "pcie_units",
            LinkKind::Host => "host_units",
        };
        (name, u64::from(*units))
    }));
    flat.extend(took(&stats.steps, STEP));
    flat.extend(took(&stats.drain, DRAIN));
    flat.extend(took(&stats.acknowledge, ACKNOWLEDGE));
    flat
}

const STEP: [&str; 4] = ["step_count", "step_p50_us", "step_p99_us", "step_max_us"];

const LOADED: [&str; 4] = [
    "loaded_same_device_bytes",
    "loaded_nvlink_bytes",
    "loaded_pcie_bytes",
    "loaded_host_bytes",
];
const STORED: [&str; 4] = [
    "stored_same_device_bytes",
    "stored_nvlink_bytes",
    "stored_pcie_bytes",
    "stored_host_bytes",
];
const DRAIN: [&str; 4] = [
    "drain_count",
    "drain_p50_us",
    "drain_p99_us",
    "drain_max_us",
];
const GIVE_BACK: [&str; 4] = [
    "give_back_count",
    "give_back_p50_us",
    "give_back_p99_us",
    "give_back_max_us",
];
const ACKNOWLEDGE: [&str; 4] = [
    "acknowledge_count",
    "acknowledge_p50_us",
    "acknowledge_p99_us",
    "acknowledge_max_us",
];

fn crossed(bytes: &BytesByLink, names: [&'static str; 4]) -> [(&'static str, u64); 4] {
    let [same, nvlink, pcie, host] = names;
    [
        (same, bytes[LinkKind::SameDevice]),
        (nvlink, bytes[LinkKind::Nvlink]),
        (pcie, bytes[LinkKind::Pcie]),
        (host, bytes[LinkKind::Host]),
    ]
}

fn took(latency: &Latency, names: [&'static str; 4]) -> [(&'static str, u64); 4] {
    let [count, p50, p99, max] = names;
    [
        (count, latency.count),
        (p50, latency.p50_us),
        (p99, latency.p99_us),
        (max, latency.max_us),
    ]
}
