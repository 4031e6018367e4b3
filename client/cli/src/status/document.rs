//! What `swiftcache status --json` prints.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use swiftcache_proto::v1;

use crate::admin::{self, Snapshot, simulated};

/// The document of `--json`. Sizes are bytes.
#[derive(Debug, Serialize)]
pub(super) struct Status {
    pub(super) version: String,
    pub(super) boot_id: String,
    pub(super) uptime_ms: u64,
    pub(super) probe: String,
    /// For people: where the devices come from.
    #[serde(skip)]
    pub(super) source: String,
    /// The devices are not real.
    pub(super) simulated: bool,
    pub(super) sessions: u32,
    pub(super) indexed_blocks: u64,
    pub(super) total: Account,
    pub(super) counters: Counters,
    pub(super) traffic: Traffic,
    pub(super) devices: Vec<DeviceRow>,
    /// GPUs that the driver lists and the broker does not use.
    pub(super) left_out: Vec<LeftOutRow>,
    pub(super) donors: Vec<DonorRow>,
    pub(super) leases: Vec<LeaseRow>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) disks: Vec<DiskRow>,
    /// Engines with a stitched pool.
    pub(super) pools: Vec<PoolRow>,
    pub(super) namespaces: Vec<NamespaceRow>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Account {
    pub(super) offered: u64,
    /// What may be lent now.
    pub(super) free: u64,
    /// Held by nobody, and lent to nobody while an operator's drain lasts.
    pub(super) drained: u64,
    pub(super) leased: u64,
    /// Of the leased bytes: working sets of running engines.
    pub(super) working_set: u64,
    /// Of the leased bytes: left by engines that are gone, for their successors.
    pub(super) estate: u64,
    pub(super) draining: u64,
    pub(super) zombie: u64,
    pub(super) scrubbing: u64,
}

impl Account {
    pub(super) fn new(account: Option<&v1::Account>) -> Self {
        account.map_or_else(Self::default, |account| Self {
            offered: account.offered_bytes,
            free: account.free_bytes.saturating_sub(account.drained_bytes),
            drained: account.drained_bytes,
            leased: account.leased_bytes,
            working_set: account.working_set_bytes,
            estate: account.estate_bytes,
            draining: account.draining_bytes,
            zombie: account.zombie_bytes,
            scrubbing: account.scrubbing_bytes,
        })
    }
}

/// Since the broker started. Lookups are those that it answered: engines find most blocks without it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Counters {
    pub(super) leases_granted: u64,
    pub(super) leases_refused: u64,
    pub(super) revocations: u64,
    pub(super) acknowledgements: u64,
    pub(super) zombies: u64,
    pub(super) lookups: u64,
    pub(super) lookup_blocks: u64,
    pub(super) hit_blocks: u64,
    pub(super) published_blocks: u64,
    pub(super) estate_leases: u64,
    pub(super) inherited_leases: u64,
}

/// What engines reported since the broker started.
#[derive(Debug, Default, Serialize)]
pub(super) struct Traffic {
    pub(super) links: Vec<LinkRow>,
    pub(super) lookup_blocks: u64,
    pub(super) own_blocks: u64,
    pub(super) replica_blocks: u64,
    pub(super) host_blocks: u64,
    pub(super) failed_operations: u64,
    /// Now, over all engines.
    pub(super) routes_down: u32,
}

#[derive(Debug, Serialize)]
pub(super) struct LinkRow {
    pub(super) link: &'static str,
    pub(super) loaded: u64,
    pub(super) stored: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct DeviceRow {
    pub(super) uuid: String,
    pub(super) name: String,
    /// Null when it is unknown.
    pub(super) hbm: Option<u64>,
    /// Null when it is unknown.
    pub(super) hbm_used: Option<u64>,
    pub(super) drained: bool,
    /// An engine starts on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hold: Option<HoldRow>,
    pub(super) account: Account,
    /// What the broker cannot tell of the device, and why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) problem: String,
}

#[derive(Debug, Serialize)]
pub(super) struct HoldRow {
    /// What elastic donors are to leave free.
    pub(super) free: u64,
    pub(super) left_ms: u32,
}

#[derive(Debug, Serialize)]
pub(super) struct LeftOutRow {
    pub(super) ordinal: u32,
    /// Null when the driver did not say.
    pub(super) uuid: Option<String>,
    pub(super) reason: String,
    #[serde(skip)]
    pub(super) line: String,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct DonorRow {
    pub(super) label: String,
    pub(super) name: String,
    /// Empty when the donor is drained and has nothing on offer.
    pub(super) device: String,
    pub(super) pid: u32,
    pub(super) regions: u32,
    pub(super) offered: u64,
    pub(super) leased: u64,
    /// Regions that some session says it cannot map.
    pub(super) unmappable_regions: u32,
    /// An operator drains the donor.
    pub(super) drained: bool,
    /// The regions that an operator drains by themselves, by id.
    pub(super) drained_regions: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct LeaseRow {
    pub(super) borrower: String,
    pub(super) pid: u32,
    pub(super) namespace: String,
    pub(super) device: String,
    pub(super) link: &'static str,
    /// What the leases are for.
    pub(super) class: &'static str,
    pub(super) slabs: u32,
    pub(super) leased: u64,
    /// Slabs that are revoked and not yet given up, zombies among them.
    pub(super) revoked: u32,
    pub(super) zombies: u32,
    /// Processes that have not let go of what is revoked: lessee and readers.
    pub(super) waiting_for_pids: BTreeSet<u32>,
    pub(super) blocks: u64,
}

/// A disk below host memory, as its agent says.
#[derive(Debug, Serialize)]
pub(super) struct DiskRow {
    pub(super) disk: String,
    pub(super) tenant: String,
    pub(super) session: String,
    /// The directory of its file.
    pub(super) path: String,
    /// The most that its file takes.
    pub(super) bytes: u64,
    pub(super) used: u64,
    pub(super) blocks: u64,
    /// Blocks in host memory that wait to be written.
    pub(super) to_store_blocks: u64,
    /// Blocks that lookups wanted and that are on their way to host memory.
    pub(super) wanted_blocks: u64,
    pub(super) written_blocks: u64,
    pub(super) read_blocks: u64,
    pub(super) corrupt_blocks: u64,
    pub(super) failed_blocks: u64,
    pub(super) evicted_blocks: u64,
    /// How fast blocks came back lately.
    pub(super) bytes_per_second: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) problem: String,
}

fn disk(status: &v1::DiskStatus) -> DiskRow {
    let state = status.state.clone().unwrap_or_default();
    DiskRow {
        disk: status.device_uuid.clone(),
        tenant: status.tenant.clone(),
        session: status.session.clone(),
        path: state.path,
        bytes: state.bytes,
        used: state.used_bytes,
        blocks: status.blocks,
        to_store_blocks: status.to_store_blocks,
        wanted_blocks: status.wanted_blocks,
        written_blocks: state.written_blocks,
        read_blocks: state.read_blocks,
        corrupt_blocks: state.corrupt_blocks,
        failed_blocks: state.failed_blocks,
        evicted_blocks: state.evicted_blocks,
        bytes_per_second: state.bytes_per_second,
        problem: state.problem,
    }
}

/// Where an engine's stitched pool is, as it reports. What lies in its own part of the pool is not in it.
#[derive(Debug, Serialize)]
pub(super) struct PoolRow {
    pub(super) engine: String,
    pub(super) pid: u32,
    /// In leased slabs.
    pub(super) leased: u64,
    /// In spare slabs on its own device.
    pub(super) spare: u64,
    /// In host memory, until a slab can be leased for it.
    pub(super) host: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct NamespaceRow {
    pub(super) namespace: String,
    pub(super) tenant: String,
    pub(super) blocks: u64,
    pub(super) leased: u64,
    /// Of the leased bytes: left by engines that are gone, for their successors.
    pub(super) estate: u64,
    /// Lookups of the broker, as in the counters.
    pub(super) lookups: u64,
    pub(super) lookup_blocks: u64,
    pub(super) hit_blocks: u64,
}

impl Status {
    pub(super) fn new(snapshot: Snapshot) -> Self {
        let node = snapshot.node;
        let donors = donors(&snapshot.regions, &snapshot.sessions);
        let counters = node
            .counters
            .as_ref()
            .map_or_else(Counters::default, |c| Counters {
                leases_granted: c.leases_granted,
                leases_refused: c.leases_refused,
                revocations: c.revocations,
                acknowledgements: c.acknowledgements,
                zombies: c.zombies,
                lookups: c.lookups,
                lookup_blocks: c.lookup_blocks,
                hit_blocks: c.hit_blocks,
                published_blocks: c.published_blocks,
                estate_leases: c.estate_leases,
                inherited_leases: c.inherited_leases,
            });
        Self {
            simulated: simulated(&node).is_some(),
            source: admin::source(&node),
            left_out: node.left_out.iter().map(left_out).collect(),
            total: Account::new(node.total.as_ref()),
            counters,
            traffic: traffic(node.traffic.as_ref(), node.routes_down),
            devices: node.devices.iter().map(device).collect(),
            donors,
            leases: leases(&snapshot.leases),
            disks: node.disks.iter().map(disk).collect(),
            pools: snapshot.sessions.iter().filter_map(pool).collect(),
            namespaces: snapshot.namespaces.into_iter().map(namespace).collect(),
            version: node.version,
            boot_id: format!("{:016x}", node.boot_id),
            uptime_ms: node.uptime_ms,
            probe: node.probe,
            sessions: node.sessions,
            indexed_blocks: node.indexed_blocks,
        }
    }
}

fn device(status: &v1::DeviceStatus) -> DeviceRow {
    let device = status.device.clone().unwrap_or_default();
    DeviceRow {
        uuid: device.uuid,
        name: device.name,
        hbm: (device.hbm_bytes > 0).then_some(device.hbm_bytes),
        hbm_used: (!status.hbm_used_unknown).then_some(status.hbm_used_bytes),
        drained: status.drained,
        hold: status.hold.map(|hold| HoldRow {
            free: hold.free_bytes,
            left_ms: hold.left_ms,
        }),
        account: Account::new(status.account.as_ref()),
        problem: status.problem.clone(),
    }
}

fn left_out(gpu: &v1::LeftOutDevice) -> LeftOutRow {
    LeftOutRow {
        ordinal: gpu.ordinal,
        uuid: (!gpu.uuid.is_empty()).then(|| gpu.uuid.clone()),
        reason: gpu.reason.clone(),
        line: admin::left_out(gpu),
    }
}

fn traffic(traffic: Option<&v1::Traffic>, routes_down: u32) -> Traffic {
    // An older broker knows of none.
    let Some(traffic) = traffic else {
        return Traffic::default();
    };
    let links = traffic.links.iter().map(|entry| LinkRow {
        link: link(entry.link()),
        loaded: entry.loaded_bytes,
        stored: entry.stored_bytes,
    });
    Traffic {
        links: links.collect(),
        lookup_blocks: traffic.lookup_blocks,
        own_blocks: traffic.own_blocks,
        replica_blocks: traffic.replica_blocks,
        host_blocks: traffic.host_blocks,
        failed_operations: traffic.failed_operations,
        routes_down,
    }
}

fn link(kind: v1::LinkKind) -> &'static str {
    match kind {
        v1::LinkKind::SameDevice => "same device",
        v1::LinkKind::Nvlink => "NVLink",
        v1::LinkKind::Pcie => "PCIe",
        v1::LinkKind::Host => "host",
        v1::LinkKind::Unspecified => "?",
    }
}

/// A row for each donor and device. A drained donor that has nothing on offer has a row too: its drain lasts.
fn donors(regions: &[v1::RegionStatus], sessions: &[v1::SessionStatus]) -> Vec<DonorRow> {
    let mut rows: BTreeMap<(&str, &str), DonorRow> = BTreeMap::new();
    for region in regions {
        let row = rows
            .entry((&region.donor_label, &region.device_uuid))
            .or_default();
        row.regions += 1;
        let account = Account::new(region.account.as_ref());
        row.offered += account.offered;
        row.leased += account.leased;
        row.unmappable_regions += u32::from(region.unmappable_sessions > 0);
        row.label.clone_from(&region.donor_label);
        row.name.clone_from(&region.donor_name);
        row.device.clone_from(&region.device_uuid);
        let session = sessions
            .iter()
            .find(|session| session.label == region.donor_label);
        row.pid = session.map_or(0, |session| session.pid);
        row.drained = session.is_some_and(|session| session.drained);
        if region.drained {
            row.drained_regions.push(region.region_id.clone());
        }
    }
    let offers = |label: &str| regions.iter().any(|region| region.donor_label == label);
    for session in sessions {
        if session.drained && !offers(&session.label) {
            let row = DonorRow {
                label: session.label.clone(),
                name: session.name.clone(),
                pid: session.pid,
                drained: true,
                ..DonorRow::default()
            };
            rows.insert((&session.label, ""), row);
        }
    }
    rows.into_values().collect()
}

fn pool(session: &v1::SessionStatus) -> Option<PoolRow> {
    let homes = session.homes?;
    Some(PoolRow {
        engine: format!("{} [{}]", session.name, session.label),
        pid: session.pid,
        leased: homes.leased_bytes,
        spare: homes.spare_bytes,
        host: homes.host_bytes,
    })
}

fn class(class: v1::LeaseClass) -> &'static str {
    match class {
        v1::LeaseClass::WorkingSet => "working set",
        v1::LeaseClass::Cache | v1::LeaseClass::Unspecified => "cache",
    }
}

/// A row for each borrower, namespace, device and class.
fn leases(leases: &[v1::LeaseStatus]) -> Vec<LeaseRow> {
    let mut rows: BTreeMap<(&str, &str, &str, &str), LeaseRow> = BTreeMap::new();
    for lease in leases {
        let key = (
            lease.borrower_label.as_str(),
            lease.namespace.as_str(),
            lease.device_uuid.as_str(),
            class(lease.class()),
        );
        let row = rows.entry(key).or_default();
        row.borrower = match lease.estate_left_ms {
            Some(_) => "(gone)".to_owned(),
            None => format!("{} [{}]", lease.borrower_name, lease.borrower_label),
        };
        row.pid = lease.borrower_pid;
        row.namespace.clone_from(&lease.namespace);
        row.device.clone_from(&lease.device_uuid);
        row.link = link(lease.link());
        row.class = class(lease.class());
        row.slabs += 1;
        row.leased += lease.bytes;
        row.blocks += u64::from(lease.published_blocks);
        let zombie = lease.state() == v1::LeaseState::Zombie;
        row.zombies += u32::from(zombie);
        row.revoked += u32::from(zombie || lease.state() == v1::LeaseState::Draining);
        row.waiting_for_pids.extend(&lease.waiting_for_pids);
    }
    rows.into_values().collect()
}

fn namespace(status: v1::NamespaceStatus) -> NamespaceRow {
    NamespaceRow {
        namespace: status.namespace,
        tenant: status.tenant,
        blocks: status.blocks,
        leased: status.leased_bytes,
        estate: status.estate_bytes,
        lookups: status.lookups,
        lookup_blocks: status.lookup_blocks,
        hit_blocks: status.hit_blocks,
    }
}
