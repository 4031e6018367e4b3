//! Back to donors: blocks that only the host tier has, as far as donors have room. The hottest go first, and none without
//! what comes before it. An engine that finds such a block does not offer it again, so nobody else would.

use std::sync::Arc;

use super::{
    blocks::{BlockId, List, Place},
    core::Core,
    evict::MOST_SLACK,
    op::{Op, Purpose},
    pipeline::Move,
    slab::Slab,
    state::State,
};

/// Blocks moved together.
const BATCH: u32 = 64;
/// Blocks looked at for that: those that cannot be moved now are few, or cold.
const LOOKED_AT: usize = 4 * BATCH as usize;

impl Core {
    /// Moves a few blocks of the host tier to donors that have room for them. Whether there may be more to move.
    pub(super) fn promote_some(self: &Arc<Self>) -> bool {
        if self.connected().is_none() {
            return false;
        }
        let mut moves = Vec::new();
        let mut moving: Vec<(BlockId, Place, Place)> = Vec::new();
        let op = {
            let mut state = self.state.lock();
            let chosen = state.worth_promoting();
            let mut slabs = Vec::new();
            let mut near = None;
            for (id, from) in chosen {
                let Some((slab, run)) = state.take_slots(List::Donor, 1, near) else {
                    break;
                };
                let to = Place {
                    slab,
                    slot: run.first,
                };
                near = Some(to);
                let memory = |place: Place| state.slabs.get(place.slab).map(|slab| &slab.memory);
                if let (Some(from_memory), Some(to_memory)) = (memory(from), memory(to)) {
                    Move::add(&mut moves, (from, from_memory), (to, to_memory));
                }
                for slab in [from.slab, to.slab] {
                    if !slabs.contains(&slab) {
                        slabs.push(slab);
                    }
                }
                state.blocks.pin(id);
                moving.push((id, from, to));
            }
            if moving.is_empty() {
                return false;
            }
            let op = Arc::new(Op::new(Purpose::Move, slabs, Vec::new()));
            state.begin_op(&op);
            op
        };
        self.issue_moves(&op, moves, |step| &step.to.store);
        let copied = op.wait().is_ok() && !op.is_poisoned();
        let promoted = self.promoted(&op, moving, copied);
        copied && promoted
    }

    /// The copies are over. Whether any block lies with a donor now.
    fn promoted(
        self: &Arc<Self>,
        op: &Arc<Op>,
        moving: Vec<(BlockId, Place, Place)>,
        copied: bool,
    ) -> bool {
        let mut ready = Vec::new();
        {
            let mut state = self.state.lock();
            for (id, from, to) in moving {
                // A block that somebody has found meanwhile may be being read where it is.
                let free = state.blocks.get(id).pins == 1;
                let stays = state.blocks.get(id).place == Some(from);
                let usable = state.slabs.get(to.slab).is_some_and(Slab::is_active);
                if copied && free && stays && usable {
                    state.relocate(id, to);
                    if let Some(host) = state.slabs.get_mut(from.slab) {
                        host.slots.give(from.slot);
                    }
                    state.counts.promoted_blocks += 1;
                    ready.push(id);
                    continue;
                }
                if let Some(slab) = state.slabs.get_mut(to.slab) {
                    slab.slots.give(to.slot);
                }
                state.blocks.unpin(id);
            }
            state.end_op(op);
        }
        let any = !ready.is_empty();
        self.publish(ready);
        any
    }
}

impl State {
    /// Blocks of the host tier that donors have room for, the hottest first, each with its place. Making room leaves some
    /// slots free: taking those would only have the next store make room again.
    fn worth_promoting(&self) -> Vec<(BlockId, Place)> {
        let slack = (self.slots(List::Donor) / 16).min(MOST_SLACK);
        let room = self.free_slots(List::Donor).saturating_sub(slack);
        let most = room.min(BATCH) as usize;
        let worth = |id: BlockId| {
            let block = self.blocks.get(id);
            let reached = self
                .blocks
                .before(id)
                .is_none_or(|before| self.place_of(before).is_some());
            let free = block.pins == 0 && !block.stray && reached;
            Some((id, self.place_of(id).filter(|_| free)?.0))
        };
        let newest = self.blocks.newest(List::Host);
        let looked_at = newest.take(LOOKED_AT);
        looked_at.filter_map(worth).take(most).collect()
    }
}
