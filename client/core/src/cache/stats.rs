//! What a borrower has done, in numbers.

use std::ops::AddAssign;

use swiftcache_proto::traffic::Traffic;

pub use swiftcache_proto::traffic::BytesByLink;

pub use crate::latency::Latency;

/// Blocks by the tier they were found in: each is a hold and a medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlocksByTier {
    /// In this borrower's own leases of HBM.
    pub donor: u64,
    /// In leases of replicas.
    pub shared: u64,
    /// In host memory: own leases of it, and the host tier.
    pub host: u64,
}

impl BlocksByTier {
    /// Over all tiers.
    pub fn total(&self) -> u64 {
        self.donor + self.shared + self.host
    }
}

impl AddAssign for BlocksByTier {
    fn add_assign(&mut self, more: Self) {
        self.donor += more.donor;
        self.shared += more.shared;
        self.host += more.host;
    }
}

/// What a borrower has done since it opened, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Lookups made.
    pub lookups: u64,
    /// Hashes they asked for.
    pub lookup_blocks: u64,
    /// Blocks they found.
    pub hits: BlocksByTier,
    /// Of `lookup_blocks`: asked for by loads of what had been found before, by a scheduler in another process. Operators see
    /// what the scheduler asked and found.
    pub promised_blocks: u64,
    /// Of `hits`: found for such loads.
    pub promised_hits: BlocksByTier,
    /// Bytes brought into the engine's pool.
    pub loaded: BytesByLink,
    /// Bytes written back from it.
    pub stored: BytesByLink,
    /// Blocks found but not served: their lease was revoked, their pin ran out, or a copy failed.
    pub failed_blocks: u64,
    /// Of those, reads of a replica's lease that ended after the pin.
    pub late_blocks: u64,
    /// Loads, stores and moves whose copies failed.
    pub failed_operations: u64,
    /// Ways to a device's memory, or to host memory, on which copies fail repeatedly now: nothing is found or stored
    /// there until one works.
    pub routes_down: u32,
    /// Blocks written back.
    pub stored_blocks: u64,
    /// Blocks that a borrower before this one had left.
    pub inherited_blocks: u64,
    /// Blocks offered for writing back that were there already.
    pub known_blocks: u64,
    /// Blocks written back that a replica had published first.
    pub duplicate_blocks: u64,
    /// Blocks not written back for want of room.
    pub unplaced_blocks: u64,
    /// Blocks dropped to make room.
    pub evicted_blocks: u64,
    /// Blocks moved from leased HBM to host memory to make room.
    pub demoted_blocks: u64,
    /// Blocks moved from host memory to leased HBM, because donors had room.
    pub promoted_blocks: u64,
    /// Blocks rescued from a revoked lease to leased HBM.
    pub moved_to_donor: u64,
    /// Blocks rescued from a revoked lease to host memory.
    pub moved_to_host: u64,
    /// Blocks lost with a revoked or refused lease.
    pub dropped_blocks: u64,
    /// Revocations received: of own leases and of those read.
    pub revocations: u64,
    /// Leases lost because the broker did not know them after a resumption.
    pub refused_leases: u64,
    /// From a revocation's arrival to the last block moved.
    pub drain: Latency,
    /// From a revocation's arrival to its acknowledgement.
    pub acknowledge: Latency,
    /// Lookups answered without the broker because it was absent or failed.
    pub broker_misses: u64,
    /// Own leases now.
    pub leases: u32,
    /// The bytes of those of HBM.
    pub leased_bytes: u64,
    /// The bytes of those of host memory.
    pub host_leased_bytes: u64,
    /// Blocks in leased HBM now.
    pub donor_blocks: u64,
    /// Blocks in host memory now: in own leases of it, and in the host tier.
    pub host_blocks: u64,
    /// Replicas' leases mapped now.
    pub shared_leases: u32,
    /// Slabs into which copies are under way, or over and not counted yet: 0 when everything that was given up is in the
    /// numbers above.
    pub unsettled_slabs: u32,
}

impl Stats {
    /// What of it operators see through the broker.
    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            loaded: self.loaded,
            stored: self.stored,
            lookup_blocks: self.lookup_blocks - self.promised_blocks,
            own_blocks: self.hits.donor - self.promised_hits.donor,
            replica_blocks: self.hits.shared - self.promised_hits.shared,
            host_blocks: self.hits.host - self.promised_hits.host,
            failed_operations: self.failed_operations,
        }
    }
}
