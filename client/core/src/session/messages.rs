//! What the calls of a session say and are told, in domain types.

use std::time::{Duration, Instant};

use swiftcache_proto::{
    domain::{
        AllocationId, BlockHash, BorrowerId, DeviceUuid, FoundRun, LeaseClass, PinId, RegionId,
        Shortfall,
    },
    v1,
};

use super::Grant;

/// What to lease.
#[derive(Clone, Debug)]
pub struct Demand {
    /// The model's fingerprint.
    pub namespace: String,
    /// The device the borrower computes on.
    pub device: DeviceUuid,
    /// How much, bytes; rounded up to slabs.
    pub bytes: u64,
    /// Bytes of one block over all layers.
    pub block_bytes: u64,
    /// What for. A broker that does not know classes grants what it may take by fairness.
    pub class: LeaseClass,
    /// How much host memory of donors to lease where less HBM is granted than asked for, bytes. With this, `bytes` may be 0.
    pub host_bytes: u64,
}

/// What was leased.
#[derive(Clone, Debug)]
pub struct Leased {
    /// May be fewer bytes than asked for, or none.
    pub grants: Vec<Grant>,
    /// Why.
    pub shortfall: Shortfall,
    /// The connection it came by.
    pub(crate) epoch: u64,
}

/// What borrowers that are gone have left.
#[derive(Clone, Debug)]
pub struct Inheritance {
    /// Each slab, and what lies in it; what was found last is first.
    pub leases: Vec<Inherited>,
    /// There is more, now or soon.
    pub more: bool,
    /// The connection it came by.
    pub(crate) epoch: u64,
}

/// The right to a slab that was left.
#[derive(Clone, Debug)]
pub struct Inherited {
    /// The slab.
    pub grant: Grant,
    /// What lies in it.
    pub left: Left,
}

/// What lies in a slab when it is granted.
#[derive(Clone, Debug, Default)]
pub struct Left {
    /// Blocks that can be found, each with its slot.
    pub blocks: Vec<(BlockHash, u32)>,
    /// Until when others may read what lay in the other slots.
    pub readers_until: Option<Instant>,
}

/// On whose behalf a lookup looks.
#[derive(Clone, Debug)]
pub struct Asker {
    /// The model's fingerprint.
    pub namespace: String,
    /// The device that it computes on: what that does not reach is not found. `None`: blocks are found wherever they are.
    pub device: Option<DeviceUuid>,
    /// The borrower, of whichever process of the tenant: what it can load is found, its own host memory included. Until
    /// the broker knows it, `device` counts; without one, nothing is found then.
    pub borrower: Option<BorrowerId>,
}

impl Asker {
    /// One that does not say what it computes on.
    pub fn new(namespace: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            device: None,
            borrower: None,
        }
    }
}

/// What a borrower is, and what is new about the blocks in its own host memory.
#[derive(Clone, Debug)]
pub struct Keep {
    /// Drawn at random by the borrower.
    pub borrower: BorrowerId,
    /// The model's fingerprint.
    pub namespace: String,
    /// The device that it computes on.
    pub device: DeviceUuid,
    /// Bytes of one block over all layers.
    pub block_bytes: u64,
    /// It reads leases of other sessions.
    pub shares: bool,
    /// What was said before is forgotten.
    pub anew: bool,
    /// Blocks that it keeps now: at most [`MAX_BLOCKS`](swiftcache_proto::convert::MAX_BLOCKS).
    pub kept: Vec<BlockHash>,
    /// Blocks that it does not keep any more: at most as many.
    pub dropped: Vec<BlockHash>,
    /// It is closed.
    pub closed: bool,
    /// Devices whose memory it cannot copy from now.
    pub down: Vec<DeviceUuid>,
    /// The same of its own host memory.
    pub host_down: bool,
    /// Bytes of one block in each layer.
    pub layer_bytes: Vec<u64>,
}

/// What a disk says, and how much it takes of what there is to do.
#[derive(Clone, Debug, Default)]
pub struct DiskCall {
    /// Its name.
    pub name: String,
    /// What was said before is forgotten.
    pub anew: bool,
    /// What is new about the disk itself.
    pub state: Option<v1::DiskState>,
    /// The model's fingerprint, where something is said of blocks.
    pub namespace: String,
    /// Bytes of one of its blocks over all layers.
    pub block_bytes: u64,
    /// Blocks that lie on the disk now: at most [`MAX_BLOCKS`](swiftcache_proto::convert::MAX_BLOCKS).
    pub stored: Vec<BlockHash>,
    /// Blocks that do not any more: at most as many.
    pub dropped: Vec<BlockHash>,
    /// The most blocks to write that it takes.
    pub take_to_store: u32,
    /// The most blocks to bring back that it takes.
    pub take_wanted: u32,
    /// How long the answer may wait for something to do.
    pub wait: Duration,
}

/// What a disk has to do.
#[derive(Clone, Debug, Default)]
pub struct DiskWork {
    /// Blocks to write.
    pub to_store: Vec<DiskBlocks>,
    /// Blocks to bring back.
    pub wanted: Vec<DiskBlocks>,
}

/// Blocks of one namespace that a disk has to do with.
#[derive(Clone, Debug)]
pub struct DiskBlocks {
    /// The model's fingerprint.
    pub namespace: String,
    /// Bytes of one block in each layer; empty when nobody has said.
    pub layer_bytes: Vec<u64>,
    /// The blocks.
    pub hashes: Vec<BlockHash>,
}

/// Blocks that are on their way from a disk into host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coming {
    /// How many, right behind those that were found.
    pub blocks: u32,
    /// How long that may take; zero when nobody knows.
    pub within: Duration,
}

/// What a lookup found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The longest run of leading hashes that can be loaded.
    pub runs: Vec<FoundRun>,
    /// To be released when the reads are over; `None` when nothing was found.
    pub pin: Option<PinId>,
    /// Reads of other sessions' leases that complete later must be discarded.
    pub pinned_until: Instant,
    /// How long the broker pins.
    pub pin_for: Duration,
    /// What a lookup that is asked again soon would find besides.
    pub coming: Coming,
}

/// What an unpublishing left pinned.
#[derive(Clone, Debug)]
pub struct Unpublished {
    /// Slots that must not be written yet.
    pub pinned: Vec<u32>,
    /// How long not.
    pub retry_after: Duration,
}

/// A region to offer.
#[derive(Clone, Debug)]
pub struct OfferedRegion {
    /// Drawn at random by the donor.
    pub region: RegionId,
    /// The device that holds it.
    pub device: DeviceUuid,
    /// The allocation behind it.
    pub allocation: AllocationId,
    /// Where the region starts in the allocation, bytes.
    pub offset: u64,
    /// Its size: a multiple of `slab_bytes`.
    pub bytes: u64,
    /// The lease unit, bytes.
    pub slab_bytes: u64,
    /// Slabs of the allocation may be lent to several tenants at the same time, although whoever maps one can reach all of
    /// it.
    pub shared: bool,
    /// Its donor follows the device's idle HBM. The broker takes such regions of one donor at a time.
    pub elastic: bool,
}

/// What a donor wants back.
#[derive(Clone, Debug)]
pub enum WithdrawWhat {
    /// These regions.
    Regions(Vec<RegionId>),
    /// At least this many bytes on a device, the cheapest to give up first.
    Bytes {
        /// The device.
        device: DeviceUuid,
        /// How much.
        bytes: u64,
    },
}

/// Regions on their way back: `returned` follows for each.
#[derive(Clone, Debug)]
pub struct Withdrawing {
    /// The regions.
    pub regions: Vec<RegionId>,
    /// Their bytes.
    pub bytes: u64,
}
