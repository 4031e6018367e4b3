//! One slab of a donor: one region.

use std::time::Instant;

use rand::Rng;
use swiftcache_proto::domain::{AllocationId, Generation, HandleKind, RegionId};

use crate::{
    device::Memory,
    session::{OfferedRegion, Scrub},
};

/// Where regions' memory comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// An allocation for each, which is freed when it comes back.
    Allocations {
        slab_bytes: u64,
        handle: Option<HandleKind>,
        /// They follow the device's idle HBM.
        elastic: bool,
    },
    /// An engine's pool, which lives on, and so do mappings of it that nobody knows of.
    Pool,
}

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

/// Whether the broker knows a region, as far as its donor can tell. While it may, the memory stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// No: it was never offered, or the only offer was refused. It is nobody's but the donor's.
    No,
    /// An offer's answer never came. Offering again settles it.
    Perhaps,
    /// Yes, as it has said. If it knows it no more, the region was returned.
    Yes,
}

#[derive(Debug)]
pub(super) struct Region {
    pub(super) id: RegionId,
    pub(super) allocation: AllocationId,
    /// Where it starts in its allocation, bytes.
    offset: u64,
    pub(super) memory: Memory,
    pub(super) phase: Phase,
    pub(super) known: Known,
    /// The broker has the region on offer, with its handle, and nothing has happened since that could have changed it.
    pub(super) confirmed: bool,
    /// It may be on its way back: a withdrawal that left the choice to the broker was not answered.
    pub(super) doubted: bool,
    /// The connection that it was last offered on.
    pub(super) epoch: u64,
    /// A thread waits for the answer to its offer. There is one offer of a region at a time, or the refusal of one would
    /// not prove that the broker does not know it by another.
    pub(super) offering: bool,
    /// How many sessions say that they cannot map it.
    pub(super) unmappable_by: u32,
    /// It may have been lent and returned without a word, and still hold a borrower's bytes: zeroed before it is offered.
    pub(super) soiled: bool,
    /// The last generation that was zeroed after. A second zeroing could hit the next lessee's bytes.
    scrubbed: Option<Generation>,
}

impl Region {
    /// A region around fresh memory, under ids nobody has used.
    pub(super) fn new(memory: Memory) -> Self {
        Self::within(AllocationId(rand::rng().random()), 0, memory)
    }

    /// A region that starts at `offset` of an allocation.
    pub(super) fn within(allocation: AllocationId, offset: u64, memory: Memory) -> Self {
        Self {
            id: RegionId(rand::rng().random()),
            allocation,
            offset,
            memory,
            phase: Phase::Offered,
            known: Known::No,
            confirmed: false,
            doubted: false,
            epoch: 0,
            offering: false,
            unmappable_by: 0,
            soiled: false,
            scrubbed: None,
        }
    }

    pub(super) fn offer(&self, source: Source) -> OfferedRegion {
        let (shared, elastic) = match source {
            Source::Allocations { elastic, .. } => (false, elastic),
            // A legacy handle opens all of an engine's pool, which has many borrowers.
            Source::Pool => (true, false),
        };
        OfferedRegion {
            region: self.id,
            device: self.memory.device().clone(),
            allocation: self.allocation,
            offset: self.offset,
            bytes: self.memory.bytes(),
            slab_bytes: self.memory.bytes(),
            shared,
            elastic,
        }
    }

    /// Whether an offer is due: the first, or another whose answer settles what the broker knows.
    pub(super) fn wants_offer(&self) -> bool {
        !self.confirmed && !self.offering && !self.soiled
    }

    /// Whether it is waited for: it was asked back, or the broker may have chosen it.
    pub(super) fn may_be_on_its_way_back(&self) -> bool {
        match self.phase {
            Phase::Offered => self.doubted,
            Phase::Withdrawing { .. } => true,
            Phase::Stranded => false,
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

    /// No broker knows it any more, but one may have lent it. It will be offered as if it were new, so that its generations
    /// are counted from the start.
    pub(super) fn soil(&mut self) {
        self.known = Known::No;
        self.soiled = true;
        self.scrubbed = None;
    }
}
