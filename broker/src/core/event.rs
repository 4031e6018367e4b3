//! What happens to the broker: every input of [`State::apply`](super::State::apply).

use serde::{Deserialize, Serialize};
use swiftcache_proto::domain::{
    AllocationId, BlockHash, BorrowerId, DeviceUuid, Generation, Handle, LeaseClass, LeaseId,
    PinId, RegionId, SessionId,
};

use super::process::Process;

/// Milliseconds on a clock that never goes back; the shell's, since the core has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Now(pub u64);

/// Who speaks: the session a message names, and the process the kernel says is at the other end. The core
/// refuses a message whose process is not the session's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The session the message names.
    pub session: SessionId,
    /// The process that sent it.
    pub process: Process,
    /// The connection that it came by.
    pub connection: Connection,
}

/// A connection's number. Connections are numbered as they are accepted, from 1, so that what comes by an older one can be
/// told from what its process says now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection(pub u64);

/// Everything that can happen.
#[derive(Clone, Debug)]
pub enum Event {
    /// A process opens or resumes a session. Answered by `Reply::Registered`.
    Register(Register),
    /// The session's stream is up: what is outstanding is sent (again). Answered by `Reply::Done`.
    Attach(Caller),
    /// The session's stream went down. Proves nothing about the process.
    Detach(SessionId),
    /// The process leaves in good order. Answered by `Reply::Done`.
    Leave(Caller),
    /// The kernel reports the process dead: it can touch nothing any more.
    ProcessGone(Process),
    /// Answered by `Reply::Done`.
    Offer(Offer),
    /// Answered by `Reply::Withdrawing`.
    Withdraw(Withdraw),
    /// Answered by `Reply::Leased`.
    Lease(LeaseDemand),
    /// The lessee gives leases back, unmapped. Answered by `Reply::Done`.
    Release {
        /// Who speaks.
        caller: Caller,
        /// What it gives back.
        leases: Vec<LeaseId>,
        /// It cannot map their memory.
        unmappable: bool,
        /// What is published there may be kept for an heir.
        bequeath: bool,
    },
    /// A session takes over what borrowers that are gone have left. Answered by `Reply::Inherited`.
    Inherit(InheritDemand),
    /// Answered by `Reply::Shared`.
    Share {
        /// Who speaks.
        caller: Caller,
        /// The lease to open for reading.
        lease: LeaseId,
        /// The device the reader computes on.
        device: DeviceUuid,
    },
    /// Answered by `Reply::Published`.
    Publish(Publish),
    /// Answered by `Reply::Unpublished`.
    Unpublish {
        /// Who speaks.
        caller: Caller,
        /// The lease whose slots are to be reused.
        lease: LeaseId,
        /// Which leasing of the slab.
        generation: Generation,
        /// The slots.
        slots: Vec<u32>,
    },
    /// Answered by `Reply::Found`.
    Lookup(Lookup),
    /// A borrower says what it is and what it keeps. Answered by `Reply::Done`.
    Keep(Keep),
    /// A disk says what it is and what lies on it. Answered by `Reply::Done`.
    DiskSays(DiskSays),
    /// A disk takes what it has to do. Answered by `Reply::DiskWork`.
    DiskTakes(DiskTakes),
    /// A session has let go of a revoked lease (its own, or one it reads). Stale ones are ignored.
    Acknowledge {
        /// Who speaks.
        caller: Caller,
        /// The lease.
        lease: LeaseId,
        /// Which leasing of the slab.
        generation: Generation,
    },
    /// The donor has zeroed a slab. Stale ones are ignored.
    Scrubbed {
        /// Who speaks.
        caller: Caller,
        /// The region.
        region: RegionId,
        /// The slab in it.
        slab: u32,
        /// From the scrub.
        generation: Generation,
    },
    /// Reads are over. Unknown pins are ignored.
    Unpin {
        /// Who speaks.
        caller: Caller,
        /// The pins.
        pins: Vec<PinId>,
    },
    /// An operator takes something out of service. Answered by `Reply::Drained`.
    Drain {
        /// What.
        target: DrainTarget,
        /// The drain window, milliseconds.
        drain_ms: u32,
    },
    /// An operator ends a drain of a device or donor. Answered by `Reply::Done`.
    Undrain(DrainTarget),
    /// An operator drops blocks from the index. Answered by `Reply::Evicted`.
    Evict(EvictTarget),
    /// An operator drops what borrowers that are gone have left. Answered by `Reply::Forgotten`.
    Forget(Forget),
    /// An operator bounds what somebody may hold. Answered by `Reply::QuotaSet`.
    SetQuota(SetQuota),
    /// A device is held for an engine that starts there. Answered by `Reply::Done`.
    Hold(HoldDemand),
    /// Time passes: drain windows close, pins and holds end.
    Tick,
}

/// See `RegisterRequest`.
#[derive(Clone, Debug)]
pub struct Register {
    /// The process at the other end.
    pub process: Process,
    /// The connection that it came by.
    pub connection: Connection,
    /// A fresh random id, used when a new session is opened.
    pub fresh_id: SessionId,
    /// For people.
    pub name: String,
    /// The whole tenant: the peer's uid, or `<uid>/<label>`.
    pub tenant: String,
    /// The session to resume.
    pub resume: Option<SessionId>,
    /// When resuming: leases still mapped.
    pub held: Vec<LeaseId>,
    /// When resuming: foreign leases still mapped for reading.
    pub shared: Vec<LeaseId>,
}

/// See `OfferRequest`.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Who speaks.
    pub caller: Caller,
    /// The region's id.
    pub region: RegionId,
    /// The device that holds it.
    pub device: DeviceUuid,
    /// The allocation behind the handle.
    pub allocation: AllocationId,
    /// Where the region starts in it, bytes.
    pub offset: u64,
    /// Its size, bytes.
    pub bytes: u64,
    /// Its lease unit, bytes.
    pub slab_bytes: u64,
    /// How to map it.
    pub handle: Handle,
    /// Slabs of the allocation may be lent to several tenants at the same time.
    pub shared: bool,
    /// Its donor follows the device's idle HBM.
    pub elastic: bool,
}

/// See `WithdrawRequest`.
#[derive(Clone, Debug)]
pub struct Withdraw {
    /// Who speaks.
    pub caller: Caller,
    /// What it wants back.
    pub what: WithdrawWhat,
    /// The drain window, milliseconds.
    pub drain_ms: u32,
}

/// What a donor wants back.
#[derive(Clone, Debug)]
pub enum WithdrawWhat {
    /// These regions.
    Regions(Vec<RegionId>),
    /// At least this many bytes of its regions on a device, the cheapest to give up first: free ones, then
    /// those with the least worth keeping.
    Bytes {
        /// The device.
        device: DeviceUuid,
        /// How much.
        bytes: u64,
    },
}

/// See `LeaseRequest`.
#[derive(Clone, Debug)]
pub struct LeaseDemand {
    /// Who speaks.
    pub caller: Caller,
    /// The model fingerprint.
    pub namespace: String,
    /// The device the borrower computes on.
    pub device: DeviceUuid,
    /// How much, bytes.
    pub bytes: u64,
    /// Bytes of one block over all layers.
    pub block_bytes: u64,
    /// What for.
    pub class: LeaseClass,
    /// How much host memory, where HBM falls short, bytes.
    pub host_bytes: u64,
}

/// See `InheritRequest`.
#[derive(Clone, Debug)]
pub struct InheritDemand {
    /// Who speaks.
    pub caller: Caller,
    /// The model fingerprint.
    pub namespace: String,
    /// The device that the heir computes on.
    pub device: DeviceUuid,
    /// The most HBM that it takes, bytes.
    pub bytes: u64,
    /// The most host memory that it takes, bytes.
    pub host_bytes: u64,
    /// Bytes of one block over all layers.
    pub block_bytes: u64,
}

/// See `PublishRequest`.
#[derive(Clone, Debug)]
pub struct Publish {
    /// Who speaks.
    pub caller: Caller,
    /// The lease whose slab holds the blocks.
    pub lease: LeaseId,
    /// Which leasing of the slab.
    pub generation: Generation,
    /// The blocks, each with the slot it lies in.
    pub blocks: Vec<(BlockHash, u32)>,
}

/// See `LookupRequest`.
#[derive(Clone, Debug)]
pub struct Lookup {
    /// Who speaks.
    pub caller: Caller,
    /// The model fingerprint.
    pub namespace: String,
    /// The hashes in prefix order.
    pub hashes: Vec<BlockHash>,
    /// The device that the asker computes on, if it says.
    pub device: Option<DeviceUuid>,
    /// Whom it asks for, if it says.
    pub borrower: Option<BorrowerId>,
    /// Nothing is to be pinned.
    pub unpinned: bool,
    /// The asker can map host memory of donors.
    pub host_memory: bool,
}

/// See `KeepRequest`.
#[derive(Clone, Debug)]
pub struct Keep {
    /// Who speaks.
    pub caller: Caller,
    /// The borrower.
    pub borrower: BorrowerId,
    /// The model fingerprint.
    pub namespace: String,
    /// The device that it computes on.
    pub device: DeviceUuid,
    /// Bytes of one block over all layers.
    pub block_bytes: u64,
    /// It reads leases of other sessions.
    pub shares: bool,
    /// What it kept before is forgotten.
    pub anew: bool,
    /// Blocks that it keeps in its own host memory now.
    pub kept: Vec<BlockHash>,
    /// Blocks that it does not keep there any more.
    pub dropped: Vec<BlockHash>,
    /// It is closed.
    pub closed: bool,
    /// Devices whose memory it cannot copy from now.
    pub down: Vec<DeviceUuid>,
    /// The same of its own host memory.
    pub host_down: bool,
    /// It can map host memory of donors.
    pub host_memory: bool,
    /// Bytes of one block in each layer; empty when it does not say.
    pub layer_bytes: Vec<u64>,
}

/// See `DiskRequest`.
#[derive(Clone, Debug)]
pub struct DiskSays {
    /// Who speaks.
    pub caller: Caller,
    /// The disk's name.
    pub name: String,
    /// What was said before is forgotten.
    pub anew: bool,
    /// What is new about the disk itself.
    pub state: Option<DiskState>,
    /// The model fingerprint, if something is said of blocks.
    pub namespace: Option<String>,
    /// Bytes of one of its blocks over all layers.
    pub block_bytes: u64,
    /// Blocks that lie on the disk now.
    pub stored: Vec<BlockHash>,
    /// Blocks that do not any more.
    pub dropped: Vec<BlockHash>,
}

/// What of its work a disk takes, in blocks.
#[derive(Clone, Debug)]
pub struct DiskTakes {
    /// Who speaks.
    pub caller: Caller,
    /// The most blocks to write.
    pub to_store: usize,
    /// The most blocks to bring back. Those that it took before are dealt with.
    pub wanted: usize,
}

/// A disk as its agent sees it. See the message of this name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the protocol's words")]
pub struct DiskState {
    pub bytes: u64,
    pub used_bytes: u64,
    pub memory_bytes: u64,
    pub bytes_per_second: u64,
    pub problem: String,
    pub written_blocks: u64,
    pub read_blocks: u64,
    pub corrupt_blocks: u64,
    pub failed_blocks: u64,
    pub evicted_blocks: u64,
    pub path: String,
}

/// What an operator drains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DrainTarget {
    /// Every region on a device, and what is offered there later.
    Device(DeviceUuid),
    /// Every region of the session with this label.
    Donor(String),
    /// One region.
    Region(RegionId),
}

/// See `SetQuotaRequest`.
#[derive(Clone, Debug)]
pub struct SetQuota {
    /// Whom.
    pub target: QuotaTarget,
    /// The most it may hold, bytes; `None`: what is configured.
    pub bytes: Option<u64>,
}

/// Names a hold. Drawn at random by whoever asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldId(pub u64);

/// See `HoldRequest`.
#[derive(Clone, Debug)]
pub struct HoldDemand {
    /// What to hold.
    pub device: DeviceUuid,
    /// What elastic donors are to leave free, bytes.
    pub free_bytes: u64,
    /// For how long, milliseconds; 0 ends it.
    pub for_ms: u32,
    /// Which hold; `None`, to end it, for any.
    pub hold: Option<HoldId>,
}

/// Whom an operator's quota bounds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuotaTarget {
    /// Each tenant's namespace of this name.
    Namespace(String),
    /// All namespaces of a tenant together.
    Tenant(String),
}

/// Which estates an operator drops. What is not named is any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forget {
    /// Of this tenant.
    pub tenant: Option<String>,
    /// Of namespaces of this name.
    pub namespace: Option<String>,
}

/// What an operator evicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvictTarget {
    /// Every tenant's namespace of this name.
    Namespace(String),
    /// One lease, revoked altogether.
    Lease(LeaseId),
}
