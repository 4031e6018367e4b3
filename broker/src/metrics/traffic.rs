//! Counters of what engines report. They change when a report comes, which is every few seconds.

use ::metrics::{Counter, Key, Label, Recorder, Unit};
use metrics_exporter_prometheus::PrometheusRecorder;
use swiftcache_proto::{
    domain::LinkKind,
    traffic::{LINKS, Traffic},
};

use super::METADATA;

const LINK_BYTES: &str = "swiftcache_link_bytes_total";
const LOOKUP_BLOCKS: &str = "swiftcache_engine_lookup_blocks_total";
const HIT_BLOCKS: &str = "swiftcache_engine_hit_blocks_total";
const FAILED: &str = "swiftcache_engine_failed_operations_total";

pub(super) struct TrafficCounters {
    links: [LinkCounters; LINKS.len()],
    lookup_blocks: Counter,
    own_blocks: Counter,
    replica_blocks: Counter,
    host_blocks: Counter,
    failed_operations: Counter,
}

struct LinkCounters {
    link: LinkKind,
    load: Counter,
    store: Counter,
}

impl TrafficCounters {
    pub(super) fn new(recorder: &PrometheusRecorder) -> Self {
        for (name, unit, help) in [
            (
                LINK_BYTES,
                Unit::Bytes,
                "Bytes that engines moved, by kind of link: a load copies into an engine's pool, a store copies out of it.",
            ),
            (
                LOOKUP_BLOCKS,
                Unit::Count,
                "Blocks that engines looked up, also in their own leases.",
            ),
            (
                HIT_BLOCKS,
                Unit::Count,
                "Blocks that engines found, by tier: own leases, replicas' leases, host memory.",
            ),
            (
                FAILED,
                Unit::Count,
                "Engines' loads, stores and moves whose copies failed.",
            ),
        ] {
            recorder.describe_counter(name.into(), Some(unit), help.into());
        }
        let counter = |name: &'static str, labels: Vec<Label>| {
            recorder.register_counter(&Key::from_parts(name, labels), &METADATA)
        };
        let bytes = |link, direction| {
            let labels = vec![
                Label::new("link", label(link)),
                Label::new("direction", direction),
            ];
            counter(LINK_BYTES, labels)
        };
        let hits = |tier| counter(HIT_BLOCKS, vec![Label::new("tier", tier)]);
        Self {
            links: LINKS.map(|link| LinkCounters {
                link,
                load: bytes(link, "load"),
                store: bytes(link, "store"),
            }),
            lookup_blocks: counter(LOOKUP_BLOCKS, Vec::new()),
            own_blocks: hits("own"),
            replica_blocks: hits("replica"),
            host_blocks: hits("host"),
            failed_operations: counter(FAILED, Vec::new()),
        }
    }

    pub(super) fn count(&self, more: &Traffic) {
        for counters in &self.links {
            counters.load.increment(more.loaded[counters.link]);
            counters.store.increment(more.stored[counters.link]);
        }
        self.lookup_blocks.increment(more.lookup_blocks);
        self.own_blocks.increment(more.own_blocks);
        self.replica_blocks.increment(more.replica_blocks);
        self.host_blocks.increment(more.host_blocks);
        self.failed_operations.increment(more.failed_operations);
    }
}

fn label(link: LinkKind) -> &'static str {
    match link {
        LinkKind::SameDevice => "same-device",
        LinkKind::Nvlink => "nvlink",
        LinkKind::Pcie => "pcie",
        LinkKind::Host => "host",
    }
}
