//! Holds: a device's elastic donors make room for an engine that starts there, and then stay as they are.
//!
//! A hold is not in the ledger: it is short, and donors that were told keep to it while the broker restarts.

use super::event::HoldId;

/// A device's hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    pub(super) id: HoldId,
    /// What elastic donors are to leave free, bytes.
    pub(super) free_bytes: u64,
    /// When it ends, milliseconds.
    pub(super) until: u64,
}

impl Hold {
    /// Milliseconds; 0 when it is over.
    pub(super) fn left_ms(&self, now: u64) -> u32 {
        u32::try_from(self.until.saturating_sub(now)).unwrap_or(u32::MAX)
    }
}

/// The holds of all devices.
#[derive(Clone, Debug)]
pub(super) struct Holds(Vec<Option<Hold>>);

impl Holds {
    pub(super) fn new(devices: usize) -> Self {
        Self(vec![None; devices])
    }

    /// The hold of a device, over or not.
    pub(super) fn get(&self, device: usize) -> Option<Hold> {
        self.0[device]
    }

    /// The hold of a device that is not over.
    pub(super) fn lasting(&self, device: usize, now: u64) -> Option<Hold> {
        self.0[device].filter(|hold| hold.left_ms(now) > 0)
    }

    pub(super) fn set(&mut self, device: usize, hold: Hold) {
        self.0[device] = Some(hold);
    }

    pub(super) fn forget(&mut self, device: usize) {
        self.0[device] = None;
    }

    /// The devices whose holds are over.
    pub(super) fn over(&self, now: u64) -> Vec<usize> {
        let holds = (0..).zip(&self.0);
        let over = holds.filter(|(_, hold)| hold.is_some_and(|hold| hold.left_ms(now) == 0));
        over.map(|(device, _)| device).collect()
    }
}
