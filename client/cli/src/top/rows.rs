//! Turns the answers of Admin into rows for people.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::v1;

use super::super::admin;

/// The leases of one borrower, namespace and class on one device.
#[derive(Debug, Default, PartialEq)]
pub(super) struct LeaseGroup {
    pub(super) borrower: String,
    label: String,
    pub(super) namespace: String,
    pub(super) device: String,
    pub(super) link: &'static str,
    pub(super) bytes: u64,
    pub(super) blocks: u64,
    /// What a running engine works with.
    working_set: bool,
    /// Its engine is gone.
    left: bool,
    draining: u32,
    zombies: u32,
    waiting: BTreeSet<u32>,
}

impl LeaseGroup {
    pub(super) fn is_zombie(&self) -> bool {
        self.zombies > 0
    }

    /// How many of its leases are draining, or which processes hold up its zombies.
    pub(super) fn state(&self) -> String {
        let pids: Vec<String> = self.waiting.iter().map(u32::to_string).collect();
        match (self.zombies, self.draining) {
            (0, 0) if self.working_set => "working set".to_owned(),
            (0, 0) if self.left => "left".to_owned(),
            (0, 0) => "active".to_owned(),
            (0, draining) => format!("{draining} draining"),
            // The pids are more important than counts, because somebody must act on these processes.
            _ => format!("zombie: {}", pids.join(" ")),
        }
    }
}

/// Rows of leases: those with most zombies first, then the largest.
pub(super) fn leases(leases: &[v1::LeaseStatus], devices: &[v1::DeviceStatus]) -> Vec<LeaseGroup> {
    let mut rows: BTreeMap<(&str, &str, &str, bool), LeaseGroup> = BTreeMap::new();
    for lease in leases {
        let working_set = lease.class() == v1::LeaseClass::WorkingSet;
        let left = lease.estate_left_ms.is_some();
        let key = (
            lease.borrower_label.as_str(),
            lease.namespace.as_str(),
            lease.device_uuid.as_str(),
            working_set,
        );
        let row = rows.entry(key).or_insert_with(|| LeaseGroup {
            borrower: match left {
                true => "(gone)".to_owned(),
                false => format!("{} [{}]", lease.borrower_name, lease.borrower_label),
            },
            left,
            label: lease.borrower_label.clone(),
            namespace: lease.namespace.clone(),
            device: short_device(&lease.device_uuid, devices),
            link: link(lease.link()),
            working_set,
            ..LeaseGroup::default()
        });
        row.bytes += lease.bytes;
        row.blocks += u64::from(lease.published_blocks);
        match lease.state() {
            v1::LeaseState::Draining => row.draining += 1,
            v1::LeaseState::Zombie => {
                row.zombies += 1;
                row.waiting.extend(&lease.waiting_for_pids);
            }
            v1::LeaseState::Active | v1::LeaseState::Unspecified => {}
        }
    }
    let mut rows: Vec<_> = rows.into_values().collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.zombies, row.bytes)));
    rows
}

fn link(kind: v1::LinkKind) -> &'static str {
    match kind {
        v1::LinkKind::SameDevice => "same",
        v1::LinkKind::Nvlink => "NVLink",
        v1::LinkKind::Pcie => "PCIe",
        v1::LinkKind::Host => "host",
        v1::LinkKind::Unspecified => "?",
    }
}

/// The device's number, because a UUID does not fit into the column; host memory's name does.
fn short_device(uuid: &str, devices: &[v1::DeviceStatus]) -> String {
    let mut devices = devices.iter().filter_map(|status| status.device.as_ref());
    let device = devices.find(|device| device.uuid == uuid);
    match device {
        Some(device) if !admin::is_host_memory(uuid) => device.ordinal.to_string(),
        _ => uuid.to_owned(),
    }
}

/// A part of a whole in percent, or "-" if the whole is 0.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    format!("{:.0}%", part as f64 * 100.0 / whole as f64)
}

/// The time of day, UTC.
pub(super) fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1_000 % 86_400;
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}", seconds % 60)
}

/// Rates between two answers of one broker.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rates {
    /// Blocks found per second, as engines report.
    pub(super) hits: f64,
    /// Blocks published per second.
    pub(super) published: f64,
    /// What engines found meanwhile.
    found: Found,
    /// Bytes per second over each link.
    pub(super) links: Vec<LinkRate>,
}

/// Bytes per second over one kind of link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LinkRate {
    pub(super) link: &'static str,
    pub(super) loaded: f64,
    pub(super) stored: f64,
}

impl Rates {
    /// `None` when the answers are from different brokers, or no time has passed between them.
    pub(super) fn between(
        before: &v1::GetNodeResponse,
        after: &v1::GetNodeResponse,
    ) -> Option<Self> {
        let elapsed = after.uptime_ms.checked_sub(before.uptime_ms)?;
        if before.boot_id != after.boot_id || elapsed == 0 {
            return None;
        }
        let traffics = [&before.traffic, &after.traffic].map(Option::as_ref);
        let links = traffics.map(|traffic| traffic.map_or(&[][..], |traffic| &traffic.links));
        let [earlier, later] = traffics.map(Found::of);
        let (before, after) = (before.counters?, after.counters?);
        let seconds = elapsed as f64 / 1_000.0;
        let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
        Some(Self {
            hits: rate(earlier.blocks(), later.blocks()),
            published: rate(before.published_blocks, after.published_blocks),
            found: later.since(&earlier),
            links: link_rates(links, rate),
        })
    }

    /// The share of the looked-up blocks that were found.
    pub(super) fn hit_rate(&self) -> String {
        self.found.share()
    }
}

/// What engines found of what they asked for, as they report: the broker sees only what they do not find themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Found {
    asked: u64,
    own: u64,
    replica: u64,
    host: u64,
}

impl Found {
    pub(super) fn of(traffic: Option<&v1::Traffic>) -> Self {
        traffic.map_or_else(Self::default, |traffic| Self {
            asked: traffic.lookup_blocks,
            own: traffic.own_blocks,
            replica: traffic.replica_blocks,
            host: traffic.host_blocks,
        })
    }

    fn blocks(&self) -> u64 {
        self.own + self.replica + self.host
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            asked: self.asked.saturating_sub(before.asked),
            own: self.own.saturating_sub(before.own),
            replica: self.replica.saturating_sub(before.replica),
            host: self.host.saturating_sub(before.host),
        }
    }

    /// "-" when nothing was asked.
    pub(super) fn share(&self) -> String {
        percent(self.blocks(), self.asked)
    }

    /// The same by tier.
    pub(super) fn by_tier(&self) -> String {
        let [own, replica, host] =
            [self.own, self.replica, self.host].map(|found| percent(found, self.asked));
        format!("own {own} shared {replica} host {host}")
    }
}

/// The share that the holder of a lease found. A worker whose scheduler asks for it looks for nothing itself: then it is what
/// the broker found in its namespace, since such a scheduler asks the broker for everything.
pub(super) fn hits_of(
    lease: &LeaseGroup,
    sessions: &[v1::SessionStatus],
    namespaces: &[v1::NamespaceStatus],
) -> String {
    let session = sessions.iter().find(|its| its.label == lease.label);
    let found = Found::of(session.and_then(|session| session.traffic.as_ref()));
    if found.asked > 0 {
        return found.share();
    }
    let its = namespaces
        .iter()
        .filter(|space| space.namespace == lease.namespace);
    let (found, asked) = its.fold((0, 0), |(found, asked), space| {
        (found + space.hit_blocks, asked + space.lookup_blocks)
    });
    percent(found, asked)
}

/// The rates of every link that was ever used, so that a link without traffic stays in its place.
fn link_rates(
    [before, after]: [&[v1::LinkTraffic]; 2],
    rate: impl Fn(u64, u64) -> f64,
) -> Vec<LinkRate> {
    let rates = after.iter().map(|now| {
        let then = before.iter().find(|then| then.link == now.link);
        let then = then.copied().unwrap_or_default();
        LinkRate {
            link: link(now.link()),
            loaded: rate(then.loaded_bytes, now.loaded_bytes),
            stored: rate(then.stored_bytes, now.stored_bytes),
        }
    });
    rates.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_have_rates_of_their_own() {
        let node = |uptime_ms, links: &[(v1::LinkKind, u64, u64)]| v1::GetNodeResponse {
            uptime_ms,
            counters: Some(v1::Counters::default()),
            traffic: Some(v1::Traffic {
                links: links
                    .iter()
                    .map(|(link, loaded_bytes, stored_bytes)| v1::LinkTraffic {
                        link: (*link).into(),
                        loaded_bytes: *loaded_bytes,
                        stored_bytes: *stored_bytes,
                    })
                    .collect(),
                ..v1::Traffic::default()
            }),
            ..v1::GetNodeResponse::default()
        };
        let (nvlink, host) = (v1::LinkKind::Nvlink, v1::LinkKind::Host);
        let before = node(0, &[(nvlink, 100, 10)]);
        let after = node(2_000, &[(nvlink, 300, 10), (host, 0, 8)]);
        let rates = Rates::between(&before, &after).unwrap().links;
        let seen: Vec<_> = rates.iter().map(|r| (r.link, r.loaded, r.stored)).collect();
        assert_eq!(seen, [("NVLink", 100.0, 0.0), ("host", 0.0, 4.0)]);
    }

    #[test]
    fn rates_are_of_one_broker_only() {
        let node = |uptime_ms, lookup_blocks, hit_blocks| v1::GetNodeResponse {
            boot_id: 1,
            uptime_ms,
            // An engine finds its own blocks without the broker, which is asked for the rest and has none of it.
            counters: Some(v1::Counters {
                lookup_blocks: lookup_blocks - hit_blocks,
                ..v1::Counters::default()
            }),
            traffic: Some(v1::Traffic {
                lookup_blocks,
                own_blocks: hit_blocks,
                ..v1::Traffic::default()
            }),
            ..v1::GetNodeResponse::default()
        };
        let before = node(1_000, 100, 100);
        let rates = Rates::between(&before, &node(3_000, 200, 150)).unwrap();
        assert_eq!((rates.hit_rate().as_str(), rates.hits), ("50%", 25.0));
        let still = Rates::between(&before, &node(2_000, 100, 100)).unwrap();
        assert_eq!(still.hit_rate(), "-");
        assert_eq!(Rates::between(&before, &before), None);
        let mut restarted = node(3_000, 200, 150);
        restarted.boot_id = 2;
        assert_eq!(Rates::between(&before, &restarted), None);
    }

    /// A borrower that looks for itself is shown by its own report, and one whose scheduler looks by what the broker found.
    #[test]
    fn a_holders_hits_are_those_of_whoever_looks() {
        let lease = |label: &str| LeaseGroup {
            label: label.to_owned(),
            namespace: "model".to_owned(),
            ..LeaseGroup::default()
        };
        let session = |label: &str, lookup_blocks, own_blocks| v1::SessionStatus {
            label: label.to_owned(),
            traffic: Some(v1::Traffic {
                lookup_blocks,
                own_blocks,
                ..v1::Traffic::default()
            }),
            ..v1::SessionStatus::default()
        };
        let sessions = [session("a", 100, 95), session("b", 0, 0)];
        let namespaces = [v1::NamespaceStatus {
            namespace: "model".to_owned(),
            lookup_blocks: 50,
            hit_blocks: 40,
            ..v1::NamespaceStatus::default()
        }];
        let shown = |label: &str| hits_of(&lease(label), &sessions, &namespaces);
        let all = ["a", "b", "nobody"].map(shown);
        assert_eq!(all, ["95%", "80%", "80%"]);
        assert_eq!(hits_of(&lease("b"), &sessions, &[]), "-");
    }

    #[test]
    fn a_working_set_has_a_row_of_its_own() {
        let lease = |class: v1::LeaseClass, bytes| v1::LeaseStatus {
            class: class.into(),
            bytes,
            ..v1::LeaseStatus::default()
        };
        let rows = leases(
            &[
                lease(v1::LeaseClass::WorkingSet, 30),
                lease(v1::LeaseClass::Cache, 20),
                // A broker before classes.
                lease(v1::LeaseClass::Unspecified, 5),
            ],
            &[],
        );
        let shown: Vec<_> = rows.iter().map(|row| (row.state(), row.bytes)).collect();
        assert_eq!(
            shown,
            [("working set".to_owned(), 30), ("active".to_owned(), 25)]
        );
    }

    #[test]
    fn zombies_come_first_and_name_their_processes() {
        let lease = |borrower: &str, state: v1::LeaseState, pids: &[u32]| v1::LeaseStatus {
            borrower_label: borrower.to_owned(),
            state: state.into(),
            bytes: 10,
            waiting_for_pids: pids.to_vec(),
            ..v1::LeaseStatus::default()
        };
        let rows = leases(
            &[
                lease("a", v1::LeaseState::Active, &[]),
                lease("a", v1::LeaseState::Draining, &[7]),
                lease("b", v1::LeaseState::Zombie, &[9, 7]),
            ],
            &[],
        );
        let states: Vec<String> = rows.iter().map(LeaseGroup::state).collect();
        assert_eq!(states, ["zombie: 7 9", "1 draining"]);
        assert_eq!(rows[1].bytes, 20);
    }

    #[test]
    fn times_are_of_the_day() {
        assert_eq!(clock(86_400_000 * 3 + 3_723_999), "01:02:03");
    }
}
