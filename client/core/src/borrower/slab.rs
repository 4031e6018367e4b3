//! A slab: slots for blocks in one piece of memory, leased, shared by a replica, or of the host tier.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use swiftcache_proto::domain::{Generation, LeaseId};

use super::{
    Tier,
    blocks::{BlockId, List, Place},
    op::Op,
    slots::Slots,
};
use crate::transfer::{AreaId, BlockArea};

/// A lease and which leasing of the slab it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeaseKey {
    pub(super) lease: LeaseId,
    pub(super) generation: Generation,
}

/// Whose slab it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Leased by this borrower.
    Own(LeaseKey),
    /// Leased by a replica, opened for reading.
    Shared(LeaseKey),
    /// Of the host tier.
    Host,
}

/// A revocation being obeyed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draining {
    pub(super) since: Instant,
    /// Left to move blocks away and acknowledge.
    pub(super) window: Duration,
    /// The broker does not know the lease as this session's: nobody waits for an acknowledgement, and the bytes may
    /// already be another's.
    pub(super) refused: bool,
}

impl Draining {
    /// Let go of by a borrower that closes.
    pub(super) fn now() -> Self {
        Self {
            since: Instant::now(),
            window: Duration::ZERO,
            refused: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Slab {
    pub(super) kind: Kind,
    pub(super) bytes: u64,
    pub(super) area: Arc<BlockArea>,
    /// Set: no new copy touches it.
    pub(super) draining: Option<Draining>,
    pub(super) slots: Slots,
    /// Who lies in each slot. Empty for a replica's slab.
    pub(super) occupants: Vec<Option<BlockId>>,
    pub(super) occupied: u32,
    /// Slots that readers may still be reading, and until when.
    pub(super) cooling: Vec<(Instant, u32)>,
    /// Slots whose unpublishing is not confirmed, and when to ask again.
    pub(super) unconfirmed: Vec<(Instant, u32)>,
    /// Copies that touch it.
    pub(super) ops: Vec<Arc<Op>>,
    /// When it last stopped holding any block.
    pub(super) empty_since: Instant,
}

impl Slab {
    pub(super) fn new(kind: Kind, bytes: u64, area: BlockArea) -> Self {
        let slots = match kind {
            Kind::Own(_) | Kind::Host => area.slots,
            Kind::Shared(_) => 0,
        };
        Self {
            kind,
            bytes,
            area: Arc::new(area),
            draining: None,
            slots: Slots::new(slots),
            occupants: vec![None; slots as usize],
            occupied: 0,
            cooling: Vec::new(),
            unconfirmed: Vec::new(),
            ops: Vec::new(),
            empty_since: Instant::now(),
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.draining.is_none()
    }

    pub(super) fn tier(&self) -> Tier {
        match self.kind {
            Kind::Own(_) => Tier::Donor,
            Kind::Shared(_) => Tier::Shared,
            Kind::Host => Tier::Host,
        }
    }

    /// The list that its blocks are in.
    pub(super) fn list(&self) -> List {
        match self.kind {
            Kind::Own(_) | Kind::Shared(_) => List::Donor,
            Kind::Host => List::Host,
        }
    }

    /// Its bytes, if the broker does not know its lease as this session's.
    fn refused_bytes(&self) -> u64 {
        let refused = self.draining.is_some_and(|draining| draining.refused);
        if refused { self.bytes } else { 0 }
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

    pub(super) fn end_op(&mut self, op: &Arc<Op>) {
        self.ops.retain(|other| !Arc::ptr_eq(other, op));
    }
}

/// What all slabs hold. Kept up to date, so that asking costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    /// Own leases.
    pub(super) own: u32,
    /// Their bytes.
    pub(super) own_bytes: u64,
    /// Of those, the bytes of leases that the broker does not know as this session's.
    pub(super) refused_bytes: u64,
    /// Replicas' leases.
    pub(super) shared: u32,
    /// Blocks in own leases.
    pub(super) donor_blocks: u64,
    /// Blocks in the host tier.
    pub(super) host_blocks: u64,
}

/// The slabs, by number and by lease. Costs what is held now, whatever was ever held.
#[derive(Debug, Default)]
pub(super) struct Slabs {
    table: HashMap<AreaId, Box<Slab>, RandomState>,
    by_lease: HashMap<LeaseId, AreaId, RandomState>,
    /// Own slabs, best link first; then the host tier.
    pub(super) placement: Vec<AreaId>,
    totals: Totals,
}

/// How much larger than what it holds a table may be.
const SPARE: usize = 8;
/// Tables up to this size are left alone.
const SMALL: usize = 64;

impl Slabs {
    pub(super) fn insert(&mut self, slab: Slab) -> AreaId {
        let index = slab.area.id;
        let rank = |slab: &Slab| (slab.kind == Kind::Host, slab.area.link);
        match slab.kind {
            Kind::Own(key) | Kind::Shared(key) => {
                self.by_lease.insert(key.lease, index);
            }
            Kind::Host => {}
        }
        if !matches!(slab.kind, Kind::Shared(_)) {
            let at = (self.placement)
                .partition_point(|other| self.get(*other).is_none_or(|o| rank(o) <= rank(&slab)));
            self.placement.insert(at, index);
        }
        self.totals.add(&slab);
        self.table.insert(index, Box::new(slab));
        index
    }

    pub(super) fn remove(&mut self, index: AreaId) -> Option<Box<Slab>> {
        let slab = self.table.remove(&index)?;
        if let Kind::Own(key) | Kind::Shared(key) = slab.kind {
            self.by_lease.remove(&key.lease);
        }
        self.placement.retain(|other| *other != index);
        self.totals.subtract(&slab);
        let most = SPARE * self.table.len() + SMALL;
        if self.table.capacity() > most {
            self.table.shrink_to(most / 2);
            self.by_lease.shrink_to(most / 2);
        }
        Some(slab)
    }

    pub(super) fn get(&self, index: AreaId) -> Option<&Slab> {
        self.table.get(&index).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, index: AreaId) -> Option<&mut Slab> {
        self.table.get_mut(&index).map(Box::as_mut)
    }

    /// The slab of a lease and its number.
    pub(super) fn of_lease(&self, lease: LeaseId) -> Option<(AreaId, &Slab)> {
        let index = *self.by_lease.get(&lease)?;
        Some((index, self.get(index)?))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (AreaId, &Slab)> {
        self.table.iter().map(|(index, slab)| (*index, &**slab))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (AreaId, &mut Slab)> {
        let slabs = self.table.iter_mut();
        slabs.map(|(index, slab)| (*index, &mut **slab))
    }

    /// What all slabs hold.
    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    /// A block lies in a slot from now on.
    pub(super) fn occupy(&mut self, place: Place, block: BlockId) {
        if let Some(slab) = self.table.get_mut(&place.slab) {
            slab.occupants[place.slot as usize] = Some(block);
            slab.occupied += 1;
            if let Some(blocks) = self.totals.blocks(slab.kind) {
                *blocks += 1;
            }
        }
    }

    /// The block in a slot is gone from it. The slot is not free yet.
    pub(super) fn vacate(&mut self, place: Place) {
        let Some(slab) = self.table.get_mut(&place.slab) else {
            return;
        };
        if slab.occupants[place.slot as usize].take().is_none() {
            return;
        }
        slab.occupied -= 1;
        if slab.occupied == 0 {
            slab.empty_since = Instant::now();
        }
        if let Some(blocks) = self.totals.blocks(slab.kind) {
            *blocks -= 1;
        }
    }

    /// The broker does not know a slab's lease as this session's, which is being let go of.
    pub(super) fn refuse(&mut self, index: AreaId) {
        let slab = self.table.get_mut(&index);
        if let Some(slab) = slab
            && let Some(draining) = &mut slab.draining
            && !draining.refused
        {
            draining.refused = true;
            if let Kind::Own(_) = slab.kind {
                self.totals.refused_bytes += slab.bytes;
            }
        }
    }
}

impl Totals {
    fn blocks(&mut self, kind: Kind) -> Option<&mut u64> {
        match kind {
            Kind::Own(_) => Some(&mut self.donor_blocks),
            Kind::Host => Some(&mut self.host_blocks),
            Kind::Shared(_) => None,
        }
    }

    fn add(&mut self, slab: &Slab) {
        match slab.kind {
            Kind::Own(_) => {
                self.own += 1;
                self.own_bytes += slab.bytes;
                self.refused_bytes += slab.refused_bytes();
            }
            Kind::Shared(_) => self.shared += 1,
            Kind::Host => {}
        }
        if let Some(blocks) = self.blocks(slab.kind) {
            *blocks += u64::from(slab.occupied);
        }
    }

    fn subtract(&mut self, slab: &Slab) {
        match slab.kind {
            Kind::Own(_) => {
                self.own -= 1;
                self.own_bytes -= slab.bytes;
                self.refused_bytes -= slab.refused_bytes();
            }
            Kind::Shared(_) => self.shared -= 1,
            Kind::Host => {}
        }
        if let Some(blocks) = self.blocks(slab.kind) {
            *blocks -= u64::from(slab.occupied);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use swiftcache_device::host::HostLayer;
    use swiftcache_proto::{domain::LinkKind, topology::Topology};

    use super::*;
    use crate::{
        device::{DeviceLayer, Memory},
        transfer::{Route, Routes, Source},
    };

    const SLOTS: u32 = 4;

    /// Makes slabs over one and the same memory.
    struct Maker {
        memory: Memory,
        route: Arc<Route>,
        leases: u64,
    }

    impl Maker {
        fn new() -> Self {
            let topology = Topology::load("hgx-8").unwrap();
            let device = topology.devices[0].uuid.clone();
            let layer: Arc<dyn DeviceLayer> =
                Arc::new(HostLayer::from_topology(&topology, false).unwrap());
            Self {
                memory: layer.allocate_host(&device, 4_096).unwrap(),
                route: Routes::new(layer, device).to(Source::Host).unwrap(),
                leases: 0,
            }
        }

        fn slab(&mut self, kind: u8, bytes: u64) -> Slab {
            self.leases += 1;
            let key = LeaseKey {
                lease: LeaseId(self.leases),
                generation: Generation(1),
            };
            let kind = match kind {
                0 => Kind::Shared(key),
                1 => Kind::Host,
                _ => Kind::Own(key),
            };
            let (memory, route) = (self.memory.clone(), Arc::clone(&self.route));
            let area = BlockArea::new(memory, 0, SLOTS, &[16], LinkKind::Nvlink, route);
            Slab::new(kind, bytes, area)
        }
    }

    /// What the slabs hold, counted from the ground up.
    fn counted(slabs: &Slabs) -> Totals {
        let mut totals = Totals::default();
        for (_, slab) in slabs.iter() {
            let blocks = slab.occupants.iter().flatten().count() as u64;
            match slab.kind {
                Kind::Own(_) => {
                    let refused = slab.draining.is_some_and(|draining| draining.refused);
                    totals.own += 1;
                    totals.own_bytes += slab.bytes;
                    totals.refused_bytes += if refused { slab.bytes } else { 0 };
                    totals.donor_blocks += blocks;
                }
                Kind::Shared(_) => totals.shared += 1,
                Kind::Host => totals.host_blocks += blocks,
            }
        }
        totals
    }

    proptest! {
        #[test]
        fn what_is_held_is_what_can_be_counted(
            steps in prop::collection::vec((0_u8..6, any::<u8>(), any::<u8>()), 1..200),
        ) {
            let mut maker = Maker::new();
            let mut slabs = Slabs::default();
            let mut known: Vec<AreaId> = Vec::new();
            for (step, a, b) in steps {
                let index = known.get(usize::from(a) % known.len().max(1)).copied();
                let place = index.map(|slab| Place { slab, slot: u32::from(b) % SLOTS });
                match (step, place) {
                    (0 | 1, _) => known.push(slabs.insert(maker.slab(a % 4, u64::from(b)))),
                    (2, Some(place)) => {
                        // Its number stays known: whoever has it finds nothing.
                        slabs.remove(place.slab);
                    }
                    (3, Some(place)) => {
                        let slab = slabs.get(place.slab);
                        let free = slab.is_some_and(|slab| {
                            slab.occupants.get(place.slot as usize) == Some(&None)
                        });
                        if free {
                            slabs.occupy(place, BlockId(0));
                        }
                    }
                    (4, Some(place))
                        if slabs.get(place.slab).is_some_and(|slab| !slab.occupants.is_empty()) =>
                    {
                        slabs.vacate(place);
                    }
                    (_, Some(place)) => {
                        if let Some(slab) = slabs.get_mut(place.slab) {
                            slab.draining.get_or_insert(Draining {
                                since: Instant::now(),
                                window: Duration::ZERO,
                                refused: false,
                            });
                        }
                        if b % 2 == 0 {
                            slabs.refuse(place.slab);
                        }
                    }
                    _ => {}
                }
                prop_assert_eq!(slabs.totals(), counted(&slabs));
            }
            let mut numbers = known.clone();
            numbers.sort();
            numbers.dedup();
            prop_assert_eq!(numbers.len(), known.len(), "a number was used twice");
        }
    }

    #[test]
    fn slabs_cost_what_is_held_and_not_what_ever_was() {
        const EVER: u32 = 20_000;
        let mut maker = Maker::new();
        let mut slabs = Slabs::default();
        let kept = slabs.insert(maker.slab(2, 7));
        let many: Vec<_> = (0..EVER).map(|_| slabs.insert(maker.slab(2, 1))).collect();
        // The twin: while they are held, they have their places.
        assert!(slabs.table.capacity() > EVER as usize);
        for index in many {
            slabs.remove(index);
        }
        for _ in 0..EVER {
            let index = slabs.insert(maker.slab(2, 1));
            slabs.remove(index);
        }
        // Whoever looks at all slabs looks at so many places.
        assert!(slabs.table.capacity() <= 2 * (SPARE + SMALL));
        assert!(slabs.by_lease.capacity() <= 2 * (SPARE + SMALL));
        assert_eq!(
            slabs.iter().map(|(index, _)| index).collect::<Vec<_>>(),
            [kept]
        );
        assert_eq!(slabs.totals().own_bytes, 7);
    }
}
