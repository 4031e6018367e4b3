//! The ledger's records: who may be touching which slab. They let a restarted broker know, before anyone
//! reconnects, which bytes are lent to which process. No handle is ever recorded.

use serde::{Deserialize, Serialize};
use swiftcache_proto::domain::{
    AllocationId, DeviceUuid, Generation, LeaseClass, LeaseId, RegionId, RevokeReason, SessionId,
};

use super::{
    event::{DrainTarget, QuotaTarget},
    process::Process,
};

/// One line of the ledger. Replaying the lines in order rebuilds every session, region and lease; the index
/// is published again by the borrowers, but for what those that are gone have left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// A session was opened.
    Session {
        /// Its id.
        session: SessionId,
        /// Its process.
        process: Process,
        /// For people.
        name: String,
        /// The whole tenant.
        tenant: String,
    },
    /// A session is over.
    SessionOver {
        /// Its id.
        session: SessionId,
    },
    /// A region was admitted.
    Region {
        /// Its donor.
        donor: SessionId,
        /// Its id.
        region: RegionId,
        /// The device that holds it.
        device: DeviceUuid,
        /// The allocation behind it.
        allocation: AllocationId,
        /// Where it starts there, bytes.
        offset: u64,
        /// Its size, bytes.
        bytes: u64,
        /// Its lease unit, bytes.
        slab_bytes: u64,
        /// Slabs of its allocation may be lent to several tenants at the same time.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        shared: bool,
        /// Its donor follows the device's idle HBM.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        elastic: bool,
    },
    /// A region was withdrawn, or its donor is gone: it is on its way back.
    RegionWithdrawn {
        /// Its id.
        region: RegionId,
    },
    /// A region is the donor's own again.
    RegionReturned {
        /// Its id.
        region: RegionId,
    },
    /// A slab was leased.
    Lease {
        /// The lease.
        lease: LeaseId,
        /// Which leasing of the slab.
        generation: Generation,
        /// The lessee.
        lessee: SessionId,
        /// The region.
        region: RegionId,
        /// The slab in it.
        slab: u32,
        /// The lessee's tenant.
        tenant: String,
        /// The model fingerprint.
        namespace: String,
        /// The device the borrower computes on.
        device: DeviceUuid,
        /// Bytes of one block over all layers.
        block_bytes: u64,
        /// What for. Ledgers of brokers before this have none.
        #[serde(default, skip_serializing_if = "LeaseClass::is_cache")]
        class: LeaseClass,
    },
    /// The lessee of a lease is gone. What it published there is kept for an heir.
    Estate {
        /// The lease.
        lease: LeaseId,
        /// The slots that hold a published block.
        slots: Vec<u32>,
        /// The blocks in them, in the same order: 32 hexadecimal digits each.
        blocks: String,
    },
    /// A lease that was kept for an heir has a lessee again.
    Inherited {
        /// The lease.
        lease: LeaseId,
        /// Its lessee from now on.
        heir: SessionId,
        /// The device that the heir computes on.
        device: DeviceUuid,
    },
    /// A session opened a lease for reading.
    Share {
        /// The lease.
        lease: LeaseId,
        /// The reader.
        reader: SessionId,
    },
    /// A lease is being revoked: a restarted broker must not take it for an active one, whose lessee or readers
    /// have already been told to let go.
    Revoked {
        /// The lease.
        lease: LeaseId,
        /// Why.
        reason: RevokeReason,
    },
    /// A session (lessee or reader) let go of a lease.
    LetGo {
        /// The lease.
        lease: LeaseId,
        /// Who let go.
        session: SessionId,
    },
    /// A donor was told to zero a slab: nobody may lease it until it has.
    Scrubbing {
        /// The region.
        region: RegionId,
        /// The slab in it.
        slab: u32,
    },
    /// A slab was zeroed: any tenant may lease it.
    Scrubbed {
        /// The region.
        region: RegionId,
        /// The slab in it.
        slab: u32,
    },
    /// An operator took something out of service.
    Drained {
        /// What.
        target: DrainTarget,
    },
    /// An operator put it back.
    Undrained {
        /// What.
        target: DrainTarget,
    },
    /// An operator bounded what somebody may hold.
    Quota {
        /// Whom.
        target: QuotaTarget,
        /// The most it may hold, bytes; `None`: what is configured.
        bytes: Option<u64>,
    },
    /// In a compacted ledger: the history of a slab that nobody holds.
    Slab {
        /// The region.
        region: RegionId,
        /// The slab in it.
        slab: u32,
        /// How many times it has been leased.
        generation: Generation,
        /// Whose bytes it may still hold.
        tenant: Option<String>,
    },
    /// In a compacted ledger: the next lease's id, so that none is ever used twice.
    NextLease {
        /// The id.
        lease: LeaseId,
    },
}

impl Record {
    /// The device that the record names, if it names one. It cannot be replayed on a node without that device.
    pub fn device(&self) -> Option<&DeviceUuid> {
        match self {
            Self::Region { device, .. }
            | Self::Lease { device, .. }
            | Self::Inherited { device, .. } => Some(device),
            _ => None,
        }
    }
}
