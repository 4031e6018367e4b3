//! One slab of a donor: one region.

use std::time::Instant;

use rand::Rng;
use swiftcache_proto::domain::{AllocationId, Generation, RegionId};

use crate::{
    device::Memory,
    session::{OfferedRegion, Scrub},
};

/// Where a region is between its offer and its return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Offered, as far as is known; or about to be, when the broker is back.
    Offered,
    /// Asked for at that time; `heard` once the broker has said that it knows.
    Withdrawing { since: Instant, heard: bool },
    /// The broker lost its records of who has it mapped, and it is part of a larger allocation: it is never safe to
    /// use again.
    Stranded,
}

#[derive(Debug)]
pub(super) struct Region {
    pub(super) id: RegionId,
    pub(super) allocation: AllocationId,
    /// Where it starts in its allocation, bytes.
    offset: u64,
    pub(super) memory: Memory,
    pub(super) phase: Phase,
    /// The broker has confirmed the offer since it started.
    pub(super) confirmed: bool,
    /// The broker may have heard of it.
    pub(super) maybe_known: bool,
    /// The first connection that it may be known on.
    pub(super) since_epoch: u64,
    /// The last generation that was zeroed after. A second zeroing could hit the next lessee's bytes.
    scrubbed: Option<Generation>,
}

impl Region {
    /// A region around fresh memory, under ids nobody has used.
    pub(super) fn new(memory: Memory, epoch: u64) -> Self {
        Self::within(AllocationId(rand::rng().random()), 0, memory, epoch)
    }

    /// A region that starts at `offset` of an allocation.
    pub(super) fn within(
        allocation: AllocationId,
        offset: u64,
        memory: Memory,
        epoch: u64,
    ) -> Self {
        Self {
            id: RegionId(rand::rng().random()),
            allocation,
            offset,
            memory,
            phase: Phase::Offered,
            confirmed: false,
            maybe_known: false,
            since_epoch: epoch,
            scrubbed: None,
        }
    }

    pub(super) fn offer(&self) -> OfferedRegion {
        OfferedRegion {
            region: self.id,
            device: self.memory.device().clone(),
            allocation: self.allocation,
            offset: self.offset,
            bytes: self.memory.bytes(),
            slab_bytes: self.memory.bytes(),
        }
    }

    /// Whether it was zeroed for this scrub, or for a later one.
    pub(super) fn is_scrubbed(&self, scrub: &Scrub) -> bool {
        self.scrubbed.is_some_and(|done| done >= scrub.generation)
    }

    /// It holds nobody's bytes any more. To be called only when the zeroing is known to be over.
    pub(super) fn note_scrubbed(&mut self, scrub: &Scrub) {
        self.scrubbed = self.scrubbed.max(Some(scrub.generation));
    }
}
