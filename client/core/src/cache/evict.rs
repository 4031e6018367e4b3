//! Making room: the blocks worth least go (see `value`), a sequence's last ones first; from HBM to host memory where that
//! has room, or holds colder ones.
//!
//! A slot of host memory that donors lend is free only when the broker has forgotten its block. So some are kept free, since what
//! leaves HBM cannot wait for that: see [`Core::make_room_in_host`].

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
    /// Whether so many slots of HBM are free.
    pub(super) fn has_free(&self, want: u32) -> bool {
        let state = self.state.lock();
        state.free_slots(Medium::Hbm, state.routes_up()) >= want
    }

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
        if self.leases.may_grow(Medium::Hbm) {
            self.leases.grow_soon();
            // More is on its way: what has no room for now goes to the host tier rather than in place of others.
            if state.free_slots(Medium::Host, routes) >= short {
                return;
            }
        }
        if self.leases.may_grow(Medium::Host) {
            self.leases.grow_soon();
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
        let connected = self.connected().is_some();
        let short_in_host = still_short.saturating_sub(host_free);
        for id in self::victims(&mut state, Medium::Host, short_in_host, connected) {
            room.drop_from_host(&mut state, id);
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

    /// Keeps some slots of leased host memory free, a sixteenth of them: the blocks worth least go. Their slots are free when
    /// the broker has forgotten them.
    pub(super) fn make_room_in_host(&self) {
        // Nothing goes as long as more can be leased.
        if self.connected().is_none() || self.leases.may_grow(Medium::Host) {
            return;
        }
        let mut state = self.state.lock();
        let routes = state.routes_up();
        let leased = state.shelves.placement.iter();
        let leased = leased.filter_map(|slab| state.shelves.get(*slab));
        let leased = leased.filter(|shelf| shelf.medium() == Medium::Host && !shelf.is_host_tier());
        let slots: u32 = leased.map(|shelf| shelf.area.slots).sum();
        // What was asked for before comes back soon.
        let coming: usize = (state.shelves.iter())
            .filter(|shelf| shelf.medium() == Medium::Host)
            .map(|shelf| shelf.cooling.len() + shelf.unconfirmed.len())
            .sum();
        let free = state.free_slots(Medium::Host, routes) as usize + coming;
        let short = ((slots / 16) as usize).saturating_sub(free);
        for id in victims(&mut state, Medium::Host, short as u32, true) {
            state.drop_host_block(id);
        }
        drop(state);
        self.tell_soon();
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
    /// Takes a block off its slot in HBM: to host memory, or away.
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
        self.vacate(state, from, published);
    }

    /// Evicts a block from host memory.
    fn drop_from_host(&mut self, state: &mut State, id: BlockId) {
        let published = state.blocks.get(id).published;
        if let Some(from) = state.lose(id) {
            state.counts.evicted_blocks += 1;
            self.vacate(state, from, published);
        }
    }

    fn vacate(&mut self, state: &State, from: Place, published: Published) {
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
    /// A slot of host memory for a block that was last used at `used`: a free one, or that of a colder block.
    pub(super) fn host_slot_for(&mut self, used: u64, near: Option<Place>) -> Option<Place> {
        let routes = self.routes_up();
        if let Some(place) = self.take_slot(Medium::Host, near, routes) {
            return Some(place);
        }
        // Only a slot that the broker never heard of is free at once: one of the host tier, which comes last.
        let last = self.shelves.placement.last();
        let last = last.and_then(|slab| self.shelves.get(*slab));
        if !last.is_some_and(Shelf::is_host_tier) {
            return None;
        }
        let colder = victims(self, Medium::Host, 1, false).pop()?;
        if self.blocks.worth(colder).used >= used {
            return None;
        }
        self.drop_host_block(colder);
        self.take_slot(Medium::Host, None, routes)
    }

    /// Evicts a block from host memory. Its slot is free at once if no replica can have read it.
    fn drop_host_block(&mut self, id: BlockId) {
        let published = self.blocks.get(id).published;
        if let Some(place) = self.lose(id) {
            self.retire(place, published);
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
