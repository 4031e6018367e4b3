//! What a stitched pool is made of: units, the places where each can be, and moves between them.

use std::time::Duration;

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

impl Home {
    /// A byte that stands for it: 0 a leased slab, 1 a spare one, 2 host memory.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Slab(_) => 0,
            Self::Spare(_) => 1,
            Self::Floor => 2,
        }
    }
}

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

    /// What is expected of units of so many bytes, before one has moved.
    pub fn expected(unit_bytes: u64) -> Self {
        let measured = Self::H200_256_MIB;
        let share = unit_bytes as f64 / f64::from(256 << 20);
        Self {
            remap: measured.remap,
            over_link: measured.over_link.mul_f64(share),
            over_host: measured.over_host.mul_f64(share),
        }
    }

    /// What a move is expected to cost. A unit whose bytes do not matter is zeroed at its new home, which costs the same.
    pub(super) fn of(&self, from: Home, to: Home) -> Duration {
        self.remap
            + match (from, to) {
                (Home::Floor, _) | (_, Home::Floor) => self.over_host,
                _ => self.over_link,
            }
    }

    /// A move has taken so long. The next ones are expected to cost something between that and what was expected before.
    pub(super) fn learn(&mut self, from: Home, to: Home, took: Duration) {
        let copy = took.saturating_sub(self.remap);
        let known = match (from, to) {
            (Home::Floor, _) | (_, Home::Floor) => &mut self.over_host,
            _ => &mut self.over_link,
        };
        *known = (*known * 3 + copy) / 4;
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
    /// It is where it was: the move failed.
    Stayed,
    /// It is where it was: the move was not tried, since the step had taken long enough.
    Later,
    /// Its bytes are at both ends, and neither is mapped.
    Adrift,
}
