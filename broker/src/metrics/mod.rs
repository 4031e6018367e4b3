//! Metrics for Prometheus. Counters and histograms move as things happen; gauges are read from the state when
//! somebody scrapes. Each broker has its own recorder: nothing is global.

mod traffic;

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ::metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use swiftcache_proto::traffic::Traffic;

use crate::core::Note;
use traffic::TrafficCounters;

/// The RPCs, all of which are timed.
const RPCS: [&str; 29] = [
    "Register",
    "Session",
    "Leave",
    "Offer",
    "Withdraw",
    "Lease",
    "Release",
    "Share",
    "Publish",
    "Unpublish",
    "Lookup",
    "Keep",
    "Disk",
    "Report",
    "GetNode",
    "ListSessions",
    "ListRegions",
    "ListLeases",
    "ListNamespaces",
    "ListEvents",
    "Drain",
    "Undrain",
    "Evict",
    "Forget",
    "Inherit",
    "PreviewWithdraw",
    "SetQuota",
    "Hold",
    "Watch",
];
/// Upper bounds, seconds: an RPC takes tens of microseconds, its deadline is seconds.
const RPC_SECONDS: [f64; 12] = [
    25e-6, 50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3, 20e-3, 0.1, 1.0,
];
/// Upper bounds, seconds: a healthy borrower lets go within milliseconds, a zombie within a process's life.
const REVOKE_SECONDS: [f64; 11] = [
    1e-3, 2e-3, 5e-3, 10e-3, 50e-3, 0.2, 1.0, 5.0, 30.0, 300.0, 3600.0,
];

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// The broker's metrics.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    rpcs: HashMap<&'static str, Histogram>,
    leases: Counter,
    lease_shortfalls: Counter,
    revocations: Counter,
    zombies: Counter,
    revoke: Histogram,
    lookups: Counter,
    lookup_blocks: Counter,
    hit_blocks: Counter,
    published_blocks: Counter,
    evicted_blocks: Counter,
    gone: Counter,
    refusals: Counter,
    traffic: TrafficCounters,
}

/// Measures one RPC; records when dropped.
pub struct RpcTimer<'a> {
    histogram: Option<&'a Histogram>,
    since: Instant,
}

impl Drop for RpcTimer<'_> {
    fn drop(&mut self) {
        if let Some(histogram) = self.histogram {
            histogram.record(self.since.elapsed());
        }
    }
}

impl Metrics {
    /// A recorder of its own.
    ///
    /// # Errors
    /// When the bucket bounds are refused.
    pub fn new() -> Result<Self, BuildError> {
        let rpc_seconds = "swiftcache_rpc_duration_seconds";
        let revoke_seconds = "swiftcache_revoke_duration_seconds";
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Full(rpc_seconds.to_owned()), &RPC_SECONDS)?
            .set_buckets_for_metric(Matcher::Full(revoke_seconds.to_owned()), &REVOKE_SECONDS)?
            .build_recorder();
        let counter = |name: &'static str, help: &'static str| {
            recorder.describe_counter(name.into(), Some(Unit::Count), help.into());
            recorder.register_counter(&Key::from_static_name(name), &METADATA)
        };
        let seconds = |name: &'static str, help: &'static str| {
            recorder.describe_histogram(name.into(), Some(Unit::Seconds), help.into());
        };
        seconds(rpc_seconds, "Time an RPC took in the broker.");
        seconds(
            revoke_seconds,
            "Time from a lease's revocation until nobody could touch it any more.",
        );
        let rpcs = RPCS.map(|rpc| {
            let key = Key::from_parts(rpc_seconds, vec![Label::new("rpc", rpc)]);
            (rpc, recorder.register_histogram(&key, &METADATA))
        });
        for (name, unit, help) in GAUGES {
            recorder.describe_gauge(name.into(), Some(unit), help.into());
        }
        let start_time = "swiftcache_start_time_seconds";
        let help = "When this broker started, seconds since 1970: a change is a restart.";
        recorder.describe_gauge(start_time.into(), Some(Unit::Seconds), help.into());
        let started = SystemTime::now().duration_since(UNIX_EPOCH);
        recorder
            .register_gauge(&Key::from_static_name(start_time), &METADATA)
            .set(started.unwrap_or_default().as_secs_f64());
        Ok(Self {
            rpcs: rpcs.into_iter().collect(),
            leases: counter("swiftcache_leases_granted_total", "Leases granted."),
            lease_shortfalls: counter(
                "swiftcache_lease_shortfalls_total",
                "Lease requests granted less than they asked for.",
            ),
            revocations: counter("swiftcache_revocations_total", "Leases revoked."),
            zombies: counter(
                "swiftcache_zombies_total",
                "Revoked leases still mapped past their drain window.",
            ),
            revoke: recorder.register_histogram(&Key::from_static_name(revoke_seconds), &METADATA),
            lookups: counter("swiftcache_lookups_total", "Lookups."),
            lookup_blocks: counter(
                "swiftcache_lookup_blocks_total",
                "Blocks that the broker was asked for. Engines find most blocks without it.",
            ),
            hit_blocks: counter(
                "swiftcache_hit_blocks_total",
                "Blocks that the broker found.",
            ),
            published_blocks: counter("swiftcache_published_blocks_total", "Blocks published."),
            evicted_blocks: counter(
                "swiftcache_evicted_blocks_total",
                "Blocks an operator dropped from the index.",
            ),
            gone: counter(
                "swiftcache_sessions_gone_total",
                "Sessions that ended because their process did.",
            ),
            refusals: counter("swiftcache_refusals_total", "Requests the core refused."),
            traffic: TrafficCounters::new(&recorder),
            handle: recorder.handle(),
            recorder,
        })
    }

    /// Times an RPC until the answer is dropped.
    pub fn time(&self, rpc: &str) -> RpcTimer<'_> {
        let histogram = self.rpcs.get(rpc);
        debug_assert!(histogram.is_some(), "{rpc} is not among the RPCS");
        RpcTimer {
            histogram,
            since: Instant::now(),
        }
    }

    /// Counts an event of the core.
    pub fn note(&self, note: &Note) {
        match note {
            Note::Leased { .. } => self.leases.increment(1),
            Note::LeaseShort { .. } => self.lease_shortfalls.increment(1),
            Note::Revoked { .. } => self.revocations.increment(1),
            Note::LeaseEnded {
                after_ms: Some(ms), ..
            } => self.revoke.record(Duration::from_millis(*ms)),
            Note::Zombie { .. } => self.zombies.increment(1),
            Note::Published { blocks } => self.published_blocks.increment(u64::from(*blocks)),
            Note::Looked { blocks, hits } => {
                self.lookups.increment(1);
                self.lookup_blocks.increment(u64::from(*blocks));
                self.hit_blocks.increment(u64::from(*hits));
            }
            Note::Evicted { blocks } => self.evicted_blocks.increment(*blocks),
            Note::Gone { .. } => self.gone.increment(1),
            Note::Refused { .. } => self.refusals.increment(1),
            _ => {}
        }
    }

    /// Counts what engines say they moved and found since they last did.
    pub fn moved(&self, more: &Traffic) {
        self.traffic.count(more);
    }

    /// Sets a gauge; `name` is one of [`GAUGES`].
    pub fn set(&self, name: &'static str, labels: Vec<Label>, value: u64) {
        let gauge: Gauge = self
            .recorder
            .register_gauge(&Key::from_parts(name, labels), &METADATA);
        gauge.set(value as f64);
    }

    /// Folds recent histogram samples in. Called now and then, so that they do not pile up unscraped.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// The text Prometheus reads.
    pub fn render(&self) -> String {
        self.handle.render()
    }
}

/// What is read from the state at each scrape.
pub const GAUGES: [(&str, Unit, &str); 20] = [
    (
        "swiftcache_offered_bytes",
        Unit::Bytes,
        "Offered HBM by device and state: free, drained, leased, working-set, draining, zombie, scrubbing.",
    ),
    (
        "swiftcache_drains",
        Unit::Count,
        "Devices, donors and regions that an operator drains now. A drain lasts until somebody ends it.",
    ),
    ("swiftcache_hbm_bytes", Unit::Bytes, "Total HBM by device."),
    ("swiftcache_sessions", Unit::Count, "Sessions."),
    (
        "swiftcache_attached_sessions",
        Unit::Count,
        "Sessions whose stream is up.",
    ),
    (
        "swiftcache_leases",
        Unit::Count,
        "Leases, revoked ones included.",
    ),
    ("swiftcache_regions", Unit::Count, "Regions on offer."),
    (
        "swiftcache_unmappable_regions",
        Unit::Count,
        "Regions that some session says it cannot map, by device.",
    ),
    (
        "swiftcache_disk_bytes",
        Unit::Bytes,
        "The most that the files of disks take.",
    ),
    (
        "swiftcache_disk_used_bytes",
        Unit::Bytes,
        "What the files of disks take.",
    ),
    ("swiftcache_disk_blocks", Unit::Count, "Blocks on disks."),
    (
        "swiftcache_disk_to_store_blocks",
        Unit::Count,
        "Blocks in host memory that wait to be written to disks.",
    ),
    (
        "swiftcache_disk_wanted_blocks",
        Unit::Count,
        "Blocks that lookups wanted and that are on their way from disks.",
    ),
    (
        "swiftcache_disk_written_blocks",
        Unit::Count,
        "Blocks that the present disks' agents wrote.",
    ),
    (
        "swiftcache_disk_read_blocks",
        Unit::Count,
        "Blocks that they read.",
    ),
    (
        "swiftcache_disk_corrupt_blocks",
        Unit::Count,
        "Blocks whose bytes on a disk were not those that were written. None was given out.",
    ),
    (
        "swiftcache_disk_failed_blocks",
        Unit::Count,
        "Blocks that a disk did not read or write.",
    ),
    (
        "swiftcache_log_lines_dropped",
        Unit::Count,
        "Log lines dropped since the start, because standard error was not read.",
    ),
    (
        "swiftcache_indexed_blocks",
        Unit::Count,
        "Blocks that a lookup can find.",
    ),
    (
        "swiftcache_engine_routes_down",
        Unit::Count,
        "Ways to devices' memory and to host memory on which engines' copies fail repeatedly.",
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;

    use super::*;

    #[test]
    fn every_rpc_is_timed() {
        let descriptors = swiftcache_proto::v1::FILE_DESCRIPTOR_SET;
        let set = prost_types::FileDescriptorSet::decode(descriptors).unwrap();
        let services = set.file.iter().flat_map(|file| &file.service);
        let of_ours = services.filter(|service| ["Broker", "Admin"].contains(&service.name()));
        let methods = of_ours.flat_map(|service| &service.method);
        let methods: BTreeSet<&str> = methods.map(|method| method.name()).collect();
        assert_eq!(methods, RPCS.into_iter().collect());
        let metrics = Metrics::new().unwrap();
        for rpc in RPCS {
            drop(metrics.time(rpc));
        }
        let text = metrics.render();
        for rpc in RPCS {
            let line = format!("swiftcache_rpc_duration_seconds_count{{rpc=\"{rpc}\"}} 1");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
}
