//! Stores: write-back from the engine's pool, found by others only once every byte is there.

use std::{fmt, sync::Arc};

use swiftcache_proto::domain::{BlockHash, Medium};
use tracing::warn;

use super::{
    BytesByLink, PagedKv,
    blocks::{BlockId, Place},
    core::{Core, Leftover},
    slots::Run,
    state::State,
    write::{Settled, Write},
};
use crate::{
    device::Ticket,
    transfer::{AreaId, Direction, Plan, Queueing, RouteSet, issue_store},
};

/// Copies on their way from the engine's pool into slabs.
///
/// Dropping a store leaves completion and publishing to a background thread; the engine's blocks must then stay as
/// they are until [`is_done`](Self::is_done).
pub struct Store {
    core: Arc<Core>,
    write: Arc<Write>,
    stored: Stored,
    ended: bool,
}

/// How a store ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// Blocks written and kept.
    pub stored: u32,
    /// Blocks that were there already.
    pub known: u32,
    /// Blocks for which there was no room.
    pub unplaced: u32,
    /// Blocks lost before they were kept: their lease was revoked, their copy failed, or a replica had published
    /// them first.
    pub lost: u32,
    /// What crossed each link.
    pub bytes: BytesByLink,
}

/// Slots being handed out to a sequence.
#[derive(Debug)]
struct Placing {
    run: Option<(AreaId, Run)>,
    after: Option<Place>,
    routes: RouteSet,
}

impl Placing {
    fn behind(routes: RouteSet) -> Self {
        Self {
            run: None,
            after: None,
            routes,
        }
    }

    /// The next slot: of the run in hand, or of a new one of at most `want` slots; donors before the host tier.
    fn next(&mut self, state: &mut State, want: u32) -> Option<Place> {
        let (index, run) = match self.run.take() {
            Some((index, run)) => (index, run),
            None => state
                .take_slots(Medium::Hbm, want, self.after, self.routes)
                .or_else(|| state.take_slots(Medium::Host, want, self.after, self.routes))?,
        };
        if run.count > 1 {
            let rest = Run {
                first: run.first + 1,
                count: run.count - 1,
            };
            self.run = Some((index, rest));
        }
        let place = Place {
            slab: index,
            slot: run.first,
        };
        self.after = Some(place);
        Some(place)
    }

    /// Gives back what was taken and not used.
    fn end(&mut self, state: &mut State) {
        if let Some((index, run)) = self.run.take()
            && let Some(shelf) = state.shelves.get_mut(index)
        {
            for slot in run.first..run.first + run.count {
                shelf.slots.give(slot);
            }
        }
    }
}

impl State {
    /// Adds a block to the end of a sequence.
    fn link(&mut self, id: BlockId, sequence: &mut Vec<BlockId>) {
        if let Some(before) = sequence.last() {
            self.blocks.follow(id, *before);
        }
        sequence.push(id);
    }
}

impl Core {
    /// Finds room for a sequence's blocks, registers the copies with every slab they touch, and queues them.
    pub(super) fn store(
        self: &Arc<Self>,
        blocks: &[(BlockHash, u32)],
        kv: &PagedKv,
        layer_ready: &dyn Fn(usize) -> Option<Ticket>,
    ) -> Store {
        let layout = &self.config.layout;
        let mut stored = Stored::default();
        let mut plan = self.plans.take();
        let (write, touching) = match self.touch(kv) {
            Ok(touching) => {
                let write = self.plan_store(blocks, kv, &mut plan, &mut stored);
                (write, touching)
            }
            Err(error) => {
                warn!(%error, "nothing is stored from a pool that cannot be used");
                stored.unplaced = blocks.len() as u32;
                let flight = self.leases.registering().begin(Vec::new());
                (Write::new(flight, true, Vec::new()), None)
            }
        };
        let mut queueing = Queueing::new(&write.flight.transfer, Direction::Store);
        if let Err(refused) = issue_store(
            &mut plan,
            &layout.layer_bytes,
            kv,
            layer_ready,
            &mut queueing,
            &mut stored.bytes,
        ) {
            self.refused(&write.flight, &refused);
        }
        // See `load`: whoever waits for the transfer counts on the plan having let go of its slabs.
        self.plans.put_back(plan);
        drop(queueing);
        if let Some(touching) = touching {
            let flight = Arc::clone(&write.flight);
            touching.until(move || flight.transfer.is_over());
        }
        Store {
            core: Arc::clone(self),
            write,
            stored,
            ended: false,
        }
    }

    fn plan_store(
        self: &Arc<Self>,
        blocks: &[(BlockHash, u32)],
        kv: &PagedKv,
        plan: &mut Plan,
        stored: &mut Stored,
    ) -> Arc<Write> {
        let known = self.pin_known(blocks);
        let want = (blocks.len() - known.len()) as u32;
        if want > 0 {
            self.make_room(want);
        }
        let mut state = self.state.lock();
        state.awaited -= want;
        let mut registering = self.leases.registering();
        let mut sequence = Vec::with_capacity(blocks.len());
        let mut writes = Vec::with_capacity(want as usize);
        let mut placing = Placing::behind(state.routes_up());
        for ((hash, from), done) in blocks.iter().zip(0..) {
            if let Some(id) = state.blocks.find(hash) {
                stored.known += 1;
                placing.after = state.blocks.get(id).place;
                state.link(id, &mut sequence);
                continue;
            }
            let left = blocks.len() as u32 - done;
            let room = (*from < kv.blocks)
                .then(|| placing.next(&mut state, left.min(want)))
                .flatten();
            // A block without those before it is worth nothing.
            let Some(place) = room else {
                stored.unplaced = left;
                break;
            };
            let Some(shelf) = state.shelves.get(place.slab) else {
                break;
            };
            plan.add(&shelf.area, place.slot, *from);
            let medium = shelf.medium();
            let id = state.blocks.insert(*hash, place, medium);
            state.shelves.occupy(place, id);
            state.link(id, &mut sequence);
            writes.push(id);
        }
        placing.end(&mut state);
        // The first block is used last: a block goes before those it follows.
        for id in sequence.iter().rev() {
            state.blocks.touch(*id);
        }
        for id in known {
            state.blocks.unpin(id);
        }
        state.counts.known_blocks += u64::from(stored.known);
        state.counts.unplaced_blocks += u64::from(stored.unplaced);
        let flight = registering.begin(plan.areas().collect());
        drop(registering);
        let write = Write::new(Arc::clone(&flight), true, writes);
        state.begin_write(&write, flight.slabs());
        write
    }

    /// Pins the blocks that are there already, so that making room does not take them from under their successors.
    fn pin_known(&self, blocks: &[(BlockHash, u32)]) -> Vec<BlockId> {
        let mut state = self.state.lock();
        let known: Vec<BlockId> = (blocks.iter())
            .filter_map(|(hash, _)| state.blocks.find(hash))
            .collect();
        for id in &known {
            state.blocks.pin(*id);
        }
        known
    }
}

impl Store {
    /// Waits until it is known that the copies are over, also of a store that failed half-way, and for the blocks to be
    /// published.
    pub fn finish(mut self) -> Stored {
        self.ended = true;
        let Settled { kept, lost } = self.core.settle(&self.write);
        self.stored.stored = kept;
        self.stored.lost = lost;
        self.core.state.lock().counts.stored += self.stored.bytes;
        self.stored
    }

    /// Blocks for which there was no room. Known from the beginning.
    pub fn unplaced(&self) -> u32 {
        self.stored.unplaced
    }

    /// Whether it is known that the engine's blocks have been read, or are not read any more: they may change.
    pub fn is_done(&self) -> bool {
        self.write.flight.transfer.is_over()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if !self.ended && self.core.origin.is_here() {
            self.core.state.lock().counts.stored += self.stored.bytes;
            self.core.leave(Leftover::Write(Arc::clone(&self.write)));
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({:?})", self.stored)
    }
}
