//! What a borrower knows, behind one lock. The lock is never held during a copy, a call or an import.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use swiftcache_proto::{
    domain::{BlockHash, LeaseId, RegionId},
    traffic::Traffic,
};

use super::{
    blocks::{BlockId, Blocks, List, Place, Published},
    kept::Told,
    op::Op,
    slab::{Kind, Slab, Slabs},
    slots::Run,
    stats::{Latency, Stats},
    unreadable::Unreadable,
};
use crate::{
    session::Held,
    transfer::{AreaId, RouteSet, Routes},
};

/// Longer latencies count as this, microseconds: ten minutes, the longest drain window.
const LONGEST_US: u64 = 600_000_000;

#[derive(Debug)]
pub(super) struct State {
    pub(super) blocks: Blocks,
    pub(super) slabs: Slabs,
    /// Leases granted and being mapped.
    pub(super) pending: HashMap<LeaseId, Pending>,
    /// Calls for leases whose answers have not been looked at.
    pub(super) grants_in_flight: u32,
    /// Revoked (and acknowledged) while their grants may still be on their way: never to be mapped.
    pub(super) revoked_early: HashSet<LeaseId>,
    /// Replicas' leases that cannot be read here.
    pub(super) unreadable: Unreadable,
    /// What the broker knows of the host tier.
    pub(super) told: Told,
    /// The smallest slab seen: what a further lease takes at least, bytes.
    pub(super) slab_bytes: Option<u64>,
    /// The broker had nothing to lend; not to be asked before.
    pub(super) grow_after: Instant,
    /// How long it was last left alone for because what it had to lend cannot be mapped here; zero when it can.
    pub(super) map_pause: Duration,
    /// Regions of which slabs were granted that cannot be mapped here.
    pub(super) unmapped: HashSet<RegionId>,
    /// Which ways to sources work.
    pub(super) routes: Arc<Routes>,
    pub(super) counts: Stats,
    /// What of it the session was told.
    pub(super) reported: Traffic,
    pub(super) reported_down: u32,
    pub(super) drain: Histogram<u64>,
    pub(super) acknowledge: Histogram<u64>,
}

/// A lease between its grant and its mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) shared: bool,
    pub(super) bytes: u64,
    /// Revoked meanwhile: to be acknowledged instead of used.
    pub(super) revoked: bool,
    /// Refused meanwhile: to be dropped without a word.
    pub(super) refused: bool,
}

impl State {
    pub(super) fn new(routes: Arc<Routes>) -> Self {
        let histogram =
            || Histogram::new_with_max(LONGEST_US, 3).expect("constants that hdrhistogram accepts");
        Self {
            blocks: Blocks::default(),
            slabs: Slabs::default(),
            pending: HashMap::new(),
            grants_in_flight: 0,
            revoked_early: HashSet::new(),
            unreadable: Unreadable::default(),
            told: Told::default(),
            slab_bytes: None,
            grow_after: Instant::now(),
            map_pause: Duration::ZERO,
            unmapped: HashSet::new(),
            routes,
            counts: Stats::default(),
            reported: Traffic::default(),
            reported_down: 0,
            drain: histogram(),
            acknowledge: histogram(),
        }
    }

    /// The block of this hash, where its bytes are there and can be read.
    pub(super) fn readable(&self, hash: &BlockHash) -> Option<(BlockId, &Slab)> {
        let id = self.blocks.find(hash)?;
        let (_, slab) = self.place_of(id)?;
        slab.area
            .route
            .is_in(self.routes.up())
            .then_some((id, slab))
    }

    /// Where a block can be read, if it can.
    pub(super) fn place_of(&self, id: BlockId) -> Option<(Place, &Slab)> {
        let block = self.blocks.get(id);
        let place = block.place.filter(|_| block.ready)?;
        let slab = self.slabs.get(place.slab)?;
        slab.is_active().then_some((place, slab))
    }

    /// Takes up to `want` consecutive slots of a tier: next to `after` if it can, else in the slab with the best
    /// link that has room. Only behind `routes`.
    pub(super) fn take_slots(
        &mut self,
        tier: List,
        want: u32,
        after: Option<Place>,
        routes: RouteSet,
    ) -> Option<(AreaId, Run)> {
        let usable = |slab: &Slab| {
            slab.list() == tier
                && slab.is_active()
                && slab.slots.free() > 0
                && slab.area.route.is_in(routes)
        };
        if let Some(after) = after
            && let Some(slab) = self.slabs.get_mut(after.slab)
            && usable(slab)
        {
            let run = slab.slots.take(want, Some(after.slot + 1))?;
            return Some((after.slab, run));
        }
        let mut candidates = self.slabs.placement.iter().copied();
        let index = candidates.find(|index| self.slabs.get(*index).is_some_and(&usable))?;
        let run = self.slabs.get_mut(index)?.slots.take(want, None)?;
        Some((index, run))
    }

    /// Free slots of a tier behind `routes`.
    pub(super) fn free_slots(&self, tier: List, routes: RouteSet) -> u32 {
        let behind = self
            .active(tier)
            .filter(|slab| slab.area.route.is_in(routes));
        behind.map(|slab| slab.slots.free()).sum()
    }

    /// All slots of a tier behind `routes`.
    pub(super) fn slots(&self, tier: List, routes: RouteSet) -> u32 {
        let behind = self
            .active(tier)
            .filter(|slab| slab.area.route.is_in(routes));
        behind.map(|slab| slab.area.slots).sum()
    }

    fn active(&self, tier: List) -> impl Iterator<Item = &Slab> {
        (self.slabs.placement.iter())
            .filter_map(|index| self.slabs.get(*index))
            .filter(move |slab| slab.is_active() && slab.list() == tier)
    }

    /// Forgets a block. Its slot is the caller's to give back, or to have unpublished first.
    pub(super) fn lose(&mut self, id: BlockId) -> Option<Place> {
        let place = self.blocks.lose(id)?;
        self.vacated(place)
    }

    /// Forgets a block that a replica holds.
    pub(super) fn lose_duplicate(&mut self, id: BlockId) -> Option<Place> {
        let place = self.blocks.lose_duplicate(id)?;
        self.vacated(place)
    }

    fn vacated(&mut self, place: Place) -> Option<Place> {
        self.slabs.vacate(place);
        Some(place)
    }

    /// Gives a vacated slot back, at once if the broker never heard of its block, else when it has confirmed that
    /// nobody reads it.
    pub(super) fn retire(&mut self, place: Place, published: Published) {
        if let Some(slab) = self.slabs.get_mut(place.slab) {
            match published {
                Published::No => slab.slots.give(place.slot),
                Published::Maybe | Published::Yes => {
                    slab.unconfirmed.push((Instant::now(), place.slot));
                }
            }
        }
    }

    /// Moves a block to a slot that was taken for it. Its old slot is the caller's.
    pub(super) fn relocate(&mut self, id: BlockId, to: Place) {
        if let Some(from) = self.blocks.get(id).place {
            self.slabs.vacate(from);
        }
        self.slabs.occupy(to, id);
        if let Some(slab) = self.slabs.get(to.slab) {
            self.blocks.relocate(id, to, slab.list());
        }
    }

    pub(super) fn begin_op(&mut self, op: &Arc<Op>) {
        for index in &op.slabs {
            if let Some(slab) = self.slabs.get_mut(*index) {
                slab.ops.push(Arc::clone(op));
            }
        }
    }

    pub(super) fn end_op(&mut self, op: &Arc<Op>) {
        for index in &op.slabs {
            if let Some(slab) = self.slabs.get_mut(*index) {
                slab.end_op(op);
            }
        }
    }

    /// Bytes of own leases that can be used.
    pub(super) fn usable_bytes(&self) -> u64 {
        self.active(List::Donor).map(|slab| slab.bytes).sum()
    }

    /// Own leases, revoked ones that are not let go of yet and those about to be mapped included, bytes.
    pub(super) fn leased_bytes(&self) -> u64 {
        let totals = self.slabs.totals();
        let pending = (self.pending.values())
            .filter(|pending| !pending.shared)
            .map(|pending| pending.bytes);
        totals.own_bytes - totals.refused_bytes + pending.sum::<u64>()
    }

    /// What is mapped, to be claimed when the session resumes.
    pub(super) fn held(&self) -> Held {
        let mut held = Held::default();
        for (_, slab) in self.slabs.iter() {
            match slab.kind {
                Kind::Own(key) => held.leases.push(key.lease),
                Kind::Shared(key) => held.shared.push(key.lease),
                Kind::Host => {}
            }
        }
        for (lease, pending) in &self.pending {
            if pending.shared {
                held.shared.push(*lease);
            } else {
                held.leases.push(*lease);
            }
        }
        held
    }

    pub(super) fn stats(&self) -> Stats {
        let mut stats = self.counts;
        stats.drain = Latency::from(&self.drain);
        stats.acknowledge = Latency::from(&self.acknowledge);
        stats.routes_down = self.routes.down();
        let totals = self.slabs.totals();
        stats.leases = totals.own;
        stats.leased_bytes = totals.own_bytes;
        stats.shared_leases = totals.shared;
        stats.donor_blocks = totals.donor_blocks;
        stats.host_blocks = totals.host_blocks;
        stats
    }
}

/// Microseconds since `since`, at least one.
pub(super) fn micros_since(since: Instant) -> u64 {
    let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(LONGEST_US);
    micros.clamp(1, LONGEST_US)
}
