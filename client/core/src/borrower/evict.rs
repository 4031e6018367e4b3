//! Making room: the blocks worth least go (see `value`), a sequence's last ones first; from donors to the host tier
//! where that has room, or holds colder ones.

use std::sync::Arc;

use super::{
    blocks::{BlockId, List, Place, Published},
    core::Core,
    op::{Op, Purpose},
    settle::Leftover,
    slab::{Kind, LeaseKey},
    state::State,
};
use crate::transfer::{AreaId, Direction, Move, MoveLead, MoveStep, Queueing, issue_move};

/// Room is made for more blocks than asked for, a sixteenth of the slots but no more than this, so that the broker
/// is not asked for every store.
pub(super) const MOST_SLACK: u32 = 64;

/// What making room vacated.
#[derive(Debug, Default)]
struct Room {
    /// Slots whose blocks the broker never heard of.
    free: Vec<Place>,
    /// Slots that the broker must forget first.
    ask: Vec<(AreaId, LeaseKey, Vec<u32>)>,
    moves: Vec<Move>,
    moved: Vec<BlockId>,
    slabs: Vec<AreaId>,
}

impl Core {
    /// Tries to have `want` free slots. Blocks the caller for one round trip to the broker when published blocks
    /// must go.
    pub(super) fn make_room(self: &Arc<Self>, want: u32) {
        let mut state = self.state.lock();
        let routes = state.routes.up();
        let donor = state.free_slots(List::Donor, routes);
        if donor >= want {
            return;
        }
        let short = want - donor;
        if self.may_grow(&state) {
            self.grow_soon();
            // More is on its way: what has no room for now goes to the host tier rather than in place of others.
            if state.free_slots(List::Host, routes) >= short {
                return;
            }
        }
        let slack = state.slots(List::Donor, routes) / 16;
        let most = short + slack.min(MOST_SLACK);
        let victims = victims(&mut state, List::Donor, most, self.connected().is_some());
        let still_short = short.saturating_sub(victims.len() as u32);
        let mut room = Room::default();
        for id in victims {
            room.evict(&mut state, id);
        }
        let host_free = state.free_slots(List::Host, routes);
        for id in victims_for_host(&mut state, still_short.saturating_sub(host_free)) {
            state.drop_host_block(id);
        }
        let op = Op::new(Purpose::Move, room.slabs, room.moved);
        state.begin_op(&op);
        drop(state);
        self.issue_moves(&op, room.moves, MoveLead::Source);
        // Only now may the vacated slots be taken again: the copies out of them are queued before any into them.
        let mut state = self.state.lock();
        for place in room.free {
            state.retire(place, Published::No);
        }
        drop(state);
        self.tell_soon();
        if !room.ask.is_empty() {
            self.unpublish(room.ask);
        }
        if op.is_write() {
            self.leave(Leftover { op, hit: None });
        }
    }

    /// Queues copies from slab to slab.
    pub(super) fn issue_moves(&self, op: &Arc<Op>, moves: Vec<Move>, lead: MoveLead) {
        let mut queueing = Queueing::new(&op.transfer, Direction::Store);
        for step in &moves {
            let layers = &self.config.layout.layer_bytes;
            if let Err(refused) = issue_move(step, lead, layers, &mut queueing) {
                self.refused(op, &refused);
            }
        }
        // They keep their slabs mapped: whoever waits for the op counts on that being over.
        drop(moves);
        drop(queueing);
    }
}

impl Room {
    /// Takes a block off its donor slot: to the host tier, or away.
    fn evict(&mut self, state: &mut State, id: BlockId) {
        let block = state.blocks.get(id);
        let (published, used, stray) = (block.published, block.used, block.stray);
        let Some(from) = block.place else { return };
        let near = self.moves.last().and_then(last_place);
        // Nobody could find a stray there either.
        let to = (!stray).then(|| state.host_slot_for(used, near)).flatten();
        match to {
            Some(to) => {
                self.demote(state, id, from, to);
                state.counts.demoted_blocks += 1;
            }
            None => {
                state.lose(id);
                state.counts.evicted_blocks += 1;
            }
        }
        let kind = state.slabs.get(from.slab).map(|slab| slab.kind);
        match (published, kind) {
            (Published::Maybe | Published::Yes, Some(Kind::Own(key))) => self.ask(from, key),
            _ => self.free.push(from),
        }
    }

    fn demote(&mut self, state: &mut State, id: BlockId, from: Place, to: Place) {
        state.add_move(&mut self.moves, from, to);
        for index in [from.slab, to.slab] {
            if !self.slabs.contains(&index) {
                self.slabs.push(index);
            }
        }
        state.blocks.pin(id);
        state.blocks.get_mut(id).ready = false;
        state.relocate(id, to);
        self.moved.push(id);
    }

    fn ask(&mut self, place: Place, key: LeaseKey) {
        match (self.ask.iter_mut()).find(|(index, ..)| *index == place.slab) {
            Some((_, _, slots)) => slots.push(place.slot),
            None => self.ask.push((place.slab, key, vec![place.slot])),
        }
    }
}

/// Where a move's last block goes.
fn last_place(step: &Move) -> Option<Place> {
    let slab = step.to().id;
    step.last_slot().map(|slot| Place { slab, slot })
}

impl State {
    /// Adds one block's move.
    pub(super) fn add_move(&self, moves: &mut Vec<Move>, from: Place, to: Place) {
        let area = |place: Place| self.slabs.get(place.slab).map(|slab| &slab.area);
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

    /// A slot of the host tier for a block that was last used at `used`: a free one, or that of a colder block.
    pub(super) fn host_slot_for(&mut self, used: u64, near: Option<Place>) -> Option<Place> {
        let slot = |taken: (AreaId, super::slots::Run)| Place {
            slab: taken.0,
            slot: taken.1.first,
        };
        let routes = self.routes.up();
        if let Some(taken) = self.take_slots(List::Host, 1, near, routes) {
            return Some(slot(taken));
        }
        let colder = victims_for_host(self, 1).pop()?;
        if self.blocks.get(colder).used >= used {
            return None;
        }
        self.drop_host_block(colder);
        self.take_slots(List::Host, 1, None, routes).map(slot)
    }

    /// Evicts a block of the host tier, which no replica can read.
    fn drop_host_block(&mut self, id: BlockId) {
        if let Some(place) = self.lose(id) {
            self.retire(place, Published::No);
            self.counts.evicted_blocks += 1;
        }
    }
}

/// The blocks of a list that are worth least and that nobody uses. Without a broker only those it never heard of: the
/// others' slots could not be written anyway. None behind a route that is down, where nothing is stored either.
fn victims(state: &mut State, list: List, most: u32, connected: bool) -> Vec<BlockId> {
    let routes = state.routes.up();
    let State { blocks, slabs, .. } = state;
    blocks.victims(list, most as usize, |block| {
        let free_to_go = block.pins == 0 && (connected || block.published == Published::No);
        let slab = block.place.filter(|_| block.ready);
        let slab = slab.and_then(|place| slabs.get(place.slab));
        free_to_go && slab.is_some_and(|slab| slab.is_active() && slab.area.route.is_in(routes))
    })
}

fn victims_for_host(state: &mut State, most: u32) -> Vec<BlockId> {
    victims(state, List::Host, most, true)
}
