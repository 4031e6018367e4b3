//! What operators may see. No view holds a handle. Views are copies, cheap to make: what they become is not the broker's
//! turn to wait for.

use std::sync::Arc;

use swiftcache_proto::domain::{
    Device, DeviceUuid, Generation, HandleKind, LeaseClass, LeaseId, LinkKind, Medium, RegionId,
    RevokeReason, SessionId,
};

use super::{
    account::Account,
    arena::{LeaseKey, RegionKey},
    books::Books,
    disks::Disk,
    event::DiskState,
    index::Namespace,
    leases::{Lease, Phase},
    process::Process,
    region::Region,
    regions::Shelf,
    sessions::Session,
};

/// A device and the bytes offered on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceView {
    /// The device.
    pub device: Device,
    /// Its offered bytes.
    pub account: Account,
    /// An operator drains it.
    pub drained: bool,
    /// Of its free bytes: what a drain keeps from being lent, of the device, of donors or of regions.
    pub drained_bytes: u64,
    /// Regions on it that an operator drained by themselves.
    pub drained_regions: u32,
    /// An engine starts on it.
    pub hold: Option<HoldView>,
    /// Regions on it that some session cannot map.
    pub unmappable_regions: u32,
}

/// A hold that lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldView {
    /// What elastic donors are to leave free, bytes.
    pub free_bytes: u64,
    /// Time left, milliseconds, when the state last heard the time.
    pub left_ms: u32,
}

/// A disk of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskView {
    /// Whose it is.
    pub session: SessionId,
    /// The whole tenant.
    pub tenant: Arc<str>,
    /// Its name.
    pub name: String,
    /// As its agent sees it.
    pub state: DiskState,
    /// Blocks that lie on it.
    pub blocks: u64,
    /// Blocks that wait to be written.
    pub to_store: u64,
    /// Blocks that are on their way back.
    pub wanted: u64,
    /// Blocks that lookups wanted since it is there.
    pub asked: u64,
}

pub(super) fn disk(session: SessionId, disk: &Disk) -> DiskView {
    DiskView {
        session,
        tenant: Arc::clone(disk.tenant()),
        name: disk.name().to_owned(),
        state: disk.state().clone(),
        blocks: disk.blocks(),
        to_store: disk.to_store(),
        wanted: disk.wanted(),
        asked: disk.asked(),
    }
}

/// A session that is not over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionView {
    /// Its id: a secret; people see its label.
    pub id: SessionId,
    /// For people.
    pub name: Arc<str>,
    /// The whole tenant.
    pub tenant: Arc<str>,
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
    /// Of these: its working set.
    pub working_set_bytes: u64,
    /// Revoked leases and shares it has yet to let go of.
    pub unacknowledged: u32,
}

/// A region on offer or on its way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionView {
    /// Its id.
    pub id: RegionId,
    /// The device that holds it.
    pub device: DeviceUuid,
    /// The session that offered it, over or not.
    pub donor: SessionId,
    /// The donor's name.
    pub donor_name: Arc<str>,
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
    /// Of its free bytes: what a drain keeps from being lent, its own, its donor's or its device's.
    pub drained_bytes: u64,
    /// Sessions that cannot map it.
    pub unmappable_sessions: u32,
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
pub struct LeaseView {
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
    /// What it is for.
    pub class: LeaseClass,
    /// The device that holds it.
    pub device: DeviceUuid,
    /// The device the borrower computes on.
    pub borrower_device: DeviceUuid,
    /// How that device reaches it.
    pub link: LinkKind,
    /// The donor.
    pub donor: SessionId,
    /// The donor's name.
    pub donor_name: Arc<str>,
    /// The lessee, over or not.
    pub borrower: SessionId,
    /// The lessee's name; empty once its session is over.
    pub borrower_name: Arc<str>,
    /// The lessee's pid; 0 once its session is over.
    pub borrower_pid: u32,
    /// The tenant of the namespace.
    pub tenant: Arc<str>,
    /// The model fingerprint.
    pub namespace: Arc<str>,
    /// When it was granted (or restored), milliseconds of [`Now`](super::Now).
    pub since_ms: u64,
    /// Block slots in the slab.
    pub slots: u32,
    /// Slots that hold a published block.
    pub published_blocks: u32,
    /// Sessions that have it open for reading.
    pub readers: u32,
    /// Its lessee is gone, and it is kept for an heir so long, milliseconds.
    pub estate_left_ms: Option<u32>,
    /// Why it is being revoked.
    pub revoke_reason: Option<RevokeReason>,
    /// Once it is revoked: the pids that have yet to let go.
    pub waiting_for_pids: Vec<u32>,
}

/// A namespace with leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceView {
    /// The model fingerprint.
    pub name: Arc<str>,
    /// Its tenant.
    pub tenant: Arc<str>,
    /// Published blocks.
    pub blocks: u64,
    /// Bytes of its leases.
    pub leased_bytes: u64,
    /// Of these: leases that are kept for an heir.
    pub estate_bytes: u64,
    /// Lookups since it became known.
    pub lookups: u64,
    /// Blocks they asked for.
    pub lookup_blocks: u64,
    /// Blocks they found.
    pub hit_blocks: u64,
    /// The most it may hold, bytes.
    pub quota_bytes: Option<u64>,
}

/// What would be given back, the first to go first, and what would be revoked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WithdrawPreview {
    /// The regions.
    pub regions: Vec<RegionView>,
    /// The leases that are not being revoked yet.
    pub leases: Vec<LeaseView>,
    /// Of the leases' bytes: those of disks' agents.
    pub disk_bytes: u64,
    /// Host memory that would stay on offer, of all NUMA nodes, without what is drained, bytes.
    pub host_left_bytes: u64,
}

/// Blocks that nobody would find in memory without some leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlocksGone {
    /// Those that would be found nowhere.
    pub lost: u64,
    /// Those that would be found on a disk of their tenant only.
    pub on_disk: u64,
}

/// The devices that matter to people: host memory is one once some of it is on offer.
pub(super) fn devices(books: &Books) -> Vec<DeviceView> {
    let matters = |(number, shelf): &(usize, &Shelf)| {
        let hbm = books.devices.medium(*number) == Medium::Hbm;
        hbm || shelf.account().offered > 0 || shelf.is_drained()
    };
    let shelves = books.regions.shelves().iter().enumerate().filter(matters);
    let views = shelves.map(|(number, shelf)| DeviceView {
        device: books.devices.get(number).clone(),
        account: shelf.account(),
        drained: shelf.is_drained(),
        drained_bytes: shelf.drained_bytes(),
        drained_regions: shelf.drained_regions(),
        hold: (books.holds.lasting(number, books.now)).map(|hold| HoldView {
            free_bytes: hold.free_bytes,
            left_ms: hold.left_ms(books.now),
        }),
        unmappable_regions: books.unmappable.regions_on(number),
    });
    views.collect()
}

pub(super) fn session(books: &Books, id: SessionId, session: &Session) -> SessionView {
    let revoked = |lease: &&LeaseId| {
        let known = books.leases.find(**lease);
        known.is_some_and(|(_, lease)| !lease.is_active())
    };
    let held = session.leases().iter().chain(session.reads());
    let own = session.leases().iter();
    let own = own.filter_map(|lease| Some(books.leases.find(*lease)?.1.terms()));
    let working_set = own.filter(|terms| !terms.class.is_cache());
    SessionView {
        id,
        name: session.name().clone(),
        tenant: session.tenant().clone(),
        process: session.process(),
        attached: session.is_attached(),
        drained: books.regions.drained_donors().contains(&id.label()),
        since_ms: session.since(),
        donated_bytes: session.donated_bytes(),
        leased_bytes: session.held_bytes(),
        working_set_bytes: working_set.map(|terms| terms.bytes).sum(),
        unacknowledged: held.filter(revoked).count() as u32,
    }
}

pub(super) fn region(books: &Books, key: RegionKey, region: &Region) -> RegionView {
    RegionView {
        id: region.id(),
        device: books.devices.uuid(region.device()).clone(),
        donor: region.donor(),
        donor_name: name_of(books, region.donor()),
        bytes: region.bytes(),
        slab_bytes: region.slab_bytes(),
        handle_kind: region.handle().map(|handle| handle.kind()),
        account: region.account(),
        withdrawing: region.is_withdrawing(),
        drained: region.is_drained(),
        drained_bytes: match books.regions.is_drained(key) {
            true => region.account().free,
            false => 0,
        },
        unmappable_sessions: books.unmappable.sessions(key),
    }
}

pub(super) fn lease(books: &Books, key: LeaseKey, lease: &Lease) -> LeaseView {
    let terms = lease.terms();
    let region = books.regions.get(terms.region);
    let namespace = books.index.namespace(terms.namespace);
    let lessee = books.sessions.get(terms.lessee);
    let path = books.devices.path(terms.device, region.device());
    let waiting = lease.revocation().map(|_| books.pids_of(key));
    LeaseView {
        id: terms.id,
        generation: terms.generation,
        phase: match lease.phase() {
            Phase::Active => LeasePhase::Active,
            Phase::Draining(_) => LeasePhase::Draining,
            Phase::Zombie(_) => LeasePhase::Zombie,
        },
        region: region.id(),
        slab: terms.slab,
        bytes: terms.bytes,
        class: terms.class,
        device: books.devices.uuid(region.device()).clone(),
        borrower_device: books.devices.uuid(terms.device).clone(),
        link: path.map_or(LinkKind::Host, |path| path.kind),
        donor: region.donor(),
        donor_name: name_of(books, region.donor()),
        borrower: terms.lessee,
        borrower_name: name_of(books, terms.lessee),
        borrower_pid: lessee.map_or(0, |lessee| lessee.process().pid),
        tenant: namespace.tenant().clone(),
        namespace: namespace.name().clone(),
        since_ms: lease.since(),
        slots: books.index.slots(key),
        published_blocks: books.index.published(key),
        readers: lease.readers().len() as u32,
        estate_left_ms: (lease.estate())
            .map(|until| u32::try_from(until.saturating_sub(books.now)).unwrap_or(u32::MAX)),
        revoke_reason: lease.revocation().map(|revocation| revocation.reason),
        waiting_for_pids: waiting.unwrap_or_default(),
    }
}

pub(super) fn namespace(books: &Books, namespace: &Namespace) -> NamespaceView {
    let looked = namespace.looked();
    NamespaceView {
        name: namespace.name().clone(),
        tenant: namespace.tenant().clone(),
        blocks: namespace.blocks(),
        leased_bytes: namespace.leased_bytes(),
        estate_bytes: estate_bytes(books, namespace),
        lookups: looked.lookups,
        lookup_blocks: looked.blocks,
        hit_blocks: looked.hits,
        quota_bytes: books.quotas.of_namespace(namespace.name()),
    }
}

fn estate_bytes(books: &Books, namespace: &Namespace) -> u64 {
    let leases = namespace.leases().iter().map(|key| books.leases.get(*key));
    let kept = leases.filter(|lease| lease.estate().is_some());
    kept.map(|lease| lease.terms().bytes).sum()
}

fn name_of(books: &Books, session: SessionId) -> Arc<str> {
    let session = books.sessions.get(session);
    session.map_or_else(Arc::default, |session| session.name().clone())
}
