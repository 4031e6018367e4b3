//! One slab of a donor: one allocation, one region.

use std::time::Instant;

use rand::Rng;
use swiftcache_proto::domain::{AllocationId, Generation, RegionId};

use crate::{
    device::Memory,
    session::{OfferedRegion, Scrub},
};

use super::DonorConfig;

/// Where a region is between its offer and its return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Offered, as far as is known; or about to be, when the broker is back.
    Offered,
    /// Asked for at that time; `heard` once the broker has said that it knows.
    Withdrawing { since: Instant, heard: bool },
}

#[derive(Debug)]
pub(super) struct Region {
    pub(super) id: RegionId,
    pub(super) allocation: AllocationId,
    pub(super) memory: Memory,
    pub(super) phase: Phase,
    /// The broker has confirmed the offer since it started.
    pub(super) confirmed: bool,
    /// The first connection that it may be known on.
    pub(super) since_epoch: u64,
    /// The last generation that was zeroed after. A second zeroing could hit the next lessee's bytes.
    scrubbed: Option<Generation>,
}

impl Region {
    /// A region around fresh memory, under ids nobody has used.
    pub(super) fn new(memory: Memory, epoch: u64) -> Self {
        let mut random = rand::rng();
        Self {
            id: RegionId(random.random()),
            allocation: AllocationId(random.random()),
            memory,
            phase: Phase::Offered,
            confirmed: false,
            since_epoch: epoch,
            scrubbed: None,
        }
    }

    pub(super) fn offer(&self, config: &DonorConfig) -> OfferedRegion {
        OfferedRegion {
            region: self.id,
            device: config.device.clone(),
            allocation: self.allocation,
            offset: 0,
            bytes: config.slab_bytes,
            slab_bytes: config.slab_bytes,
        }
    }

    /// Whether this scrub is a new one; it is not from now on.
    pub(super) fn begin_scrub(&mut self, scrub: &Scrub) -> bool {
        let new = self.scrubbed.is_none_or(|done| done < scrub.generation);
        if new {
            self.scrubbed = Some(scrub.generation);
        }
        new
    }
}
