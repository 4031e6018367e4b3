//! What to move at a step boundary: first what must leave, then what can come back, as much as one step may cost.

use std::time::Duration;

use super::homes::{Home, Homes, SlabId, UnitId};

/// What moving one unit costs the engine's step.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Unmapping, mapping and setting access.
    pub remap: Duration,
    /// Copying between HBM of two devices, or of one.
    pub over_link: Duration,
    /// Copying to or from host memory.
    pub over_host: Duration,
}

impl Costs {
    /// 256 MiB on H200 over NVLink, as measured: docs/decisions/0024-address-spaces.md.
    pub const H200_256_MIB: Self = Self {
        remap: Duration::from_micros(200),
        over_link: Duration::from_micros(720),
        over_host: Duration::from_micros(7_900),
    };

    fn of(&self, from: Home, to: Home, copies: bool) -> Duration {
        let copy = match (from, to) {
            _ if !copies => Duration::ZERO,
            (Home::Floor, _) | (_, Home::Floor) => self.over_host,
            _ => self.over_link,
        };
        self.remap + copy
    }
}

/// A unit that changes its home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which one.
    pub unit: UnitId,
    /// Where its bytes are.
    pub from: Home,
    /// Where it is to be.
    pub to: Home,
    /// Whether its bytes are to be copied first. Those of a unit that is adrift are at both ends already.
    pub copies: bool,
    /// Nothing is mapped at its address: either end will do, and the engine waits for it.
    pub adrift: bool,
}

/// What became of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// The unit is at its new home.
    Moved,
    /// It is where it was.
    Stayed,
    /// Its bytes are at both ends, and neither is mapped.
    Adrift,
}

impl Homes {
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
        let cost = self.costs.of(unit.home, to, unit.live);
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
}
