//! The state's views as they travel.

use swiftcache_proto::{
    convert::MAX_TENANT_BYTES,
    domain::{HandleKind, Link},
    v1::{self, quota_status},
};

use crate::{
    core::{
        Account, BlocksGone, Counters, DeviceView, DiskView, LeasePhase, LeaseView, NamespaceView,
        QuotaTarget, RegionView, SessionView, State, WithdrawPreview,
    },
    owner::Reports,
    probe::LeftOut,
};

/// The longest name of a tenant as it travels: a uid, a slash and a label.
pub(super) const MAX_WHOLE_TENANT_BYTES: usize = 10 + 1 + MAX_TENANT_BYTES;

/// What the state knows of the node.
pub(super) struct NodeView {
    devices: Vec<DeviceView>,
    links: Vec<Link>,
    total: Account,
    drained_bytes: u64,
    sessions: usize,
    indexed_blocks: u64,
    counters: Counters,
    disks: Vec<DiskView>,
}

impl NodeView {
    pub(super) fn read(state: &State) -> Self {
        Self {
            devices: state.devices(),
            links: state.links(),
            total: state.total(),
            drained_bytes: state.drained_bytes(),
            sessions: state.session_count(),
            indexed_blocks: state.indexed_blocks(),
            counters: state.counters(),
            disks: state.disks(),
        }
    }

    /// As it travels; the caller adds what the broker knows of itself.
    pub(super) fn answer(self, reports: &Reports) -> v1::GetNodeResponse {
        let counters = self.counters;
        let devices = self.devices.iter().map(|view| v1::DeviceStatus {
            device: Some((&view.device).into()),
            account: Some(account(view.account, view.drained_bytes)),
            drained: view.drained,
            drained_regions: view.drained_regions,
            hold: view.hold.map(|hold| v1::HoldStatus {
                free_bytes: hold.free_bytes,
                left_ms: hold.left_ms,
            }),
            unmappable_regions: view.unmappable_regions,
            // The caller asks the probe for the rest.
            ..Default::default()
        });
        v1::GetNodeResponse {
            devices: devices.collect(),
            links: self.links.iter().map(v1::Link::from).collect(),
            total: Some(account(self.total, self.drained_bytes)),
            sessions: u32::try_from(self.sessions).unwrap_or(u32::MAX),
            indexed_blocks: self.indexed_blocks,
            counters: Some(v1::Counters {
                leases_granted: counters.leases_granted,
                leases_refused: counters.leases_refused,
                revocations: counters.revocations,
                acknowledgements: counters.acknowledgements,
                zombies: counters.zombies,
                lookups: counters.lookups,
                lookup_blocks: counters.lookup_blocks,
                hit_blocks: counters.hit_blocks,
                published_blocks: counters.published_blocks,
                estate_leases: counters.estate_leases,
                inherited_leases: counters.inherited_leases,
            }),
            traffic: Some(reports.total().into()),
            routes_down: reports.routes_down(),
            disks: self.disks.into_iter().map(disk).collect(),
            ..Default::default()
        }
    }
}

fn disk(view: DiskView) -> v1::DiskStatus {
    let state = view.state;
    v1::DiskStatus {
        device_uuid: view.name,
        tenant: view.tenant.to_string(),
        session: view.session.label(),
        state: Some(v1::DiskState {
            bytes: state.bytes,
            used_bytes: state.used_bytes,
            memory_bytes: state.memory_bytes,
            bytes_per_second: state.bytes_per_second,
            problem: state.problem,
            written_blocks: state.written_blocks,
            read_blocks: state.read_blocks,
            corrupt_blocks: state.corrupt_blocks,
            failed_blocks: state.failed_blocks,
            evicted_blocks: state.evicted_blocks,
            path: state.path,
        }),
        blocks: view.blocks,
        to_store_blocks: view.to_store,
        wanted_blocks: view.wanted,
        asked_blocks: view.asked,
    }
}

pub(super) fn left_out(gpu: &LeftOut) -> v1::LeftOutDevice {
    v1::LeftOutDevice {
        ordinal: gpu.ordinal,
        uuid: (gpu.uuid.as_ref()).map_or_else(String::new, |uuid| uuid.to_string()),
        reason: gpu.reason.clone(),
    }
}

/// `drained` of the free bytes are lent to nobody.
fn account(account: Account, drained: u64) -> v1::Account {
    v1::Account {
        offered_bytes: account.offered,
        free_bytes: account.free,
        leased_bytes: account.leased + account.working_set + account.estate,
        draining_bytes: account.draining,
        zombie_bytes: account.zombie,
        scrubbing_bytes: account.scrubbing,
        working_set_bytes: account.working_set,
        drained_bytes: drained,
        estate_bytes: account.estate,
    }
}

/// `started` is when the state's clock read 0, milliseconds since 1970.
pub(super) fn session(view: &SessionView, reports: &Reports, started: u64) -> v1::SessionStatus {
    v1::SessionStatus {
        label: view.id.label(),
        name: view.name.to_string(),
        tenant: view.tenant.to_string(),
        pid: view.process.pid,
        uid: view.process.uid,
        attached: view.attached,
        since_unix_ms: started + view.since_ms,
        donated_bytes: view.donated_bytes,
        leased_bytes: view.leased_bytes,
        unacknowledged: view.unacknowledged,
        traffic: (reports.of(view.id)).map(|reported| v1::Traffic::from(&reported.traffic)),
        routes_down: (reports.of(view.id)).map_or(0, |reported| reported.routes_down),
        working_set_bytes: view.working_set_bytes,
        homes: (reports.of(view.id)).and_then(|reported| reported.homes.map(v1::Homes::from)),
        drained: view.drained,
    }
}

pub(super) fn region(view: RegionView) -> v1::RegionStatus {
    v1::RegionStatus {
        region_id: view.id.to_string(),
        device_uuid: view.device.to_string(),
        donor_label: view.donor.label(),
        donor_name: view.donor_name.to_string(),
        bytes: view.bytes,
        slab_bytes: view.slab_bytes,
        handle_kind: kind(view.handle_kind).into(),
        account: Some(account(view.account, view.drained_bytes)),
        withdrawing: view.withdrawing,
        drained: view.drained,
        unmappable_sessions: view.unmappable_sessions,
    }
}

/// Unspecified after a restart, until the donor offers the region again.
fn kind(kind: Option<HandleKind>) -> v1::HandleKind {
    kind.map_or(v1::HandleKind::Unspecified, v1::HandleKind::from)
}

/// `started` as for [`session`].
pub(super) fn lease(view: LeaseView, started: u64) -> v1::LeaseStatus {
    v1::LeaseStatus {
        lease_id: view.id.0,
        generation: view.generation.0,
        state: match view.phase {
            LeasePhase::Active => v1::LeaseState::Active,
            LeasePhase::Draining => v1::LeaseState::Draining,
            LeasePhase::Zombie => v1::LeaseState::Zombie,
        }
        .into(),
        region_id: view.region.to_string(),
        slab: view.slab,
        bytes: view.bytes,
        device_uuid: view.device.to_string(),
        borrower_device_uuid: view.borrower_device.to_string(),
        link: v1::LinkKind::from(view.link).into(),
        donor_label: view.donor.label(),
        donor_name: view.donor_name.to_string(),
        borrower_label: view.borrower.label(),
        borrower_name: view.borrower_name.to_string(),
        borrower_pid: view.borrower_pid,
        namespace: view.namespace.to_string(),
        since_unix_ms: started + view.since_ms,
        slots: view.slots,
        published_blocks: view.published_blocks,
        readers: view.readers,
        revoke_reason: view
            .revoke_reason
            .map_or(v1::RevokeReason::Unspecified, v1::RevokeReason::from)
            .into(),
        waiting_for_pids: view.waiting_for_pids,
        class: v1::LeaseClass::from(view.class).into(),
        estate_left_ms: view.estate_left_ms,
    }
}

pub(super) fn namespace(view: NamespaceView) -> v1::NamespaceStatus {
    v1::NamespaceStatus {
        namespace: view.name.to_string(),
        tenant: view.tenant.to_string(),
        blocks: view.blocks,
        leased_bytes: view.leased_bytes,
        lookups: view.lookups,
        lookup_blocks: view.lookup_blocks,
        hit_blocks: view.hit_blocks,
        quota_bytes: view.quota_bytes,
        estate_bytes: view.estate_bytes,
    }
}

pub(super) fn quota((target, bytes): (QuotaTarget, u64)) -> v1::QuotaStatus {
    v1::QuotaStatus {
        target: Some(match target {
            QuotaTarget::Namespace(name) => quota_status::Target::Namespace(name),
            QuotaTarget::Tenant(tenant) => quota_status::Target::Tenant(tenant),
        }),
        bytes,
    }
}

/// `started` as for [`session`].
pub(super) fn preview(
    preview: WithdrawPreview,
    gone: BlocksGone,
    started: u64,
) -> v1::PreviewWithdrawResponse {
    let bytes = |of: &dyn Fn(&RegionView) -> bool| {
        let regions = preview.regions.iter().filter(|region| of(region));
        regions.map(|region| region.bytes).sum()
    };
    let idle = |region: &RegionView| {
        let held = region.account;
        held.leased + held.working_set + held.estate + held.draining + held.zombie == 0
    };
    v1::PreviewWithdrawResponse {
        bytes: bytes(&|_| true),
        idle_bytes: bytes(&idle),
        revoked_bytes: preview.leases.iter().map(|lease| lease.bytes).sum(),
        lost_blocks: gone.lost,
        on_disk_blocks: gone.on_disk,
        disk_bytes: preview.disk_bytes,
        host_left_bytes: preview.host_left_bytes,
        working_set_bytes: (preview.leases.iter())
            .filter(|lease| !lease.class.is_cache())
            .map(|lease| lease.bytes)
            .sum(),
        estate_bytes: (preview.leases.iter())
            .filter(|lease| lease.estate_left_ms.is_some())
            .map(|lease| lease.bytes)
            .sum(),
        regions: preview.regions.into_iter().map(region).collect(),
        leases: preview
            .leases
            .into_iter()
            .map(|view| lease(view, started))
            .collect(),
    }
}
