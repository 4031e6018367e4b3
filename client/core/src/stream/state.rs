//! What is known of a stitched pool, behind one lock. The lock is never held during a copy, a call or a remap.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Instant,
};

use hdrhistogram::Histogram;
use swiftcache_proto::domain::{HomeBytes, RegionId};

use super::{
    home::{Home, SlabId, UnitId},
    homes::Homes,
};
use crate::{
    device::Memory,
    leases::Flight,
    transfer::{AreaId, BlockArea},
};

/// Longer batches of moves count as this, microseconds: ten minutes.
const LONGEST_US: u64 = 600_000_000;
/// Regions whose slabs took no unit, remembered at a time.
const SPOILED_REMEMBERED: usize = 4_096;

/// A leased slab.
#[derive(Debug)]
pub(super) struct Leased {
    pub(super) area: Arc<BlockArea>,
    pub(super) region: RegionId,
}

/// The places of a pool that is laid out.
#[derive(Debug)]
pub(super) struct Places {
    /// Where each unit starts in the address space, bytes.
    pub(super) offsets: Vec<u64>,
    /// Each unit's own place in host memory.
    pub(super) floor: Vec<Memory>,
    /// Spare slabs of local HBM.
    pub(super) spares: Vec<Memory>,
}

/// What has happened since the pool was opened.
#[derive(Clone, Debug)]
pub(super) struct Happened {
    pub(super) moved_units: u64,
    pub(super) failed_moves: u64,
    /// How long each batch of moves took, microseconds.
    pub(super) batches: Histogram<u64>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) homes: Homes,
    pub(super) slabs: BTreeMap<SlabId, Leased>,
    pub(super) places: Option<Places>,
    /// A copy that a step did not wait for any longer. Nothing is moved before it is known to be over.
    pub(super) unfinished: Option<Arc<Flight>>,
    /// Slabs to give back, which nobody has asked for.
    pub(super) unused: Vec<AreaId>,
    /// Regions whose slabs took no unit.
    pub(super) spoiled: HashSet<RegionId>,
    /// No move is tried before.
    pub(super) quiet_until: Instant,
    /// Batches in a row that moved nothing.
    pub(super) failures: u32,
    /// Why the engine must not run on.
    pub(super) lost: Option<String>,
    pub(super) closing: bool,
    /// What the session was told of where units are.
    pub(super) told: HomeBytes,
    pub(super) happened: Happened,
}

impl State {
    pub(super) fn new(homes: Homes) -> Self {
        let batches =
            Histogram::new_with_max(LONGEST_US, 3).expect("constants that hdrhistogram accepts");
        Self {
            homes,
            slabs: BTreeMap::new(),
            places: None,
            unfinished: None,
            unused: Vec::new(),
            spoiled: HashSet::new(),
            quiet_until: Instant::now(),
            failures: 0,
            lost: None,
            closing: false,
            told: HomeBytes::default(),
            happened: Happened {
                moved_units: 0,
                failed_moves: 0,
                batches,
            },
        }
    }

    /// The memory of a unit's place, and the leased slab that it is in.
    pub(super) fn memory(&self, unit: UnitId, home: Home) -> Option<(Memory, Option<&BlockArea>)> {
        let places = self.places.as_ref()?;
        Some(match home {
            Home::Slab(slab) => {
                let area = &self.slabs.get(&slab)?.area;
                (area.memory.clone(), Some(area))
            }
            Home::Spare(spare) => (places.spares.get(spare as usize)?.clone(), None),
            Home::Floor => (places.floor.get(unit.0 as usize)?.clone(), None),
        })
    }

    /// Takes out the slabs that hold nothing and are not to be used any more. Those that the broker has not asked for took no unit:
    /// they are given back. The areas are for the caller to drop, without the lock: the last one to hold a mapping ends it.
    #[must_use]
    pub(super) fn take_vacated(&mut self) -> Vec<Leased> {
        let vacated = self.homes.take_vacated();
        let mut gone = Vec::with_capacity(vacated.len());
        for slab in vacated {
            let Some(leased) = self.slabs.remove(&slab) else {
                continue;
            };
            if leased.area.is_open() {
                if self.spoiled.len() >= SPOILED_REMEMBERED {
                    self.spoiled.clear();
                }
                self.spoiled.insert(leased.region);
                self.unused.push(leased.area.id);
            }
            gone.push(leased);
        }
        gone
    }

    /// Takes out the slabs that no unit needs, to be given back.
    #[must_use]
    pub(super) fn take_surplus(&mut self) -> Vec<Leased> {
        let surplus = self.homes.take_surplus();
        let gone: Vec<Leased> = (surplus.iter())
            .filter_map(|slab| self.slabs.remove(slab))
            .collect();
        self.unused.extend(gone.iter().map(|leased| leased.area.id));
        gone
    }

    /// Units that another slab could be used for.
    pub(super) fn missing_slabs(&self) -> usize {
        match &self.places {
            Some(places) => places
                .offsets
                .len()
                .saturating_sub(self.homes.usable_slabs()),
            None => 0,
        }
    }
}

/// The number of an area's slab in the home table.
pub(super) fn slab_id(area: AreaId) -> SlabId {
    SlabId(area.0)
}
