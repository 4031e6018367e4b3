//! Making room: the blocks worth least go (see `value`), a sequence's last ones first; from donors to the host tier
//! where that has room, or holds colder ones.

use std::sync::Arc;

use swiftcache_proto::domain::Medium;

use super::{
    blocks::{BlockId, Place, Published},
    core::{Core, Leftover},
    publish::Vacated,
    shelf::Shelf,
    state::State,
    write::Write,
};
use crate::{
    leases::{Flight, LeaseKey},
    transfer::{AreaId, Direction, Move, MoveLead, Queueing, issue_move},
};

/// Room is made for more blocks than asked for, a sixteenth of the slots but no more than this, so that the broker
/// is not asked for every store.
pub(super) const MOST_SLACK: u32 = 64;

/// What making room vacated.
#[derive(Debug, Default)]
struct Room {
    /// Slots whose blocks the broker never heard of.
    free: Vec<Place>,
    /// Slots that the broker must forget first.
    ask: Vec<Vacated>,
    moves: Vec<Move>,
    moved: Vec<BlockId>,
    slabs: Vec<AreaId>,
}

impl Core {
    /// Tries to have `want` free slots. Blocks the caller for one round trip to the broker when published blocks
    /// must go. The slots are [`awaited`](State::awaited), so that no promotion takes them, until the caller takes `want` off
    /// again.
    pub(super) fn make_room(self: &Arc<Self>, want: u32) {
        let mut state = self.state.lock();
        state.awaited += want;
        let routes = state.routes_up();
        let donor = state.free_slots(Medium::Hbm, routes);
        if donor >= want {
            return;
        }
        let short = want - donor;
        if self.leases.may_grow() {
            self.leases.grow_soon();
            // More is on its way: what has no room for now goes to the host tier rather than in place of others.
            if state.free_slots(Medium::Host, routes) >= short {
                return;
            }
        }
        let mut registering = self.leases.registering();
        let slack = state.slots(Medium::Hbm, routes) / 16;
        let most = short + slack.min(MOST_SLACK);
        let victims = victims(&mut state, Medium::Hbm, most, self.connected().is_some());
        let still_short = short.saturating_sub(victims.len() as u32);
        let mut room = Room::default();
        for id in victims {
            room.evict(&mut state, id);
        }
        let host_free = state.free_slots(Medium::Host, routes);
        for id in victims_for_host(&mut state, still_short.saturating_sub(host_free)) {
            state.drop_host_block(id);
        }
        let flight = registering.begin(room.slabs);
        drop(registering);
        let write = Write::new(Arc::clone(&flight), false, room.moved);
        state.begin_write(&write, flight.slabs());
        drop(state);
        self.issue_moves(&flight, room.moves, MoveLead::Source);
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
        let moved = !write.blocks.lock().is_empty();
        match moved {
            true => self.leave(Leftover::Write(write)),
            false => self.leases.end(&flight),
        }
    }

    /// Queues copies from slab to slab.
    pub(super) fn issue_moves(&self, flight: &Flight, moves: Vec<Move>, lead: MoveLead) {
        let mut queueing = Queueing::new(&flight.transfer, Direction::Store);
        for step in &moves {
            let layers = &self.config.layout.layer_bytes;
            if let Err(refused) = issue_move(step, lead, layers, &mut queueing) {
                self.refused(flight, &refused);
            }
        }
        // They keep their slabs mapped: whoever waits for the transfer counts on that being over.
        drop(moves);
        drop(queueing);
    }
}

impl Room {
    /// Takes a block off its donor slot: to the host tier, or away.
    fn evict(&mut self, state: &mut State, id: BlockId) {
        let block = state.blocks.get(id);
        let (published, place) = (block.published, block.place);
        let worth = state.blocks.worth(id);
        let (used, stray) = (worth.used, worth.stray);
        let Some(from) = place else { return };
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
        let key = state.shelves.get(from.slab).and_then(Shelf::own_lease);
        match (published, key) {
            (Published::Maybe | Published::Yes, Some(key)) => self.ask(from, key),
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
        match (self.ask.iter_mut()).find(|vacated| vacated.slab == place.slab) {
            Some(vacated) => vacated.slots.push(place.slot),
            None => self.ask.push(Vacated {
                slab: place.slab,
                key,
                slots: vec![place.slot],
            }),
        }
    }
}

/// Where a move's last block goes.
fn last_place(step: &Move) -> Option<Place> {
    let slab = step.to().id;
    step.last_slot().map(|slot| Place { slab, slot })
}

impl State {
    /// A slot of the host tier for a block that was last used at `used`: a free one, or that of a colder block.
    pub(super) fn host_slot_for(&mut self, used: u64, near: Option<Place>) -> Option<Place> {
        let routes = self.routes_up();
        if let Some(place) = self.take_slot(Medium::Host, near, routes) {
            return Some(place);
        }
        let colder = victims_for_host(self, 1).pop()?;
        if self.blocks.worth(colder).used >= used {
            return None;
        }
        self.drop_host_block(colder);
        self.take_slot(Medium::Host, None, routes)
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
fn victims(state: &mut State, medium: Medium, most: u32, connected: bool) -> Vec<BlockId> {
    let routes = state.routes_up();
    let State {
        blocks, shelves, ..
    } = state;
    blocks.victims(medium, most as usize, |block| {
        let free_to_go = block.pins == 0 && (connected || block.published == Published::No);
        let place = block.place.filter(|_| block.ready);
        let shelf = place.and_then(|place| shelves.get(place.slab));
        free_to_go && shelf.is_some_and(|shelf| shelf.is_open() && shelf.is_behind(routes))
    })
}

fn victims_for_host(state: &mut State, most: u32) -> Vec<BlockId> {
    victims(state, Medium::Host, most, true)
}
