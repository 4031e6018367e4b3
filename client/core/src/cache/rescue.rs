//! What is moved out of revoked slabs while their windows last: the hottest blocks of all of them first, to other leases
//! and the host tier.

use std::sync::Arc;

use swiftcache_proto::domain::Medium;

use super::{
    blocks::{BlockId, Place},
    core::Core,
    publish::Publishing,
    shelf::Shelf,
    state::State,
};
use crate::{
    device,
    leases::Flight,
    transfer::{AreaId, Move, MoveLead},
};

/// The most blocks that are put on their way in one round.
const AT_ONCE: usize = 64;

/// Blocks of slabs that are drained together.
#[derive(Default)]
pub(super) struct Rescue {
    /// Blocks still to be moved, the coldest first.
    waiting: Vec<(AreaId, BlockId)>,
    /// One batch of each slab at most.
    moving: Vec<Moving>,
    /// What arrived, and of which slab.
    publishing: Vec<(AreaId, Publishing)>,
}

/// Blocks that leave one slab together.
struct Batch {
    from: AreaId,
    /// Each with its slot elsewhere.
    blocks: Vec<(BlockId, Place)>,
    steps: Vec<Move>,
}

/// Blocks on their way out of one slab.
struct Moving {
    from: AreaId,
    blocks: Vec<(BlockId, Place)>,
    flight: Arc<Flight>,
}

impl Rescue {
    pub(super) fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.moving.is_empty() && self.publishing.is_empty()
    }

    /// Whether it is not through with a slab.
    pub(super) fn has(&self, slab: AreaId) -> bool {
        self.waiting.iter().any(|(index, _)| *index == slab)
            || self.moving.iter().any(|moving| moving.from == slab)
            || self.publishing.iter().any(|(index, _)| *index == slab)
    }

    /// Has the blocks of these slabs moved.
    pub(super) fn add(&mut self, core: &Core, slabs: &[AreaId]) {
        let state = core.state.lock();
        let routes = state.routes_up();
        for slab in slabs {
            // What cannot be copied is not tried.
            let reached = (state.shelves.get(*slab)).filter(|shelf| shelf.is_behind(routes));
            let blocks = reached.into_iter().flat_map(Shelf::blocks);
            self.waiting.extend(blocks.map(|id| (*slab, id)));
        }
        // A block is worth no less than those that follow it, so a prefix goes before what needs it.
        self.waiting.sort_by_key(|(_, id)| {
            let worth = state.blocks.worth(*id);
            (!worth.stray, worth.found, worth.used)
        });
    }

    /// Moves no more blocks of slabs that are `gone`. Those on their way arrive or not.
    pub(super) fn forget(&mut self, gone: impl Fn(AreaId) -> bool) {
        self.waiting.retain(|(slab, _)| !gone(*slab));
    }

    /// Takes in what has arrived, and puts more on its way: the hottest blocks of slabs with none on their way, so that
    /// one slab's slow copies hold up no other's. True when something changed.
    pub(super) fn advance(&mut self, core: &Core) -> bool {
        let before = self.publishing.len();
        self.publishing
            .retain_mut(|(_, publishing)| !core.is_published(publishing));
        let mut changed = self.publishing.len() < before;
        for moving in std::mem::take(&mut self.moving) {
            let Some(outcome) = moving.flight.transfer.outcome() else {
                self.moving.push(moving);
                continue;
            };
            changed = true;
            if outcome.is_err() || moving.flight.transfer.is_poisoned() {
                self.forget(|slab| slab == moving.from);
            }
            let ready = core.rescued(&moving.flight, moving.blocks, &outcome);
            let publishing = core.begin_publishing(ready);
            self.publishing.push((moving.from, publishing));
        }
        let hottest = self.take_hottest();
        if !hottest.is_empty() {
            changed = true;
            if !self.begin_moving(core, &hottest) {
                self.waiting.clear();
            }
        }
        changed
    }

    /// The hottest blocks of slabs with none on their way.
    fn take_hottest(&mut self) -> Vec<(AreaId, BlockId)> {
        let mut hottest = Vec::new();
        for at in (0..self.waiting.len()).rev() {
            if hottest.len() == AT_ONCE {
                break;
            }
            let slab = self.waiting[at].0;
            if !self.moving.iter().any(|moving| moving.from == slab) {
                hottest.push(self.waiting.remove(at));
            }
        }
        hottest
    }

    /// Puts blocks on their way. False when there is no more room.
    fn begin_moving(&mut self, core: &Core, blocks: &[(AreaId, BlockId)]) -> bool {
        let mut batches: Vec<Batch> = Vec::new();
        let mut flights = Vec::new();
        let mut room = true;
        {
            let mut state = core.state.lock();
            let mut registering = core.leases.registering();
            let mut near = None;
            for (slab, id) in blocks {
                let comes_along = |before| {
                    let its =
                        |blocks: &[(BlockId, Place)]| blocks.iter().any(|(id, _)| *id == before);
                    self.moving.iter().any(|moving| its(&moving.blocks))
                        || batches.iter().any(|batch| its(&batch.blocks))
                };
                let Some(from) = worth_moving(&state, *slab, *id, comes_along) else {
                    continue;
                };
                let used = state.blocks.worth(*id).used;
                let Some(to) = place_for(&mut state, used, near) else {
                    room = false;
                    break;
                };
                near = Some(to);
                let at = batches.iter().position(|batch| batch.from == *slab);
                let at = at.unwrap_or_else(|| {
                    batches.push(Batch {
                        from: *slab,
                        blocks: Vec::new(),
                        steps: Vec::new(),
                    });
                    batches.len() - 1
                });
                let batch = &mut batches[at];
                state.add_move(&mut batch.steps, from, to);
                batch.blocks.push((*id, to));
                state.blocks.pin(*id);
            }
            for batch in &batches {
                let mut slabs = vec![batch.from];
                for (_, to) in &batch.blocks {
                    if !slabs.contains(&to.slab) {
                        slabs.push(to.slab);
                    }
                }
                flights.push(registering.begin(slabs));
            }
        }
        for (batch, flight) in batches.into_iter().zip(flights) {
            core.issue_moves(&flight, batch.steps, MoveLead::Target);
            self.moving.push(Moving {
                from: batch.from,
                blocks: batch.blocks,
                flight,
            });
        }
        room
    }
}

impl Core {
    /// Takes in what a move that is over has brought. Gives the blocks to publish, each pinned.
    fn rescued(
        &self,
        flight: &Arc<Flight>,
        blocks: Vec<(BlockId, Place)>,
        outcome: &device::Result<()>,
    ) -> Vec<BlockId> {
        let copied = outcome.is_ok() && !flight.transfer.is_poisoned();
        let mut ready = Vec::new();
        let mut state = self.state.lock();
        for (id, to) in blocks {
            // Their own slab may be gone by now, and where they went may be revoked too.
            let arrived = copied
                && state.blocks.get(id).place.is_some()
                && state.shelves.get(to.slab).is_some_and(Shelf::is_open);
            if arrived {
                state.relocate(id, to);
                match state.shelves.get(to.slab).map(Shelf::medium) {
                    Some(Medium::Host) => state.counts.moved_to_host += 1,
                    _ => state.counts.moved_to_donor += 1,
                }
                ready.push(id);
            } else {
                if let Some(shelf) = state.shelves.get_mut(to.slab) {
                    shelf.slots.give(to.slot);
                }
                state.blocks.unpin(id);
            }
        }
        drop(state);
        self.ended(flight, outcome);
        ready
    }
}

/// Where a block of a revoked slab lies, if anybody could find it elsewhere: with what comes before it, which stays or
/// `comes_along`.
fn worth_moving(
    state: &State,
    slab: AreaId,
    id: BlockId,
    comes_along: impl Fn(BlockId) -> bool,
) -> Option<Place> {
    let block = state.blocks.get(id);
    let from = block.place.filter(|place| place.slab == slab)?;
    let stays = |before| state.place_of(before).is_some() || comes_along(before);
    let reachable = !state.blocks.worth(id).stray && state.blocks.before(id).is_none_or(stays);
    (block.ready && reachable).then_some(from)
}

/// A slot for a rescued block: a free one of another lease, else one of the host tier.
fn place_for(state: &mut State, used: u64, near: Option<Place>) -> Option<Place> {
    let routes = state.routes_up();
    let free = state.take_slot(Medium::Hbm, near, routes);
    free.or_else(|| state.host_slot_for(used, near))
}
