//! What the broker does about it: every output of [`State::apply`](super::State::apply), in order.

use std::sync::Arc;

use swiftcache_proto::domain::{
    AllocationId, BlockHash, DeviceUuid, FoundRun, Generation, Handle, LeaseId, LinkKind, PinId,
    RegionId, RevokeReason, SessionId, Shortfall,
};

use super::{event::QuotaTarget, process::Process, record::Record};

/// One thing for the shell to do. The shell carries effects out in order; a [`Effect::Record`] is on disk
/// before the reply of the same event leaves.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Answer the caller. At most one per event; exactly one for events documented as answered.
    Reply(Reply),
    /// Send on the session's stream.
    Send(SessionId, Outgoing),
    /// Append to the ledger.
    Record(Record),
    /// Start watching the process for its death. Asked once per process.
    Watch(Process),
    /// The last session of the process is over: stop watching.
    Unwatch(Process),
    /// Nothing of this allocation is on offer any more: close the descriptor kept for it.
    DropHandle(AllocationId),
    /// Tell people: the event log, the metrics.
    Note(Note),
}

/// The answer to the event's caller.
#[derive(Clone, Debug)]
pub enum Reply {
    /// To `Register`.
    Registered {
        /// The session, new or resumed.
        session: SessionId,
        /// Leases claimed that the session does not hold: it must unmap them.
        refused: Vec<LeaseId>,
        /// Regions of the session that the broker knows.
        regions: Vec<RegionId>,
    },
    /// To events with nothing to say.
    Done,
    /// To `Withdraw`.
    Withdrawing {
        /// On their way back.
        regions: Vec<RegionId>,
        /// Their bytes.
        bytes: u64,
    },
    /// To `Lease`.
    Leased {
        /// What was granted; may be empty.
        grants: Vec<Grant>,
        /// Why it is less than asked.
        shortfall: Shortfall,
    },
    /// To `Share`.
    Shared(Grant),
    /// To `Inherit`.
    Inherited {
        /// What was inherited; may be empty.
        leases: Vec<Inherited>,
        /// There is more, now or soon.
        more: bool,
    },
    /// To `Publish`: indexes of blocks that another lease already holds.
    Published {
        /// Not published.
        duplicates: Vec<u32>,
    },
    /// To `Unpublish`.
    Unpublished {
        /// Must not be written before `retry_ms` have passed.
        pinned: Vec<u32>,
        /// Until the last pin ends, milliseconds.
        retry_ms: u32,
    },
    /// To `Lookup`.
    Found {
        /// The longest prefix run.
        runs: Vec<FoundRun>,
        /// Its pin; `None` when nothing was found, or nothing was to be pinned.
        pin: Option<PinId>,
        /// Blocks right behind that are on their way from a disk.
        coming: u32,
        /// How long that may take, milliseconds; 0 when nobody knows.
        coming_ms: u32,
    },
    /// To `DiskTakes`.
    DiskWork {
        /// What to write.
        to_store: Vec<DiskBlocks>,
        /// What to bring back.
        wanted: Vec<DiskBlocks>,
    },
    /// To `Drain`.
    Drained {
        /// Leases revoked by it.
        leases: u32,
        /// Their bytes.
        bytes: u64,
    },
    /// To `Evict`.
    Evicted {
        /// Blocks dropped from the index.
        blocks: u64,
        /// Leases revoked.
        leases: u32,
    },
    /// To `Forget`.
    Forgotten {
        /// Leases dropped.
        leases: u32,
        /// Their bytes.
        bytes: u64,
        /// Their blocks.
        blocks: u64,
    },
    /// To `SetQuota`.
    QuotaSet {
        /// What the target holds now, bytes.
        leased_bytes: u64,
    },
    /// To anything the broker will not do.
    Refused(Refusal),
}

/// Blocks of one namespace that a disk has to do with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskBlocks {
    /// The model fingerprint.
    pub namespace: Arc<str>,
    /// Bytes of one block in each layer; empty when nobody has said.
    pub layer_bytes: Vec<u64>,
    /// The blocks.
    pub hashes: Vec<BlockHash>,
}

/// The right to one slab, as the shell turns it into a wire `Grant`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The lease.
    pub lease: LeaseId,
    /// Which leasing of the slab.
    pub generation: Generation,
    /// The region.
    pub region: RegionId,
    /// The slab in it.
    pub slab: u32,
    /// The slab's size, bytes.
    pub slab_bytes: u64,
    /// The allocation behind the handle.
    pub allocation: AllocationId,
    /// Where the slab starts in the allocation, bytes.
    pub offset: u64,
    /// The device that holds it.
    pub device: DeviceUuid,
    /// How to map it. For `PosixFd` the shell adds a grant token.
    pub handle: Handle,
    /// How the borrower's device reaches it.
    pub link: LinkKind,
    /// Block slots in the slab.
    pub slots: u32,
    /// Bytes of one block over all layers.
    pub block_bytes: u64,
    /// How much of the allocation to map from its base, bytes: to the region's end.
    pub map_bytes: u64,
}

/// A lease that an heir has got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// The right to its slab.
    pub grant: Grant,
    /// The published blocks, each with the slot it lies in.
    pub blocks: Vec<(BlockHash, u32)>,
    /// Until the other slots may be written, milliseconds: somebody may still read what lay there.
    pub retry_ms: u32,
}

/// What travels on a session's stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// Let go of a lease.
    Revoke {
        /// The lease.
        lease: LeaseId,
        /// Which leasing of the slab.
        generation: Generation,
        /// Why.
        reason: RevokeReason,
        /// Time left, milliseconds.
        drain_ms: u32,
    },
    /// A region is the donor's own again.
    Returned(RegionId),
    /// Zero a slab.
    Scrub {
        /// The region.
        region: RegionId,
        /// The slab in it.
        slab: u32,
        /// How many times it has been leased: tells this scrub from earlier ones.
        generation: Generation,
    },
    /// A session cannot map a region.
    CannotMap {
        /// The region.
        region: RegionId,
        /// How many sessions cannot map it.
        sessions: u32,
    },
    /// A device is held for an engine that starts there, or no longer.
    Hold {
        /// The device.
        device: DeviceUuid,
        /// What elastic donors are to leave free, bytes.
        free_bytes: u64,
        /// Time left, milliseconds; 0 when it is over.
        left_ms: u32,
    },
}

/// Why the broker will not do it. Mapped to gRPC codes in one place, `crate::error`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// NOT_FOUND.
    #[error("no such {what}: {which}")]
    Unknown {
        /// Session, lease, region, device, donor.
        what: &'static str,
        /// As the caller named it.
        which: String,
    },
    /// PERMISSION_DENIED.
    #[error("{what} {which} belongs to another process")]
    NotYours {
        /// Session, lease, region.
        what: &'static str,
        /// As the caller named it.
        which: String,
    },
    /// INVALID_ARGUMENT.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field as the .proto spells it.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// ALREADY_EXISTS.
    #[error("region {region} overlaps or repeats region {with}")]
    Overlap {
        /// The region offered.
        region: RegionId,
        /// The region in its way.
        with: RegionId,
    },
    /// ALREADY_EXISTS.
    #[error(
        "donor {donor} ({name}) follows the idle HBM of {device} already, and two would both give back for one neighbour: \
         stop one of them, or have one lend a fixed amount"
    )]
    Followed {
        /// The device.
        device: DeviceUuid,
        /// The label of the session that follows it.
        donor: String,
        /// And its name.
        name: String,
    },
    /// ALREADY_EXISTS.
    #[error("session {session} of this tenant has the disk {disk}: use another name for this one")]
    DiskTaken {
        /// The disk's name.
        disk: String,
        /// The label of the session that has it.
        session: String,
    },
    /// RESOURCE_EXHAUSTED.
    #[error("{what}: the limit is {limit}")]
    Limit {
        /// Sessions, regions, leases.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// ABORTED: it came by a connection that the session's process has left. Whatever it asks for is old.
    #[error(
        "session {0} was registered again on a newer connection; what comes by this one is too late and changes nothing. \
         Use the newer connection, or resume the session on a new one"
    )]
    LateConnection(String),
    /// FAILED_PRECONDITION: the lease is being revoked, the region withdrawn, or the generation is stale.
    #[error("{0}")]
    Stale(String),
}

/// Something people want to know, for the event log and the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the variants and fields are the protocol's words"
)]
pub enum Note {
    Registered {
        session: SessionId,
        name: String,
        resumed: bool,
    },
    Left {
        session: SessionId,
    },
    Gone {
        session: SessionId,
        name: String,
    },
    Offered {
        region: RegionId,
        device: DeviceUuid,
        bytes: u64,
    },
    Withdrawing {
        region: RegionId,
        bytes: u64,
    },
    Returned {
        region: RegionId,
        bytes: u64,
    },
    Leased {
        lease: LeaseId,
        region: RegionId,
        device: DeviceUuid,
        bytes: u64,
        link: LinkKind,
    },
    /// What a borrower that is gone has published is kept for its heir.
    LeftEstate {
        lease: LeaseId,
        tenant: String,
        namespace: String,
        bytes: u64,
        blocks: u32,
    },
    /// An heir has got a lease.
    Inherited {
        lease: LeaseId,
        heir: SessionId,
        name: String,
        bytes: u64,
        blocks: u32,
    },
    /// A demand was granted less than it asked, perhaps nothing.
    LeaseShort {
        session: SessionId,
        name: String,
        tenant: String,
        namespace: String,
        device: DeviceUuid,
        asked_bytes: u64,
        granted_bytes: u64,
        shortfall: Shortfall,
    },
    Revoked {
        lease: LeaseId,
        reason: RevokeReason,
        bytes: u64,
    },
    /// Every party has let go; `after_ms` since the revocation.
    LeaseEnded {
        lease: LeaseId,
        after_ms: Option<u64>,
    },
    Zombie {
        lease: LeaseId,
        bytes: u64,
        pids: Vec<u32>,
    },
    /// A session cannot map a region.
    CannotMap {
        region: RegionId,
        device: DeviceUuid,
        session: SessionId,
        name: String,
        /// The donor's name.
        donor: String,
    },
    Published {
        blocks: u32,
    },
    Unpublished {
        blocks: u32,
    },
    Looked {
        blocks: u32,
        hits: u32,
    },
    /// A disk has something to do.
    DiskWork,
    Drained {
        target: String,
    },
    Undrained {
        target: String,
    },
    Evicted {
        blocks: u64,
    },
    QuotaSet {
        target: QuotaTarget,
        bytes: Option<u64>,
    },
    Held {
        device: DeviceUuid,
        free_bytes: u64,
        for_ms: u32,
    },
    HoldEnded {
        device: DeviceUuid,
    },
    Refused {
        refusal: Refusal,
    },
}
