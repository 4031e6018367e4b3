//! Back to HBM: blocks that lie in host memory only, as far as donors lend HBM that has room. The hottest go first, and none without
//! what comes before it. An engine that finds such a block does not offer it again, so nobody else would.

use std::sync::Arc;

use swiftcache_proto::domain::Medium;

use super::{
    blocks::{BlockId, Place, Published},
    core::Core,
    evict::MOST_SLACK,
    shelf::Shelf,
    state::State,
};
use crate::{
    device,
    leases::Flight,
    transfer::{AreaId, MoveLead},
};

/// Blocks moved together.
const BATCH: u32 = 64;
/// Blocks looked at for that: those that cannot be moved now are few, or cold.
const LOOKED_AT: usize = 4 * BATCH as usize;

/// Blocks on their way from host memory to HBM.
#[derive(Debug)]
pub(super) struct Promotion {
    flight: Arc<Flight>,
    moving: Vec<Step>,
}

/// One block's way.
#[derive(Clone, Copy, Debug)]
struct Step {
    block: BlockId,
    from: Place,
    to: Place,
}

impl Core {
    /// Takes the blocks of a promotion that is over into use where they are now, and begins the next one if donors have
    /// room for it. Never waits for copies.
    pub(super) fn promote(self: &Arc<Self>, before: Option<Promotion>) -> Option<Promotion> {
        if let Some(promotion) = before {
            let Some(outcome) = promotion.flight.transfer.outcome() else {
                return Some(promotion);
            };
            let copied = outcome.is_ok() && !promotion.flight.transfer.is_poisoned();
            self.end_promotion(promotion, &outcome);
            if !copied {
                return None;
            }
        }
        self.connected().and_then(|_| self.begin_promotion())
    }

    fn begin_promotion(self: &Arc<Self>) -> Option<Promotion> {
        let mut moves = Vec::new();
        let mut moving: Vec<Step> = Vec::new();
        let flight = {
            let mut state = self.state.lock();
            let mut registering = self.leases.registering();
            let mut slabs: Vec<AreaId> = Vec::new();
            let mut near = None;
            let routes = state.routes_up();
            for (block, from) in state.worth_promoting() {
                let Some(to) = state.take_slot(Medium::Hbm, near, routes) else {
                    break;
                };
                near = Some(to);
                state.add_move(&mut moves, from, to);
                for slab in [from.slab, to.slab] {
                    if !slabs.contains(&slab) {
                        slabs.push(slab);
                    }
                }
                state.blocks.pin(block);
                moving.push(Step { block, from, to });
            }
            if moving.is_empty() {
                return None;
            }
            registering.begin(slabs)
        };
        self.issue_moves(&flight, moves, MoveLead::Target);
        Some(Promotion { flight, moving })
    }

    fn end_promotion(self: &Arc<Self>, promotion: Promotion, outcome: &device::Result<()>) {
        let copied = outcome.is_ok() && !promotion.flight.transfer.is_poisoned();
        let mut ready = Vec::new();
        {
            let mut state = self.state.lock();
            for step in promotion.moving {
                let block = state.blocks.get(step.block);
                // A block that somebody has found meanwhile may be being read where it is.
                let free = block.pins == 1 && block.place == Some(step.from);
                let usable = state.shelves.get(step.to.slab).is_some_and(Shelf::is_open);
                if copied && free && usable {
                    // In host memory of donors others may know it.
                    let published = block.published;
                    state.relocate(step.block, step.to);
                    state.retire(step.from, published);
                    state.counts.promoted_blocks += 1;
                    ready.push(step.block);
                    continue;
                }
                // Nobody was told of it.
                state.retire(step.to, Published::No);
                state.blocks.unpin(step.block);
            }
        }
        self.ended(&promotion.flight, outcome);
        self.publish(ready);
    }
}

impl State {
    /// Blocks in host memory that there is HBM for, the hottest first, each with its place. Making room leaves some
    /// slots free: taking those would only have the next store make room again. What a store is making room for is not there
    /// to be taken at all.
    fn worth_promoting(&self) -> Vec<(BlockId, Place)> {
        let routes = self.routes_up();
        let slack = (self.slots(Medium::Hbm, routes) / 16).min(MOST_SLACK);
        let room = (self.free_slots(Medium::Hbm, routes)).saturating_sub(slack + self.awaited);
        let most = room.min(BATCH) as usize;
        let worth = |id: BlockId| {
            let block = self.blocks.get(id);
            let reached = self
                .blocks
                .before(id)
                .is_none_or(|before| self.place_of(before).is_some());
            let free = block.pins == 0 && !self.blocks.worth(id).stray && reached;
            let (place, shelf) = self.place_of(id)?;
            (free && shelf.is_behind(routes)).then_some((id, place))
        };
        let newest = self.blocks.newest(Medium::Host);
        let looked_at = newest.take(LOOKED_AT);
        looked_at.filter_map(worth).take(most).collect()
    }
}

#[cfg(test)]
mod tests {
    use swiftcache_proto::domain::BlockHash;

    use super::*;
    use crate::{
        cache::{
            shelf::tests::{HOST, OWN, SLOTS, shelf},
            tests::{device, layer},
        },
        transfer::Routes,
    };

    #[test]
    fn a_promotion_leaves_what_a_store_has_made_room_for() {
        let routes = Arc::new(Routes::new(layer(), device()));
        let mut state = State::new(Arc::clone(&routes));
        state.shelves.insert(shelf(&routes, OWN, 1));
        let host = shelf(&routes, HOST, 0);
        let slab = host.area.id;
        state.shelves.insert(host);
        for slot in 0..SLOTS {
            let place = Place { slab, slot };
            let hash = BlockHash([slot as u8; 16]);
            let id = state.blocks.insert(hash, place, Medium::Host);
            state.shelves.occupy(place, id);
            state.blocks.get_mut(id).ready = true;
            state.blocks.touch(id);
            state.blocks.unpin(id);
        }
        for (awaited, worth) in [(0, SLOTS), (1, SLOTS - 1), (SLOTS, 0), (SLOTS + 1, 0)] {
            state.awaited = awaited;
            assert_eq!(state.worth_promoting().len() as u32, worth, "{awaited}");
        }
    }
}
