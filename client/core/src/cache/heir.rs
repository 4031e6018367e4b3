//! What a lessee before this one has left in a slab: blocks that are whole and known to the broker, and slots that hold nothing.

use std::time::Instant;

use super::{
    blocks::{Place, Published},
    shelf::Shelf,
    state::State,
};
use crate::session::Left;

impl State {
    /// Takes a slab in, with what was left in it. Its blocks are this borrower's own from now on.
    pub(super) fn take_in(&mut self, mut shelf: Shelf, left: &Left) {
        let slab = shelf.area.id;
        let medium = shelf.medium();
        for (_, slot) in &left.blocks {
            shelf.slots.take(1, Some(*slot));
        }
        let now = Instant::now();
        if let Some(until) = left.readers_until.filter(|until| *until > now) {
            // Somebody may still read what lay in the others.
            while let Some(run) = shelf.slots.take(1, None) {
                shelf.cooling.push((until, run.first));
            }
        }
        // Blocks found here already: one of each is enough, and the broker must forget the other before its slot is written.
        for (hash, slot) in &left.blocks {
            if self.blocks.find(hash).is_some() {
                shelf.unconfirmed.push((now, *slot));
            }
        }
        self.shelves.insert(shelf);
        // The first block of a slab is used last: a block goes before those it follows, which mostly lie before it.
        for (hash, slot) in left.blocks.iter().rev() {
            if self.blocks.find(hash).is_some() {
                continue;
            }
            let place = Place { slab, slot: *slot };
            let id = self.blocks.insert(*hash, place, medium);
            self.shelves.occupy(place, id);
            self.blocks.get_mut(id).published = Published::Yes;
            self.blocks.make_ready(id);
            self.blocks.unpin(id);
            self.counts.inherited_blocks += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use swiftcache_proto::domain::{BlockHash, Medium};

    use super::*;
    use crate::{
        cache::{
            shelf::tests::{OWN, SLOTS, shelf},
            tests::{device, layer},
        },
        transfer::{RouteSet, Routes},
    };

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 16])
    }

    fn left(blocks: &[(u8, u32)], readers_until: Option<Instant>) -> Left {
        Left {
            blocks: blocks.iter().map(|(n, slot)| (hash(*n), *slot)).collect(),
            readers_until,
        }
    }

    #[test]
    fn what_was_left_is_found_in_its_place_and_goes_in_the_order_of_slots() {
        let routes = Arc::new(Routes::new(layer(), device()));
        let mut state = State::new(Arc::clone(&routes));
        state.take_in(shelf(&routes, OWN, 1), &left(&[(1, 0), (2, 2)], None));
        for (n, slot) in [(1, 0), (2, 2)] {
            let (id, _) = state.readable(&hash(n)).unwrap();
            assert_eq!(state.place_of(id).unwrap().0.slot, slot);
            assert_eq!(state.blocks.get(id).published, Published::Yes);
        }
        assert_eq!(state.free_slots(Medium::Hbm, RouteSet::ALL), SLOTS - 2);
        let victims = state.blocks.victims(Medium::Hbm, 1, |_| true);
        assert_eq!(state.blocks.hash(victims[0]), hash(2));
        assert_eq!(state.counts.inherited_blocks, 2);
    }

    #[test]
    fn slots_that_may_still_be_read_are_nobodys_and_so_is_a_block_that_is_here_twice() {
        let routes = Arc::new(Routes::new(layer(), device()));
        let mut state = State::new(Arc::clone(&routes));
        state.take_in(shelf(&routes, OWN, 1), &left(&[(1, 0)], None));
        let first = state.blocks.find(&hash(1));
        let until = Instant::now() + Duration::from_secs(1_000);
        state.take_in(
            shelf(&routes, OWN, 2),
            &left(&[(1, 1), (3, 3)], Some(until)),
        );
        assert_eq!(state.blocks.find(&hash(1)), first);
        assert!(state.readable(&hash(3)).is_some());
        let free = state.free_slots(Medium::Hbm, RouteSet::ALL);
        assert_eq!(free, SLOTS - 1, "only those of the first slab");
        let lease = swiftcache_proto::domain::LeaseId(2);
        let slab = state.shelves.of_lease(lease).unwrap().area.id;
        let shelf = state.shelves.get_mut(slab).unwrap();
        assert_eq!(
            shelf
                .unconfirmed
                .iter()
                .map(|(_, slot)| *slot)
                .collect::<Vec<_>>(),
            [1]
        );
        assert_eq!(shelf.cooling.len(), 2);
        // The twin: once nobody can read them, they are free.
        shelf.cool(until);
        assert_eq!(shelf.slots.free(), 2);
    }
}
