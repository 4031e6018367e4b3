//! A slab as the cache sees it: slots for blocks, and who lies in each.

use std::{sync::Arc, time::Instant};

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use swiftcache_proto::domain::{Hold, LeaseId, Medium};

use super::{
    blocks::{BlockId, Place},
    slots::Slots,
    write::Write,
};
use crate::{
    leases::LeaseKey,
    transfer::{AreaId, BlockArea, RouteSet},
};

/// Slots in leased memory, a replica's or an own one, or in host memory.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) area: Arc<BlockArea>,
    pub(super) hold: Hold,
    /// The lease, if it is leased.
    pub(super) key: Option<LeaseKey>,
    pub(super) slots: Slots,
    /// Who lies in each slot. Empty for a replica's slab.
    pub(super) occupants: Vec<Option<BlockId>>,
    pub(super) occupied: u32,
    /// Slots that readers may still be reading, and until when.
    pub(super) cooling: Vec<(Instant, u32)>,
    /// Slots whose unpublishing is not confirmed, and when to ask again.
    pub(super) unconfirmed: Vec<(Instant, u32)>,
    /// What is being written to it.
    pub(super) writes: Vec<Arc<Write>>,
    /// When it last stopped holding any block.
    pub(super) empty_since: Instant,
}

impl Shelf {
    pub(super) fn new(area: Arc<BlockArea>, hold: Hold, key: Option<LeaseKey>) -> Self {
        let slots = match hold {
            Hold::Own => area.slots,
            Hold::Shared => 0,
        };
        Self {
            area,
            hold,
            key,
            slots: Slots::new(slots),
            occupants: vec![None; slots as usize],
            occupied: 0,
            cooling: Vec::new(),
            unconfirmed: Vec::new(),
            writes: Vec::new(),
            empty_since: Instant::now(),
        }
    }

    pub(super) fn medium(&self) -> Medium {
        self.area.route.medium
    }

    /// The lease, if it is one of this borrower's own.
    pub(super) fn own_lease(&self) -> Option<LeaseKey> {
        self.key.filter(|_| self.hold == Hold::Own)
    }

    /// The blocks that lie in it.
    pub(super) fn blocks(&self) -> impl Iterator<Item = BlockId> {
        // A slab of 1 GiB may have 65,536 slots. Most hold blocks from the first one on, and who asks for a slab back waits.
        let occupants = self.occupants.iter().flatten().copied();
        occupants.take(self.occupied as usize)
    }

    /// Whether it is the borrower's own host tier, of which only this borrower knows what lies where.
    pub(super) fn is_host_tier(&self) -> bool {
        self.key.is_none()
    }

    /// Whether new transfers may touch it. See [`BlockArea::is_open`].
    pub(super) fn is_open(&self) -> bool {
        self.area.is_open()
    }

    /// Whether the way to it is one of `routes`.
    pub(super) fn is_behind(&self, routes: RouteSet) -> bool {
        self.area.route.is_in(routes)
    }

    /// Gives back the slots that readers have left by now.
    pub(super) fn cool(&mut self, now: Instant) {
        let slots = &mut self.slots;
        self.cooling.retain(|(until, slot)| {
            let hot = *until > now;
            if !hot {
                slots.give(*slot);
            }
            hot
        });
    }

    /// Whether nothing lies in it, is on its way to it, or may still be read.
    pub(super) fn is_unused(&self) -> bool {
        self.occupied == 0 && self.writes.is_empty() && self.slots.free() == self.area.slots
    }
}

/// Blocks by the medium of their own tier. Kept up to date, so that asking costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BlockCounts {
    pub(super) hbm: u64,
    pub(super) host: u64,
}

impl BlockCounts {
    fn of(&mut self, medium: Medium) -> &mut u64 {
        match medium {
            Medium::Hbm => &mut self.hbm,
            Medium::Host => &mut self.host,
        }
    }
}

/// The shelves, by number and by lease. Costs what is held now, whatever was ever held.
#[derive(Debug, Default)]
pub(super) struct Shelves {
    table: HashMap<AreaId, Box<Shelf>, RandomState>,
    by_lease: HashMap<LeaseId, AreaId, RandomState>,
    /// Own ones, best link first; then host memory, of donors before the borrower's own, which nobody else can read.
    pub(super) placement: Vec<AreaId>,
    counts: BlockCounts,
}

impl Shelves {
    pub(super) fn insert(&mut self, shelf: Shelf) {
        let id = shelf.area.id;
        let rank = |shelf: &Shelf| (shelf.medium(), shelf.area.link, shelf.key.is_none());
        if let Some(key) = shelf.key {
            self.by_lease.insert(key.lease, id);
        }
        if shelf.hold == Hold::Own {
            let at = (self.placement).partition_point(|other| {
                self.get(*other)
                    .is_none_or(|other| rank(other) <= rank(&shelf))
            });
            self.placement.insert(at, id);
        }
        self.table.insert(id, Box::new(shelf));
    }

    pub(super) fn remove(&mut self, id: AreaId) -> Option<Box<Shelf>> {
        let shelf = self.table.remove(&id)?;
        if let Some(key) = shelf.key {
            self.by_lease.remove(&key.lease);
        }
        self.placement.retain(|other| *other != id);
        *self.counts.of(shelf.medium()) -= u64::from(shelf.occupied);
        let most = 8 * self.table.len() + 64;
        if self.table.capacity() > most {
            self.table.shrink_to(most / 2);
            self.by_lease.shrink_to(most / 2);
        }
        Some(shelf)
    }

    pub(super) fn get(&self, id: AreaId) -> Option<&Shelf> {
        self.table.get(&id).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, id: AreaId) -> Option<&mut Shelf> {
        self.table.get_mut(&id).map(Box::as_mut)
    }

    /// The shelf of a lease.
    pub(super) fn of_lease(&self, lease: LeaseId) -> Option<&Shelf> {
        self.get(*self.by_lease.get(&lease)?)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Shelf> {
        self.table.values().map(Box::as_ref)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Shelf> {
        self.table.values_mut().map(Box::as_mut)
    }

    /// How many blocks lie in own tiers.
    pub(super) fn counts(&self) -> BlockCounts {
        self.counts
    }

    /// How many slabs are written to.
    pub(super) fn unsettled(&self) -> u32 {
        let written = self.table.values().filter(|shelf| !shelf.writes.is_empty());
        written.count() as u32
    }

    /// A block lies in a slot from now on.
    pub(super) fn occupy(&mut self, place: Place, block: BlockId) {
        if let Some(shelf) = self.table.get_mut(&place.slab) {
            shelf.occupants[place.slot as usize] = Some(block);
            shelf.occupied += 1;
            *self.counts.of(shelf.medium()) += 1;
        }
    }

    /// The block in a slot is gone from it. The slot is not free yet.
    pub(super) fn vacate(&mut self, place: Place) {
        let Some(shelf) = self.table.get_mut(&place.slab) else {
            return;
        };
        if shelf.occupants[place.slot as usize].take().is_none() {
            return;
        }
        shelf.occupied -= 1;
        if shelf.occupied == 0 {
            shelf.empty_since = Instant::now();
        }
        *self.counts.of(shelf.medium()) -= 1;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use swiftcache_proto::domain::{Generation, LinkKind};

    use super::*;
    use crate::{
        cache::tests::{device, layer},
        transfer::Routes,
    };

    pub(in crate::cache) const SLOTS: u32 = 4;
    /// Kinds of shelves.
    const SHARED: u8 = 0;
    pub(in crate::cache) const HOST: u8 = 1;
    pub(in crate::cache) const OWN: u8 = 2;

    pub(in crate::cache) fn shelf(routes: &Routes, kind: u8, lease: u64) -> Shelf {
        let (medium, hold) = match kind {
            SHARED => (Medium::Hbm, Hold::Shared),
            HOST => (Medium::Host, Hold::Own),
            _ => (Medium::Hbm, Hold::Own),
        };
        let memory = layer().allocate_host(&device(), 4_096).unwrap();
        let route = routes.to(medium, &device()).unwrap();
        let area = BlockArea::new(memory, 0, SLOTS, &[16], LinkKind::Nvlink, route);
        let key = LeaseKey {
            lease: LeaseId(lease),
            generation: Generation(1),
        };
        Shelf::new(Arc::new(area), hold, (medium == Medium::Hbm).then_some(key))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_is_held_is_what_can_be_counted(
            steps in prop::collection::vec((0_u8..4, any::<u8>(), any::<u8>()), 1..60),
        ) {
            let routes = Routes::new(layer(), device());
            let mut shelves = Shelves::default();
            let mut known: Vec<AreaId> = Vec::new();
            for (step, a, b) in steps {
                let id = known.get(usize::from(a) % known.len().max(1)).copied();
                let place = id.map(|slab| Place { slab, slot: u32::from(b) % SLOTS });
                match (step, place) {
                    (0, _) => {
                        let shelf = shelf(&routes, a % 4, known.len() as u64);
                        known.push(shelf.area.id);
                        shelves.insert(shelf);
                    }
                    (1, Some(place)) => {
                        // Its number stays known: whoever has it finds nothing.
                        shelves.remove(place.slab);
                    }
                    (2, Some(place)) => {
                        let shelf = shelves.get(place.slab);
                        let free = shelf.is_some_and(|shelf| {
                            shelf.occupants.get(place.slot as usize) == Some(&None)
                        });
                        if free {
                            shelves.occupy(place, BlockId(0));
                        }
                    }
                    (_, Some(place))
                        if shelves.get(place.slab).is_some_and(|shelf| !shelf.occupants.is_empty()) =>
                    {
                        shelves.vacate(place);
                    }
                    _ => {}
                }
                let mut counted = BlockCounts::default();
                for shelf in shelves.iter() {
                    *counted.of(shelf.medium()) += shelf.occupants.iter().flatten().count() as u64;
                }
                prop_assert_eq!(shelves.counts(), counted);
                let media = shelves.placement.iter();
                let media: Vec<_> = media.map(|id| shelves.get(*id).map(Shelf::medium)).collect();
                prop_assert!(media.is_sorted(), "host memory comes last");
            }
        }
    }
}
