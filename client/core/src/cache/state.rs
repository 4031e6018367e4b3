//! What the cache knows, behind one lock. The lock is never held during a copy, a call or an import.

use std::{sync::Arc, time::Instant};

use swiftcache_proto::{
    domain::{BlockHash, Hold, Medium},
    traffic::Traffic,
};

use super::{
    blocks::{BlockId, Blocks, Place, Published},
    news::Told,
    shelf::{Shelf, Shelves},
    slots::Run,
    stats::Stats,
    write::Write,
};
use crate::transfer::{AreaId, Move, MoveStep, RouteSet, Routes};

#[derive(Debug)]
pub(super) struct State {
    pub(super) blocks: Blocks,
    pub(super) shelves: Shelves,
    /// What the broker knows of the host tier.
    pub(super) told: Told,
    /// Which routes work.
    routes: Arc<Routes>,
    /// Slots that stores are making room for at present.
    pub(super) awaited: u32,
    /// When to publish again what the broker may not know: a publishing was not answered, and the connection lasts.
    pub(super) publish_after: Option<Instant>,
    pub(super) counts: Stats,
    /// What of it the session was told.
    pub(super) reported: Traffic,
    pub(super) reported_down: u32,
}

impl State {
    pub(super) fn new(routes: Arc<Routes>) -> Self {
        Self {
            blocks: Blocks::default(),
            shelves: Shelves::default(),
            told: Told::default(),
            routes,
            awaited: 0,
            publish_after: None,
            counts: Stats::default(),
            reported: Traffic::default(),
            reported_down: 0,
        }
    }

    /// The routes that work, as far as is known.
    pub(super) fn routes_up(&self) -> RouteSet {
        self.routes.up()
    }

    /// The block of this hash, where its bytes are there and can be read.
    pub(super) fn readable(&self, hash: &BlockHash) -> Option<(BlockId, &Shelf)> {
        let id = self.blocks.find(hash)?;
        let (_, shelf) = self.place_of(id)?;
        shelf.is_behind(self.routes_up()).then_some((id, shelf))
    }

    /// Where a block can be read, if it can.
    pub(super) fn place_of(&self, id: BlockId) -> Option<(Place, &Shelf)> {
        let block = self.blocks.get(id);
        let place = block.place.filter(|_| block.ready)?;
        let shelf = self.shelves.get(place.slab)?;
        shelf.is_open().then_some((place, shelf))
    }

    /// Takes up to `want` consecutive slots of a medium: next to `after` if it can, else on the shelf with the best
    /// link that has room. Only behind `routes`.
    pub(super) fn take_slots(
        &mut self,
        medium: Medium,
        want: u32,
        after: Option<Place>,
        routes: RouteSet,
    ) -> Option<(AreaId, Run)> {
        let usable = |shelf: &Shelf| {
            shelf.hold == Hold::Own
                && shelf.medium() == medium
                && shelf.is_open()
                && shelf.slots.free() > 0
                && shelf.is_behind(routes)
        };
        if let Some(after) = after
            && let Some(shelf) = self.shelves.get_mut(after.slab)
            && usable(shelf)
        {
            let run = shelf.slots.take(want, Some(after.slot + 1))?;
            return Some((after.slab, run));
        }
        let mut candidates = self.shelves.placement.iter().copied();
        let slab = candidates.find(|slab| self.shelves.get(*slab).is_some_and(&usable))?;
        let run = self.shelves.get_mut(slab)?.slots.take(want, None)?;
        Some((slab, run))
    }

    /// Takes one slot. See [`take_slots`](Self::take_slots).
    pub(super) fn take_slot(
        &mut self,
        medium: Medium,
        after: Option<Place>,
        routes: RouteSet,
    ) -> Option<Place> {
        let (slab, run) = self.take_slots(medium, 1, after, routes)?;
        let slot = run.first;
        Some(Place { slab, slot })
    }

    /// Free slots of a medium behind `routes`.
    pub(super) fn free_slots(&self, medium: Medium, routes: RouteSet) -> u32 {
        let open = self.open(medium, routes);
        open.map(|shelf| shelf.slots.free()).sum()
    }

    /// All slots of a medium behind `routes`.
    pub(super) fn slots(&self, medium: Medium, routes: RouteSet) -> u32 {
        self.open(medium, routes)
            .map(|shelf| shelf.area.slots)
            .sum()
    }

    fn open(&self, medium: Medium, routes: RouteSet) -> impl Iterator<Item = &Shelf> {
        (self.shelves.placement.iter())
            .filter_map(|slab| self.shelves.get(*slab))
            .filter(move |shelf| {
                shelf.is_open() && shelf.medium() == medium && shelf.is_behind(routes)
            })
    }

    /// Forgets a block. Its slot is the caller's to give back, or to have unpublished first.
    pub(super) fn lose(&mut self, id: BlockId) -> Option<Place> {
        let place = self.blocks.lose(id)?;
        self.shelves.vacate(place);
        Some(place)
    }

    /// Forgets a block that a replica holds.
    pub(super) fn lose_duplicate(&mut self, id: BlockId) -> Option<Place> {
        let place = self.blocks.lose_duplicate(id)?;
        self.shelves.vacate(place);
        Some(place)
    }

    /// Gives a vacated slot back, at once if the broker never heard of its block, else when it has confirmed that
    /// nobody reads it.
    pub(super) fn retire(&mut self, place: Place, published: Published) {
        if let Some(shelf) = self.shelves.get_mut(place.slab) {
            match published {
                Published::No => shelf.slots.give(place.slot),
                Published::Maybe | Published::Yes => {
                    shelf.unconfirmed.push((Instant::now(), place.slot));
                }
            }
        }
    }

    /// Moves a block to a slot that was taken for it. Its old slot is the caller's.
    pub(super) fn relocate(&mut self, id: BlockId, to: Place) {
        if let Some(from) = self.blocks.get(id).place {
            self.shelves.vacate(from);
        }
        self.shelves.occupy(to, id);
        if let Some(shelf) = self.shelves.get(to.slab) {
            self.blocks.relocate(id, to, shelf.medium());
        }
    }

    /// Adds one block's move.
    pub(super) fn add_move(&self, moves: &mut Vec<Move>, from: Place, to: Place) {
        let area = |place: Place| self.shelves.get(place.slab).map(|shelf| &shelf.area);
        if let (Some(from_area), Some(to_area)) = (area(from), area(to)) {
            let step = MoveStep {
                from: from_area,
                from_slot: from.slot,
                to: to_area,
                to_slot: to.slot,
            };
            Move::add(moves, step);
        }
    }

    /// What becomes readable on these shelves is under way.
    pub(super) fn begin_write(&mut self, write: &Arc<Write>, slabs: &[AreaId]) {
        for slab in slabs {
            if let Some(shelf) = self.shelves.get_mut(*slab) {
                shelf.writes.push(Arc::clone(write));
            }
        }
    }

    pub(super) fn end_write(&mut self, write: &Arc<Write>) {
        for slab in write.flight.slabs() {
            if let Some(shelf) = self.shelves.get_mut(*slab) {
                shelf.writes.retain(|other| !Arc::ptr_eq(other, write));
            }
        }
    }

    /// What it has done, and how many blocks it has. What became of leases is for others to say.
    pub(super) fn stats(&self) -> Stats {
        let blocks = self.shelves.counts();
        Stats {
            routes_down: self.routes.down(),
            donor_blocks: blocks.hbm,
            host_blocks: blocks.host,
            unsettled_slabs: self.shelves.unsettled(),
            ..self.counts
        }
    }
}
