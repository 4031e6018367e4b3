//! The home table: which unit is where, which places are free, and which slabs are asked back.

use std::collections::BTreeMap;

use super::plan::{Costs, Landed, Move};
use crate::{Error, Result};

/// How often a slab may refuse a unit before it is given back as unusable.
const TRIES: u32 = 3;

/// A unit: a piece of the pool behind its local part, which keeps its address. The first is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitId(pub u32);

/// A leased slab as large as a unit, by a number that its holder gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabId(pub u64);

/// Where a unit's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Home {
    /// In a leased slab.
    Slab(SlabId),
    /// In a spare slab of local HBM, by its number.
    Spare(u32),
    /// In host memory. Every unit has its own place there, so this is never full.
    Floor,
}

/// What a stitched pool has of its own.
#[derive(Clone, Copy, Debug)]
pub struct HomesConfig {
    /// Units behind the local part. The host floor has room for all of them.
    pub units: u32,
    /// Spare slabs of local HBM.
    pub spares: u32,
    /// What moves cost.
    pub costs: Costs,
}

/// Where units are, and what is free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Units in leased slabs.
    pub in_slabs: u32,
    /// Units in spare slabs.
    pub in_spares: u32,
    /// Units in host memory.
    pub on_floor: u32,
    /// Leased slabs that hold no unit and that nobody wants back.
    pub free_slabs: u32,
    /// Slabs that are asked back and still hold a unit.
    pub to_vacate: u32,
    /// Units that are mapped nowhere. The engine must not run before there are none.
    pub adrift: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    /// Where its bytes are. A unit that is adrift has them at the end of its way too.
    pub(super) home: Home,
    /// Whether its bytes matter. Those of others need not be copied.
    pub(super) live: bool,
    /// Where it goes, as long as that is not settled.
    pub(super) way: Option<Home>,
    /// Neither end of its way is mapped.
    pub(super) adrift: bool,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slab {
    /// Who is there or on the way there.
    pub(super) unit: Option<UnitId>,
    /// It is to be vacated, by this time if there is a hurry.
    pub(super) asked_back: Option<u64>,
    /// How often it refused a unit, one time after another.
    tries: u32,
}

/// Where the bytes of a stitched pool are.
///
/// Nothing here has a clock or does anything: calls say what happened, [`plan`](Self::plan) says what to do at a step
/// boundary, [`settle`](Self::settle) is told what came of it, and [`take_vacated`](Self::take_vacated) gives the slabs that
/// can be acknowledged.
#[derive(Debug)]
pub struct Homes {
    pub(super) costs: Costs,
    pub(super) units: Vec<Unit>,
    pub(super) slabs: BTreeMap<SlabId, Slab>,
    pub(super) spares: Vec<Option<UnitId>>,
    /// The moves of the last plan, until they are settled.
    pub(super) planned: Vec<Move>,
}

impl Homes {
    /// All units are in host memory, and hold nothing that matters.
    pub fn new(config: HomesConfig) -> Self {
        let unit = Unit {
            home: Home::Floor,
            live: false,
            way: None,
            adrift: false,
        };
        Self {
            costs: config.costs,
            units: vec![unit; config.units as usize],
            slabs: BTreeMap::new(),
            spares: vec![None; config.spares as usize],
            planned: Vec::new(),
        }
    }

    /// A slab is leased, and free.
    ///
    /// # Errors
    /// When it is known already.
    pub fn granted(&mut self, slab: SlabId) -> Result<()> {
        if self.slabs.contains_key(&slab) {
            return Err(Error::config("slab", format!("{} is held already", slab.0)));
        }
        self.slabs.insert(slab, Slab::default());
        Ok(())
    }

    /// A slab is asked back. `deadline` orders those that are, in any unit; an earlier one of the same slab stays. Unknown
    /// slabs are gone already.
    pub fn asked_back(&mut self, slab: SlabId, deadline: u64) {
        if let Some(slab) = self.slabs.get_mut(&slab) {
            let sooner = slab
                .asked_back
                .map_or(deadline, |known| known.min(deadline));
            slab.asked_back = Some(sooner);
        }
    }

    /// From now on, a unit holds bytes that matter, or none.
    ///
    /// # Errors
    /// When there is no such unit, or it is on its way: bytes change between steps' plans only.
    pub fn set_live(&mut self, unit: UnitId, live: bool) -> Result<()> {
        let known = self.units.get_mut(unit.0 as usize);
        match known {
            Some(known) if known.way.is_none() || known.live == live => {
                known.live = live;
                Ok(())
            }
            Some(_) => Err(Error::config("unit", format!("{} is moving", unit.0))),
            None => Err(Error::config(
                "unit",
                format!("there is no unit {}", unit.0),
            )),
        }
    }

    /// Where a unit's bytes are; none if there is no such unit.
    pub fn home(&self, unit: UnitId) -> Option<Home> {
        self.units.get(unit.0 as usize).map(|unit| unit.home)
    }

    /// Takes the slabs that are asked back and hold nothing: nobody touches them any more, so each can be acknowledged.
    pub fn take_vacated(&mut self) -> Vec<SlabId> {
        let vacated =
            |_: &SlabId, slab: &mut Slab| slab.asked_back.is_some() && slab.unit.is_none();
        self.slabs
            .extract_if(.., vacated)
            .map(|(slab, _)| slab)
            .collect()
    }

    /// Where everything is now.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for unit in &self.units {
            match unit.home {
                Home::Slab(_) => counts.in_slabs += 1,
                Home::Spare(_) => counts.in_spares += 1,
                Home::Floor => counts.on_floor += 1,
            }
            counts.adrift += u32::from(unit.adrift);
        }
        for slab in self.slabs.values() {
            let free = slab.unit.is_none() && slab.asked_back.is_none();
            counts.free_slabs += u32::from(free);
            counts.to_vacate += u32::from(slab.unit.is_some() && slab.asked_back.is_some());
        }
        counts
    }

    /// Puts a unit into a place, or takes it out.
    pub(super) fn occupy(&mut self, place: Home, unit: Option<UnitId>) {
        match place {
            Home::Slab(slab) => {
                if let Some(slab) = self.slabs.get_mut(&slab) {
                    slab.unit = unit;
                }
            }
            Home::Spare(spare) => self.spares[spare as usize] = unit,
            // It has room for everybody.
            Home::Floor => {}
        }
    }

    /// Says what became of the moves of the last plan, in its order.
    ///
    /// # Errors
    /// When it does not fit the plan. Nothing is settled then.
    pub fn settle(&mut self, landed: &[Landed]) -> Result<()> {
        if landed.len() != self.planned.len() {
            let (told, planned) = (landed.len(), self.planned.len());
            let problem = format!("{told} were told of {planned} moves");
            return Err(Error::config("landed", problem));
        }
        for (moved, landed) in std::mem::take(&mut self.planned).into_iter().zip(landed) {
            let unit = &mut self.units[moved.unit.0 as usize];
            unit.adrift = *landed == Landed::Adrift;
            let left = match landed {
                Landed::Moved => std::mem::replace(&mut unit.home, moved.to),
                Landed::Stayed => moved.to,
                // Both places are taken until it is known which one it has.
                Landed::Adrift => continue,
            };
            unit.way = None;
            self.occupy(left, None);
            if let Home::Slab(slab) = moved.to
                && let Some(slab) = self.slabs.get_mut(&slab)
            {
                slab.tries = match landed {
                    Landed::Stayed => slab.tries + 1,
                    _ => 0,
                };
                if slab.tries >= TRIES {
                    // Whoever granted it can have it back: nothing can be mapped from it.
                    slab.asked_back.get_or_insert(0);
                }
            }
        }
        Ok(())
    }

    /// Finds what contradicts itself: a bug here.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let mut taken = std::collections::BTreeMap::new();
        for (number, unit) in (0..).map(UnitId).zip(&self.units) {
            for place in [Some(unit.home), unit.way].into_iter().flatten() {
                if place != Home::Floor {
                    assert_eq!(taken.insert(place, number), None, "{place:?} has two units");
                }
            }
            assert!(
                unit.way.is_some() || !unit.adrift,
                "{number:?} drifts nowhere"
            );
        }
        for (id, slab) in &self.slabs {
            assert_eq!(slab.unit, taken.remove(&Home::Slab(*id)), "{id:?}");
        }
        for (number, spare) in (0..).zip(&self.spares) {
            assert_eq!(*spare, taken.remove(&Home::Spare(number)), "spare {number}");
        }
        assert!(
            taken.is_empty(),
            "units in places that are not there: {taken:?}"
        );
    }
}
