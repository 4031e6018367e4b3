//! What is moved out of revoked slabs while their windows last: the hottest blocks of all of them first, to other leases
//! and the host tier.

use std::{sync::Arc, time::Instant};

use super::{
    blocks::{BlockId, List, Place},
    core::Core,
    op::{Op, Purpose},
    pipeline::Move,
    slab::{Kind, SlabIndex},
    state::{State, micros_since},
};

/// Blocks moved between two looks at the clock.
const BATCH: usize = 64;

/// Slabs being drained together.
#[derive(Debug, Default)]
pub(super) struct Rescue {
    /// Each with its deadline.
    slabs: Vec<(SlabIndex, Instant)>,
    /// Blocks still to be moved, the coldest first.
    waiting: Vec<(SlabIndex, BlockId)>,
}

impl Rescue {
    pub(super) fn is_over(&self) -> bool {
        self.slabs.is_empty()
    }
}

impl Core {
    pub(super) fn begin_rescue(
        self: &Arc<Self>,
        index: SlabIndex,
        deadline: Instant,
        rescue: &mut Rescue,
    ) {
        // What is being written becomes worth moving when it is there.
        let writes: Vec<Arc<Op>> = {
            let state = self.state.lock();
            let ops = state.slabs.get(index).map(|slab| slab.ops.as_slice());
            (ops.unwrap_or_default().iter())
                .filter(|op| op.is_write())
                .cloned()
                .collect()
        };
        for op in writes {
            if op.is_over() || Instant::now() < deadline {
                self.settle(&op);
            }
        }
        rescue.slabs.push((index, deadline));
        let state = self.state.lock();
        let occupants = state.slabs.get(index).map(|slab| slab.occupants.as_slice());
        let occupants = occupants.unwrap_or_default().iter().flatten();
        rescue.waiting.extend(occupants.map(|id| (index, *id)));
        // A block is worth no less than those that follow it, so a prefix goes before what needs it.
        rescue.waiting.sort_by_key(|(_, id)| {
            let block = state.blocks.get(*id);
            (!block.stray, block.found, block.used)
        });
    }

    /// Moves a few blocks, and lets go of the slabs that are done.
    pub(super) fn rescue_some(self: &Arc<Self>, rescue: &mut Rescue) {
        let now = Instant::now();
        let over = |slab: SlabIndex, rescue: &Rescue| {
            let mut slabs = rescue.slabs.iter();
            slabs.any(|(index, deadline)| *index == slab && now >= *deadline)
        };
        let late: Vec<_> = (rescue.slabs.iter().map(|(index, _)| *index))
            .filter(|index| over(*index, rescue))
            .collect();
        rescue.waiting.retain(|(index, _)| !late.contains(index));
        let rest = rescue.waiting.len().saturating_sub(BATCH);
        let batch: Vec<_> = rescue.waiting.drain(rest..).rev().collect();
        if !batch.is_empty() && !self.rescue_batch(&batch) {
            rescue.waiting.clear();
        }
        let waiting: Vec<_> = rescue.waiting.iter().map(|(index, _)| *index).collect();
        let done = rescue
            .slabs
            .extract_if(.., |(index, _)| !waiting.contains(index));
        for (index, _) in done.collect::<Vec<_>>() {
            let mut state = self.state.lock();
            let draining = state.slabs.get(index).and_then(|slab| slab.draining);
            if let Some(draining) = draining {
                let took = micros_since(draining.since);
                state.drain.saturating_record(took);
            }
            drop(state);
            self.let_go(index);
        }
    }

    /// Lets go of everything as it is.
    pub(super) fn abandon(self: &Arc<Self>, rescue: Rescue) {
        for (index, _) in rescue.slabs {
            self.let_go(index);
        }
    }

    /// Moves a few blocks. False when there is no more room.
    fn rescue_batch(self: &Arc<Self>, batch: &[(SlabIndex, BlockId)]) -> bool {
        let mut moves = Vec::new();
        let mut moving: Vec<(BlockId, Place)> = Vec::new();
        let mut slabs = Vec::new();
        let mut room = true;
        let op = {
            let mut state = self.state.lock();
            let mut near = None;
            for (index, id) in batch {
                let Some(from) = worth_moving(&state, *index, *id, &moving) else {
                    continue;
                };
                let used = state.blocks.get(*id).used;
                let Some(to) = place_for(&mut state, used, near) else {
                    room = false;
                    break;
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
                state.blocks.pin(*id);
                moving.push((*id, to));
            }
            let op = Arc::new(Op::new(Purpose::Move, slabs, Vec::new()));
            state.begin_op(&op);
            op
        };
        self.issue_moves(&op, moves, |step| &step.to.store);
        let copied = op.wait().is_ok() && !op.is_poisoned();
        self.rescued(&op, moving, copied);
        room && copied
    }

    fn rescued(self: &Arc<Self>, op: &Arc<Op>, moving: Vec<(BlockId, Place)>, copied: bool) {
        let mut ready = Vec::new();
        {
            let mut state = self.state.lock();
            for (id, to) in moving {
                if copied && state.blocks.get(id).place.is_some() {
                    state.relocate(id, to);
                    match state.slabs.get(to.slab).map(|slab| slab.kind) {
                        Some(Kind::Host) => state.counts.moved_to_host += 1,
                        _ => state.counts.moved_to_donor += 1,
                    }
                    ready.push(id);
                } else {
                    if let Some(slab) = state.slabs.get_mut(to.slab) {
                        slab.slots.give(to.slot);
                    }
                    state.blocks.unpin(id);
                }
            }
            state.end_op(op);
        }
        self.publish(ready);
    }
}

/// Where a block of a revoked slab lies, if anybody could find it elsewhere: with what comes before it.
fn worth_moving(
    state: &State,
    index: SlabIndex,
    id: BlockId,
    moving: &[(BlockId, Place)],
) -> Option<Place> {
    let block = state.blocks.get(id);
    let from = block.place.filter(|place| place.slab == index)?;
    let stays = |before: BlockId| {
        moving.iter().any(|(id, _)| *id == before) || state.place_of(before).is_some()
    };
    let reachable = !block.stray && state.blocks.before(id).is_none_or(stays);
    (block.ready && reachable).then_some(from)
}

/// A slot for a rescued block: a free one of another lease, else one of the host tier.
fn place_for(state: &mut State, used: u64, near: Option<Place>) -> Option<Place> {
    if let Some((slab, run)) = state.take_slots(List::Donor, 1, near) {
        let slot = run.first;
        return Some(Place { slab, slot });
    }
    state.host_slot_for(used, near)
}
