//! The home table: which unit is where, which places are free, which slabs are asked back, and what to move at a step boundary.

use std::{collections::BTreeMap, time::Duration};

use super::home::{Costs, Home, Landed, Move, SlabId, UnitId};
use crate::{Error, Result};

/// How often a slab may refuse a unit before it is given back as unusable.
const TRIES: u32 = 3;

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
struct Unit {
    /// Where its bytes are. A unit that is adrift has them at the end of its way too.
    home: Home,
    /// Whether its bytes matter. Others are zeroed at their new home.
    live: bool,
    /// Where it goes, as long as that is not settled.
    way: Option<Home>,
    /// Neither end of its way is mapped.
    adrift: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slab {
    /// Who is there or on the way there.
    unit: Option<UnitId>,
    /// It is to be vacated, by this time if there is a hurry.
    asked_back: Option<u64>,
    /// How often it refused a unit, one time after another.
    tries: u32,
}

const NEW_UNIT: Unit = Unit {
    home: Home::Floor,
    live: false,
    way: None,
    adrift: false,
};

/// Where the bytes of a stitched pool are.
///
/// Nothing here has a clock or does anything: calls say what happened, [`plan`](Self::plan) says what to do at a step
/// boundary, [`settle`](Self::settle) is told what came of it, and [`take_vacated`](Self::take_vacated) gives the slabs that
/// can be acknowledged.
#[derive(Debug)]
pub struct Homes {
    costs: Costs,
    units: Vec<Unit>,
    slabs: BTreeMap<SlabId, Slab>,
    pub(super) spares: Vec<Option<UnitId>>,
    /// The moves of the last plan, until they are settled.
    planned: Vec<Move>,
}

impl Homes {
    /// All units are in host memory, and hold nothing that matters.
    pub fn new(config: HomesConfig) -> Self {
        Self {
            costs: config.costs,
            units: vec![NEW_UNIT; config.units as usize],
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
    fn occupy(&mut self, place: Home, unit: Option<UnitId>) {
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
                Landed::Stayed | Landed::Later => moved.to,
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
                    Landed::Later => slab.tries,
                    Landed::Moved | Landed::Adrift => 0,
                };
                if slab.tries >= TRIES {
                    // Whoever granted it can have it back: nothing can be mapped from it.
                    slab.asked_back.get_or_insert(0);
                }
            }
        }
        Ok(())
    }

    /// What to move at this step boundary, for at most `budget`, or one move if that alone costs more. Every plan is
    /// settled before the next one.
    ///
    /// Units that are adrift come first, whatever they cost. Then come those whose slabs are asked back, by deadline. Then, if
    /// none of these is left, come units in host memory for which there is room again.
    pub fn plan(&mut self, budget: Duration) -> Vec<Move> {
        if !self.planned.is_empty() {
            // An unsettled plan holds places. Nobody moves before it is known who has them.
            return Vec::new();
        }
        let adrift: Vec<Move> = self.adrift().collect();
        if !adrift.is_empty() {
            self.planned = adrift;
            return self.planned.clone();
        }
        let mut left = budget;
        let mut leaving: Vec<(u64, UnitId)> = (self.slabs.values())
            .filter_map(|slab| Some((slab.asked_back?, slab.unit?)))
            .collect();
        leaving.sort_unstable();
        for (_, unit) in leaving {
            let to = self.room().unwrap_or(Home::Floor);
            if !self.send(unit, to, &mut left) {
                return self.planned.clone();
            }
        }
        // Whose bytes matter is read slowly as long as it stays there.
        let mut returning: Vec<(bool, UnitId)> = ((0..).map(UnitId).zip(&self.units))
            .filter(|(_, unit)| unit.home == Home::Floor && unit.way.is_none())
            .map(|(id, unit)| (!unit.live, id))
            .collect();
        returning.sort_unstable();
        for (_, unit) in returning {
            let Some(to) = self.room() else { break };
            if !self.send(unit, to, &mut left) {
                break;
            }
        }
        self.planned.clone()
    }

    /// Every unit that is mapped nowhere, as a move along its way.
    fn adrift(&self) -> impl Iterator<Item = Move> {
        let units = (0..).map(UnitId).zip(&self.units);
        units
            .filter(|(_, unit)| unit.adrift)
            .filter_map(|(id, unit)| {
                Some(Move {
                    unit: id,
                    from: unit.home,
                    to: unit.way?,
                    copies: false,
                    adrift: true,
                })
            })
    }

    /// The best free place but the floor: a leased slab that nobody wants back, or a spare one.
    fn room(&self) -> Option<Home> {
        let free = |slab: &SlabId| Home::Slab(*slab);
        let mut slabs = self.slabs.iter();
        let slab = slabs.find(|(_, slab)| slab.unit.is_none() && slab.asked_back.is_none());
        let spare = || {
            let spare = self.spares.iter().position(Option::is_none)?;
            u32::try_from(spare).ok().map(Home::Spare)
        };
        slab.map(|(slab, _)| free(slab)).or_else(spare)
    }

    /// Adds a move to the plan, unless it costs more than is left.
    fn send(&mut self, id: UnitId, to: Home, left: &mut Duration) -> bool {
        let unit = &mut self.units[id.0 as usize];
        let cost = self.costs.of(unit.home, to);
        if cost > *left && !self.planned.is_empty() {
            return false;
        }
        *left = left.saturating_sub(cost);
        unit.way = Some(to);
        self.planned.push(Move {
            unit: id,
            from: unit.home,
            to,
            copies: unit.live,
            adrift: false,
        });
        self.occupy(to, Some(id));
        true
    }

    /// Whether a plan would move anything.
    pub fn is_due(&self) -> bool {
        let leaving = |slab: &Slab| slab.asked_back.is_some() && slab.unit.is_some();
        self.is_adrift()
            || self.slabs.values().any(leaving)
            || (self.room().is_some() && self.units.iter().any(|unit| unit.home == Home::Floor))
    }

    /// Whether a unit is mapped nowhere.
    pub fn is_adrift(&self) -> bool {
        self.units.iter().any(|unit| unit.adrift)
    }

    /// There are no units any more, and no slabs.
    pub fn clear(&mut self) {
        self.units.clear();
        self.slabs.clear();
        self.spares.clear();
        self.planned.clear();
    }

    /// Who is in a slab, or on the way in or out.
    pub fn occupant(&self, slab: SlabId) -> Option<UnitId> {
        self.slabs.get(&slab)?.unit
    }

    /// Takes as many units as there are to be from now on. They are in host memory, and hold nothing that matters.
    ///
    /// # Errors
    /// When there are some already.
    pub fn add_units(&mut self, units: u32) -> Result<()> {
        if !self.units.is_empty() {
            return Err(Error::config("units", "are there already"));
        }
        self.units = vec![NEW_UNIT; units as usize];
        Ok(())
    }

    /// Takes slabs that no unit needs: they are free, and there are more than units.
    pub fn take_surplus(&mut self) -> Vec<SlabId> {
        let mut surplus = self.usable_slabs().saturating_sub(self.units.len());
        let unneeded = |_: &SlabId, slab: &mut Slab| {
            let taken = surplus > 0 && slab.unit.is_none() && slab.asked_back.is_none();
            surplus -= usize::from(taken);
            taken
        };
        self.slabs
            .extract_if(.., unneeded)
            .map(|(slab, _)| slab)
            .collect()
    }

    /// Slabs that nobody wants back.
    pub fn usable_slabs(&self) -> usize {
        (self.slabs.values())
            .filter(|slab| slab.asked_back.is_none())
            .count()
    }

    /// A move has taken so long: what later ones are expected to cost.
    pub fn learn(&mut self, moved: &Move, took: Duration) {
        self.costs.learn(moved.from, moved.to, took);
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
