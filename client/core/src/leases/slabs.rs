//! The slabs: which are mapped, whose they are, and what is in flight in each.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use swiftcache_proto::domain::{Generation, Hold, LeaseId, Medium};

use crate::transfer::{AreaId, BlockArea, Transfer};

/// A lease and which leasing of the slab it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeaseKey {
    pub(crate) lease: LeaseId,
    pub(crate) generation: Generation,
}

/// A transfer that is registered with every slab it touches.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    pub(super) slabs: Vec<AreaId>,
    pub(crate) transfer: Transfer,
}

/// A slab being let go of.
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
    /// Let go of because nobody here uses it any more.
    pub(super) fn now() -> Self {
        Self {
            since: Instant::now(),
            window: Duration::ZERO,
            refused: false,
        }
    }
}

impl Flight {
    /// The slabs that it touches.
    pub(crate) fn slabs(&self) -> &[AreaId] {
        &self.slabs
    }
}

#[derive(Debug)]
pub(super) struct Slab {
    /// The lease. `None`: this process's own host memory, which nobody asks back.
    pub(super) key: Option<LeaseKey>,
    pub(super) hold: Hold,
    pub(super) bytes: u64,
    pub(super) area: Arc<BlockArea>,
    /// Set: no new transfer touches it.
    pub(super) draining: Option<Draining>,
    /// What touches it.
    pub(super) flights: Vec<Arc<Flight>>,
}

impl Slab {
    pub(super) fn new(key: Option<LeaseKey>, hold: Hold, bytes: u64, area: Arc<BlockArea>) -> Self {
        Self {
            key,
            hold,
            bytes,
            area,
            draining: None,
            flights: Vec::new(),
        }
    }

    /// Whether it is a lease of this session's own.
    pub(super) fn is_own_lease(&self) -> bool {
        self.key.is_some() && self.hold == Hold::Own
    }

    /// The kind of memory that it is of.
    fn medium(&self) -> Medium {
        self.area.route.medium
    }

    /// Its bytes, if it is an own lease that the broker does not know as this session's.
    fn refused_bytes(&self) -> u64 {
        let refused = self.draining.is_some_and(|draining| draining.refused);
        if refused { self.bytes } else { 0 }
    }

    pub(super) fn end(&mut self, flight: &Arc<Flight>) {
        self.flights.retain(|other| !Arc::ptr_eq(other, flight));
    }
}

/// One for each kind of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ByMedium<T> {
    hbm: T,
    host: T,
}

impl<T: Copy> ByMedium<T> {
    pub(super) fn of(&self, medium: Medium) -> T {
        match medium {
            Medium::Hbm => self.hbm,
            Medium::Host => self.host,
        }
    }

    pub(super) fn of_mut(&mut self, medium: Medium) -> &mut T {
        match medium {
            Medium::Hbm => &mut self.hbm,
            Medium::Host => &mut self.host,
        }
    }
}

/// What slabs come to. Kept up to date, so that asking costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    /// Own leases.
    pub(super) own: u32,
    /// Their bytes.
    pub(super) own_bytes: ByMedium<u64>,
    /// Of those, the bytes of leases that the broker does not know as this session's.
    pub(super) refused_bytes: ByMedium<u64>,
    /// Of those, the bytes of leases that are not being let go of.
    pub(super) open_bytes: ByMedium<u64>,
    /// Replicas' leases.
    pub(super) shared: u32,
}

/// The slabs, by number and by lease. Costs what is held now, whatever was ever held.
#[derive(Debug, Default)]
pub(super) struct Slabs {
    table: HashMap<AreaId, Box<Slab>, RandomState>,
    by_lease: HashMap<LeaseId, AreaId, RandomState>,
    totals: Totals,
}

/// How much larger than what it holds a table may be.
const SPARE: usize = 8;
/// Tables up to this size are left alone.
const SMALL: usize = 64;

impl Slabs {
    pub(super) fn insert(&mut self, slab: Slab) {
        let id = slab.area.id;
        if let Some(key) = slab.key {
            self.by_lease.insert(key.lease, id);
        }
        self.totals.add(&slab);
        self.table.insert(id, Box::new(slab));
    }

    pub(super) fn remove(&mut self, id: AreaId) -> Option<Box<Slab>> {
        let slab = self.table.remove(&id)?;
        if let Some(key) = slab.key {
            self.by_lease.remove(&key.lease);
        }
        self.totals.subtract(&slab);
        let most = SPARE * self.table.len() + SMALL;
        if self.table.capacity() > most {
            self.table.shrink_to(most / 2);
            self.by_lease.shrink_to(most / 2);
        }
        Some(slab)
    }

    pub(super) fn get(&self, id: AreaId) -> Option<&Slab> {
        self.table.get(&id).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, id: AreaId) -> Option<&mut Slab> {
        self.table.get_mut(&id).map(Box::as_mut)
    }

    /// The slab of a lease.
    pub(super) fn of_lease(&self, lease: LeaseId) -> Option<&Slab> {
        self.get(*self.by_lease.get(&lease)?)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Slab> {
        self.table.values().map(Box::as_ref)
    }

    /// What all slabs come to.
    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    /// From here on no transfer that touches the slab begins. False when that was so before, or it is gone.
    pub(super) fn close(&mut self, id: AreaId, draining: Draining) -> bool {
        let Some(slab) = self.table.get_mut(&id) else {
            return false;
        };
        if slab.draining.is_some() {
            return false;
        }
        slab.area.set_open(false);
        slab.draining = Some(draining);
        if slab.is_own_lease() {
            *self.totals.open_bytes.of_mut(slab.medium()) -= slab.bytes;
        }
        true
    }

    /// The broker does not know the lease of a slab as this session's, which is being let go of.
    pub(super) fn refuse(&mut self, id: AreaId) {
        let Some(slab) = self.table.get_mut(&id) else {
            return;
        };
        for flight in &slab.flights {
            flight.transfer.poison();
        }
        if let Some(draining) = &mut slab.draining
            && !draining.refused
        {
            draining.refused = true;
            if slab.is_own_lease() {
                *self.totals.refused_bytes.of_mut(slab.medium()) += slab.bytes;
            }
        }
    }
}

impl Totals {
    fn add(&mut self, slab: &Slab) {
        if slab.is_own_lease() {
            self.own += 1;
            let medium = slab.medium();
            *self.own_bytes.of_mut(medium) += slab.bytes;
            *self.refused_bytes.of_mut(medium) += slab.refused_bytes();
            *self.open_bytes.of_mut(medium) += match slab.draining {
                None => slab.bytes,
                Some(_) => 0,
            };
        } else if slab.key.is_some() {
            self.shared += 1;
        }
    }

    fn subtract(&mut self, slab: &Slab) {
        let mut its = Self::default();
        its.add(slab);
        self.own -= its.own;
        for medium in [Medium::Hbm, Medium::Host] {
            *self.own_bytes.of_mut(medium) -= its.own_bytes.of(medium);
            *self.refused_bytes.of_mut(medium) -= its.refused_bytes.of(medium);
            *self.open_bytes.of_mut(medium) -= its.open_bytes.of(medium);
        }
        self.shared -= its.shared;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use swiftcache_device::{Memory, host::HostLayer};
    use swiftcache_proto::{domain::LinkKind, topology::Topology};

    use super::*;
    use crate::{
        device::DeviceLayer,
        transfer::{Route, Routes},
    };

    /// Makes slabs over one and the same memory.
    struct Maker {
        memory: Memory,
        routes: [Arc<Route>; 2],
        leases: u64,
    }

    impl Maker {
        fn new() -> Self {
            let topology = Topology::load("hgx-8").unwrap();
            let device = topology.devices[0].uuid.clone();
            let layer: Arc<dyn DeviceLayer> =
                Arc::new(HostLayer::from_topology(&topology, false).unwrap());
            let routes = Routes::new(Arc::clone(&layer), device.clone());
            let to = |medium| routes.to(medium, &device).unwrap();
            Self {
                memory: layer.allocate_host(&device, 4_096).unwrap(),
                routes: [to(Medium::Hbm), to(Medium::Host)],
                leases: 0,
            }
        }

        fn slab(&mut self, kind: u8, bytes: u64) -> Slab {
            self.leases += 1;
            let key = LeaseKey {
                lease: LeaseId(self.leases),
                generation: Generation(1),
            };
            let (key, hold) = match kind {
                0 => (Some(key), Hold::Shared),
                1 => (None, Hold::Own),
                _ => (Some(key), Hold::Own),
            };
            let route = &self.routes[(bytes % 2) as usize];
            let (memory, route) = (self.memory.clone(), Arc::clone(route));
            let area = BlockArea::new(memory, 0, 4, &[16], LinkKind::Nvlink, route);
            Slab::new(key, hold, bytes, Arc::new(area))
        }
    }

    /// What the slabs come to, counted from the ground up.
    fn counted(slabs: &Slabs) -> Totals {
        let mut totals = Totals::default();
        for slab in slabs.iter() {
            match (slab.key, slab.hold) {
                (Some(_), Hold::Own) => {
                    let refused = slab.draining.is_some_and(|draining| draining.refused);
                    totals.own += 1;
                    let medium = slab.area.route.medium;
                    *totals.own_bytes.of_mut(medium) += slab.bytes;
                    *totals.refused_bytes.of_mut(medium) += if refused { slab.bytes } else { 0 };
                    *totals.open_bytes.of_mut(medium) +=
                        if slab.area.is_open() { slab.bytes } else { 0 };
                }
                (Some(_), Hold::Shared) => totals.shared += 1,
                (None, _) => {}
            }
        }
        totals
    }

    proptest! {
        #[test]
        fn what_is_held_is_what_can_be_counted(
            steps in prop::collection::vec((0_u8..5, any::<u8>(), any::<u8>()), 1..200),
        ) {
            let mut maker = Maker::new();
            let mut slabs = Slabs::default();
            let mut known: Vec<AreaId> = Vec::new();
            for (step, a, b) in steps {
                let slab = known.get(usize::from(a) % known.len().max(1)).copied();
                match (step, slab) {
                    (0 | 1, _) => {
                        let slab = maker.slab(a % 4, u64::from(b));
                        known.push(slab.area.id);
                        slabs.insert(slab);
                    }
                    (2, Some(slab)) => {
                        // Its number stays known: whoever has it finds nothing.
                        slabs.remove(slab);
                    }
                    (_, Some(slab)) => {
                        slabs.close(slab, Draining::now());
                        if b % 2 == 0 {
                            slabs.refuse(slab);
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
        let mut insert = |slabs: &mut Slabs, bytes| {
            let slab = maker.slab(2, bytes);
            let id = slab.area.id;
            slabs.insert(slab);
            id
        };
        let kept = insert(&mut slabs, 7);
        let many: Vec<_> = (0..EVER).map(|_| insert(&mut slabs, 1)).collect();
        // The twin: while they are held, they have their places.
        assert!(slabs.table.capacity() > EVER as usize);
        for id in many {
            slabs.remove(id);
        }
        for _ in 0..EVER {
            let id = insert(&mut slabs, 1);
            slabs.remove(id);
        }
        // Whoever looks at all slabs looks at so many places.
        assert!(slabs.table.capacity() <= 2 * (SPARE + SMALL));
        assert!(slabs.by_lease.capacity() <= 2 * (SPARE + SMALL));
        assert_eq!(
            slabs.iter().map(|slab| slab.area.id).collect::<Vec<_>>(),
            [kept]
        );
        assert_eq!(slabs.totals().own_bytes.of(Medium::Host), 7);
    }
}
