//! What operators may see. No view holds a handle.

use swiftcache_proto::domain::{
    Device, DeviceUuid, Generation, HandleKind, LeaseId, Link, LinkKind, RegionId, RevokeReason,
    SessionId,
};

use super::{
    Account, Caller, Process, Refusal,
    leases::{Lease, Phase},
    regions::Region,
    sessions::Session,
    state::State,
};

/// Totals since the broker started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Leases granted.
    pub leases_granted: u64,
    /// Demands that were granted nothing.
    pub leases_refused: u64,
    /// Revocations begun.
    pub revocations: u64,
    /// Acknowledgements of revocations, by lessees and readers.
    pub acknowledgements: u64,
    /// Leases that became zombies.
    pub zombies: u64,
    /// Lookups answered.
    pub lookups: u64,
    /// Blocks they asked for.
    pub lookup_blocks: u64,
    /// Blocks they found.
    pub hit_blocks: u64,
    /// Blocks published.
    pub published_blocks: u64,
}

/// A device and the bytes offered on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceView<'a> {
    /// The device.
    pub device: &'a Device,
    /// Its offered bytes.
    pub account: Account,
    /// An operator drains it.
    pub drained: bool,
    /// An engine starts on it.
    pub hold: Option<HoldView>,
}

/// A hold that lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldView {
    /// What elastic donors are to leave free, bytes.
    pub free_bytes: u64,
    /// Time left, milliseconds, when the state last heard the time.
    pub left_ms: u32,
}

/// A session that is not over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionView<'a> {
    /// Its id: a secret; people see its label.
    pub id: SessionId,
    /// For people.
    pub name: &'a str,
    /// The whole tenant.
    pub tenant: &'a str,
    /// Its process.
    pub process: Process,
    /// Its stream is up.
    pub attached: bool,
    /// An operator drains its regions.
    pub drained: bool,
    /// When it was opened (or restored), milliseconds of [`Now`](super::Now).
    pub since_ms: u64,
    /// Bytes of its regions.
    pub donated_bytes: u64,
    /// Bytes of the leases it holds.
    pub leased_bytes: u64,
    /// Revoked leases and shares it has yet to let go of.
    pub unacknowledged: u32,
}

/// A region on offer or on its way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionView<'a> {
    /// Its id.
    pub id: RegionId,
    /// The device that holds it.
    pub device: &'a DeviceUuid,
    /// The session that offered it, over or not.
    pub donor: SessionId,
    /// The donor's name.
    pub donor_name: &'a str,
    /// Its size, bytes.
    pub bytes: u64,
    /// Its lease unit, bytes.
    pub slab_bytes: u64,
    /// `None` after a broker restart, until its donor offers it again.
    pub handle_kind: Option<HandleKind>,
    /// Its bytes.
    pub account: Account,
    /// It is on its way back to its donor.
    pub withdrawing: bool,
    /// An operator took it out of service.
    pub drained: bool,
}

/// Where a lease is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeasePhase {
    /// In use.
    Active,
    /// Revoked, within the drain window.
    Draining,
    /// Revoked, past the drain window, and still held.
    Zombie,
}

/// A lease that somebody holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseView<'a> {
    /// Its id.
    pub id: LeaseId,
    /// Which leasing of the slab.
    pub generation: Generation,
    /// Where it is in its life.
    pub phase: LeasePhase,
    /// The region.
    pub region: RegionId,
    /// The slab in it.
    pub slab: u32,
    /// Its size, bytes.
    pub bytes: u64,
    /// The device that holds it.
    pub device: &'a DeviceUuid,
    /// The device the borrower computes on.
    pub borrower_device: &'a DeviceUuid,
    /// How that device reaches it.
    pub link: LinkKind,
    /// The donor.
    pub donor: SessionId,
    /// The donor's name.
    pub donor_name: &'a str,
    /// The lessee, over or not.
    pub borrower: SessionId,
    /// The lessee's name; empty once its session is over.
    pub borrower_name: &'a str,
    /// The lessee's pid; 0 once its session is over.
    pub borrower_pid: u32,
    /// The tenant of the namespace.
    pub tenant: &'a str,
    /// The model fingerprint.
    pub namespace: &'a str,
    /// When it was granted (or restored), milliseconds of [`Now`](super::Now).
    pub since_ms: u64,
    /// Block slots in the slab.
    pub slots: u32,
    /// Slots that hold a published block.
    pub published_blocks: u32,
    /// Sessions that have it open for reading.
    pub readers: u32,
    /// Why it is being revoked.
    pub revoke_reason: Option<RevokeReason>,
    /// Once it is revoked: the pids that have yet to let go.
    pub waiting_for_pids: Vec<u32>,
}

/// A namespace with leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceView<'a> {
    /// The model fingerprint.
    pub name: &'a str,
    /// Its tenant.
    pub tenant: &'a str,
    /// Published blocks.
    pub blocks: u64,
    /// Bytes of its leases.
    pub leased_bytes: u64,
    /// Lookups since it became known.
    pub lookups: u64,
    /// Blocks they asked for.
    pub lookup_blocks: u64,
    /// Blocks they found.
    pub hit_blocks: u64,
    /// The most it may hold, bytes.
    pub quota_bytes: Option<u64>,
}

impl State {
    /// The node's devices, in the probe's order.
    pub fn devices(&self) -> impl Iterator<Item = DeviceView<'_>> {
        self.devices.list.iter().map(|state| DeviceView {
            device: &state.device,
            account: state.account,
            drained: state.drained,
            hold: (state.hold)
                .map(|hold| HoldView {
                    free_bytes: hold.free_bytes,
                    left_ms: hold.left_ms(self.now),
                })
                .filter(|hold| hold.left_ms > 0),
        })
    }

    /// The links between different devices.
    pub fn links(&self) -> impl Iterator<Item = Link> {
        let count = self.devices.list.len();
        let pairs = (0..count).flat_map(move |from| (0..count).map(move |to| (from, to)));
        pairs
            .filter(|(from, to)| from != to)
            .filter_map(|(from, to)| {
                let path = self.devices.link(from, to)?;
                Some(Link {
                    from: self.devices.uuid(from).clone(),
                    to: self.devices.uuid(to).clone(),
                    kind: path.kind,
                    bytes_per_second: path.bytes_per_second,
                })
            })
    }

    /// The sum over all devices.
    pub fn total(&self) -> Account {
        let mut total = Account::default();
        for device in &self.devices.list {
            total += device.account;
        }
        total
    }

    /// Totals since the broker started.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Blocks that a lookup can find.
    pub fn indexed_blocks(&self) -> u64 {
        self.index.blocks()
    }

    /// The processes whose death must be watched for.
    pub fn processes(&self) -> impl Iterator<Item = Process> {
        self.processes.keys().copied()
    }

    /// Sessions by id.
    pub fn sessions(&self) -> impl Iterator<Item = SessionView<'_>> {
        let live = self.sessions.iter().filter(|(_, session)| !session.over);
        live.map(|(id, session)| self.session_view(*id, session))
    }

    /// One session, if it is known and not over.
    pub fn session(&self, id: SessionId) -> Option<SessionView<'_>> {
        let session = self.sessions.get(&id).filter(|session| !session.over)?;
        Some(self.session_view(id, session))
    }

    fn session_view<'a>(&'a self, id: SessionId, session: &'a Session) -> SessionView<'a> {
        let revoked = |lease: &&LeaseId| self.leases[self.lease_ids[*lease]].revocation().is_some();
        let unacknowledged = session.leases.iter().chain(&session.reads).filter(revoked);
        SessionView {
            id,
            name: &session.name,
            tenant: &session.tenant,
            process: session.process,
            attached: session.attached,
            drained: self.drained_donors.contains(&id.label()),
            since_ms: session.since,
            donated_bytes: session.donated_bytes,
            leased_bytes: session.held_bytes,
            unacknowledged: unacknowledged.count() as u32,
        }
    }

    /// Regions by id.
    pub fn regions(&self) -> impl Iterator<Item = RegionView<'_>> {
        let keys = self.region_ids.values();
        keys.map(|key| self.region_view(&self.regions[*key]))
    }

    pub(super) fn region_view<'a>(&'a self, region: &'a Region) -> RegionView<'a> {
        RegionView {
            id: region.id,
            device: self.devices.uuid(region.device),
            donor: region.donor,
            donor_name: self.name_of(region.donor),
            bytes: region.bytes,
            slab_bytes: region.slab_bytes,
            handle_kind: region.handle.as_ref().map(|handle| handle.kind()),
            account: region.account,
            withdrawing: region.withdrawing,
            drained: region.drained,
        }
    }

    /// Leases by id.
    pub fn leases(&self) -> impl Iterator<Item = LeaseView<'_>> {
        self.lease_ids
            .values()
            .map(|key| self.lease_view(&self.leases[*key]))
    }

    pub(super) fn lease_view<'a>(&'a self, lease: &'a Lease) -> LeaseView<'a> {
        let region = &self.regions[lease.region];
        let namespace = self.index.namespace(lease.namespace);
        let lessee = self.sessions.get(&lease.lessee);
        let path = self.devices.path(lease.device, region.device);
        let waiting = lease
            .revocation()
            .map(|_| self.pids_of(self.lease_ids[&lease.id]));
        LeaseView {
            id: lease.id,
            generation: Generation(lease.generation),
            phase: match lease.phase {
                Phase::Active => LeasePhase::Active,
                Phase::Draining(_) => LeasePhase::Draining,
                Phase::Zombie(_) => LeasePhase::Zombie,
            },
            region: region.id,
            slab: lease.slab,
            bytes: lease.bytes,
            device: self.devices.uuid(region.device),
            borrower_device: self.devices.uuid(lease.device),
            link: path.map_or(LinkKind::Host, |path| path.kind),
            donor: region.donor,
            donor_name: self.name_of(region.donor),
            borrower: lease.lessee,
            borrower_name: self.name_of(lease.lessee),
            borrower_pid: lessee.map_or(0, |lessee| lessee.process.pid),
            tenant: &namespace.tenant,
            namespace: &namespace.name,
            since_ms: lease.since,
            slots: lease.blocks.slots(),
            published_blocks: lease.blocks.published(),
            readers: lease.readers.len() as u32,
            revoke_reason: lease.revocation().map(|revocation| revocation.reason),
            waiting_for_pids: waiting.unwrap_or_default(),
        }
    }

    /// Namespaces by tenant and name.
    pub fn namespaces(&self) -> impl Iterator<Item = NamespaceView<'_>> {
        self.index.iter().map(|(_, namespace)| NamespaceView {
            name: &namespace.name,
            tenant: &namespace.tenant,
            blocks: namespace.table.len() as u64,
            leased_bytes: namespace.leased_bytes,
            lookups: namespace.lookups,
            lookup_blocks: namespace.lookup_blocks,
            hit_blocks: namespace.hit_blocks,
            quota_bytes: self.namespace_quota(&namespace.name),
        })
    }

    /// Whether the caller speaks for its session.
    ///
    /// # Errors
    /// When there is no such session, or it is another process's.
    pub fn check_caller(&self, caller: Caller) -> Result<(), Refusal> {
        self.session_of(caller).map(drop)
    }

    fn name_of(&self, session: SessionId) -> &str {
        self.sessions
            .get(&session)
            .map_or("", |session| &session.name)
    }
}
