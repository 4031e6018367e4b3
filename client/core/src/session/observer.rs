//! What the broker says unasked.

use std::{
    collections::HashSet,
    sync::{Arc, Weak},
    time::Instant,
};

use parking_lot::Mutex;
use swiftcache_proto::domain::{DeviceUuid, Generation, LeaseId, RegionId, RevokeReason};

/// A lease to let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// The lease: this session's own, or one it reads.
    pub lease: LeaseId,
    /// Which leasing of the slab.
    pub generation: Generation,
    /// Why.
    pub reason: RevokeReason,
    /// Time left to move blocks away and acknowledge, milliseconds.
    pub drain_ms: u32,
}

/// A slab to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scrub {
    /// The region.
    pub region: RegionId,
    /// The slab in it.
    pub slab: u32,
    /// Which leasing of the slab it follows.
    pub generation: Generation,
}

/// An engine starts on a device: whoever follows the device's idle HBM makes room first, and then stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// How much of the device's HBM is to be free, bytes.
    pub free_bytes: u64,
    /// When it is over.
    pub until: Instant,
}

/// What a session has mapped, to be claimed when it resumes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Own leases.
    pub leases: Vec<LeaseId>,
    /// Foreign leases opened for reading.
    pub shared: Vec<LeaseId>,
}

/// A connection is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// Which connection it is.
    pub epoch: u64,
    /// The broker restarted since the last connection: it has no index and no handles.
    pub restarted: bool,
    /// The broker did not know the session: this is a new one, which holds nothing.
    pub replaced: bool,
    /// Leases claimed that the broker says are not held.
    pub refused: Vec<LeaseId>,
    /// Regions of this session that the broker knows.
    pub regions: Vec<RegionId>,
}

/// Told what the broker says unasked. Called on the session's thread, one call at a time and in order: every
/// method returns promptly and makes no blocking call.
pub trait Observer: Send + Sync {
    /// What is mapped now. Asked before every resumption; what is not named is given up.
    fn held(&self) -> Held {
        Held::default()
    }

    /// The regions that are this observer's, offered or not. Those of this session that the broker has and no observer
    /// names are withdrawn.
    fn regions(&self) -> Vec<RegionId> {
        Vec::new()
    }

    /// A connection is up, and calls work.
    fn connected(&self, _connected: &Connected) {}

    /// The connection is lost. Nothing held is lost with it.
    fn disconnected(&self) {}

    /// A lease must be let go of. True when it is this observer's to acknowledge. When it is nobody's, the session
    /// acknowledges it at once: an observer that still waits for the lease's grant must then never map it.
    fn revoked(&self, _revocation: &Revocation) -> bool {
        false
    }

    /// A region is the donor's own again.
    fn returned(&self, _region: RegionId) {}

    /// A slab must be zeroed; once only for each of its generations.
    fn scrub(&self, _scrub: &Scrub) {}

    /// So many sessions say that they cannot map a region. They are lent no more of it.
    fn cannot_map(&self, _region: RegionId, _sessions: u32) {}

    /// A device's hold began, changed or ended: see [`Session::hold`](super::Session::hold).
    fn hold_changed(&self, _device: &DeviceUuid) {}
}

#[derive(Default)]
pub(super) struct Observers(Mutex<Vec<Weak<dyn Observer>>>);

impl Observers {
    pub(super) fn add(&self, observer: &Arc<dyn Observer>) {
        self.0.lock().push(Arc::downgrade(observer));
    }

    /// Those still alive. Taken out of the lock, so that an observer may add another.
    pub(super) fn alive(&self) -> Vec<Arc<dyn Observer>> {
        let mut observers = self.0.lock();
        observers.retain(|observer| observer.strong_count() > 0);
        observers.iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn regions(&self) -> HashSet<RegionId> {
        let alive = self.alive().into_iter();
        alive.flat_map(|observer| observer.regions()).collect()
    }

    pub(super) fn held(&self) -> Held {
        let mut all = Held::default();
        for observer in self.alive() {
            let held = observer.held();
            all.leases.extend(held.leases);
            all.shared.extend(held.shared);
        }
        all
    }
}
