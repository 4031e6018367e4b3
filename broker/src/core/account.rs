//! Where offered bytes are.

use std::ops::{AddAssign, SubAssign};

use swiftcache_proto::domain::LeaseClass;

/// Where the offered bytes of a region, a device or the node are. After every event
/// `offered = free + leased + working set + estate + draining + zombie + scrubbing`, and each is the sum over the slabs in that
/// place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// On offer, bytes.
    pub offered: u64,
    /// Held by nobody, bytes.
    pub free: u64,
    /// Leased as a cache and not revoked, bytes.
    pub leased: u64,
    /// Leased as a working set and not revoked, bytes.
    pub working_set: u64,
    /// Of borrowers that are gone, and kept for their heirs, bytes.
    pub estate: u64,
    /// Revoked and within the drain window, bytes.
    pub draining: u64,
    /// Revoked, past the drain window and still held by a live process, bytes.
    pub zombie: u64,
    /// Being zeroed for another tenant, bytes.
    pub scrubbing: u64,
}

/// Where one slab's bytes are: a column of the [`Account`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Free,
    Leased,
    WorkingSet,
    Estate,
    Draining,
    Zombie,
    Scrubbing,
}

impl Place {
    /// Where the bytes of an active lease are.
    pub(super) fn of(class: LeaseClass) -> Self {
        match class {
            LeaseClass::Cache => Self::Leased,
            LeaseClass::WorkingSet => Self::WorkingSet,
        }
    }
}

impl Account {
    pub(super) fn column(&mut self, place: Place) -> &mut u64 {
        match place {
            Place::Free => &mut self.free,
            Place::Leased => &mut self.leased,
            Place::WorkingSet => &mut self.working_set,
            Place::Estate => &mut self.estate,
            Place::Draining => &mut self.draining,
            Place::Zombie => &mut self.zombie,
            Place::Scrubbing => &mut self.scrubbing,
        }
    }

    pub(super) fn balances(&self) -> bool {
        let held = self.leased + self.working_set + self.estate + self.draining + self.zombie;
        self.offered == self.free + held + self.scrubbing
    }
}

impl AddAssign for Account {
    fn add_assign(&mut self, other: Self) {
        self.offered += other.offered;
        self.free += other.free;
        self.leased += other.leased;
        self.working_set += other.working_set;
        self.estate += other.estate;
        self.draining += other.draining;
        self.zombie += other.zombie;
        self.scrubbing += other.scrubbing;
    }
}

impl SubAssign for Account {
    fn sub_assign(&mut self, other: Self) {
        self.offered -= other.offered;
        self.free -= other.free;
        self.leased -= other.leased;
        self.working_set -= other.working_set;
        self.estate -= other.estate;
        self.draining -= other.draining;
        self.zombie -= other.zombie;
        self.scrubbing -= other.scrubbing;
    }
}
