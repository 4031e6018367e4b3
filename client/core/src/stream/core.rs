//! What the parts of the stitched pool share: its settings, its state, and what engines ask without a lock.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use swiftcache_proto::domain::HomeBytes;
use tracing::error;

use super::{config::StreamConfig, homes::Counts, state::State};
use crate::{
    Error, Result,
    device::{DeviceLayer, Steps},
    leases::Leases,
    session::Session,
    transfer::Route,
};

pub(super) struct Core {
    pub(super) config: StreamConfig,
    pub(super) unit_bytes: u64,
    /// Deadlines are counted from here.
    pub(super) opened: Instant,
    pub(super) session: Session,
    pub(super) layer: Arc<dyn DeviceLayer>,
    pub(super) leases: Arc<Leases>,
    /// All copies are made on its stream, one after another: a copy that is late is over before the next one into its place begins.
    pub(super) route: Arc<Route>,
    /// Taken before the leases' lock, and never while that is held.
    pub(super) state: Mutex<State>,
    /// There is something to move, or the pool is closing.
    pub(super) changed: Condvar,
    /// The engine's steps, once the pool is laid out.
    pub(super) steps: OnceLock<Arc<Steps>>,
    /// Something is to be moved. Read at each step.
    pub(super) due: AtomicBool,
    /// A unit is mapped nowhere.
    pub(super) adrift: AtomicBool,
    /// No step may begin any more: the pool is lost, or closed.
    pub(super) dead: AtomicBool,
    /// Grows when a unit has changed its home.
    pub(super) generation: AtomicU64,
}

impl Core {
    /// The engine's steps.
    ///
    /// # Errors
    /// When the pool is not laid out.
    pub(super) fn steps(&self) -> Result<&Arc<Steps>> {
        let steps = self.steps.get();
        steps.ok_or_else(|| Error::pool("it is not laid out yet"))
    }

    /// Something has happened to the state: notes whether there is something to move, and wakes the mover if there is.
    pub(super) fn note(&self, state: &MutexGuard<'_, State>) {
        let adrift = state.homes.is_adrift();
        let due = state.places.is_some() && (state.homes.is_due() || state.unfinished.is_some());
        self.adrift.store(adrift, Ordering::Release);
        self.due.store(due, Ordering::Release);
        if due || state.closing {
            self.changed.notify_all();
        }
    }

    /// Units have been laid out, or have other homes: operators see it, see `swiftcache status`.
    pub(super) fn tell_homes(&self, state: &mut State) {
        let counts = match state.places {
            Some(_) => state.homes.counts(),
            None => Counts::default(),
        };
        let bytes = |units| u64::from(units) * self.unit_bytes;
        let now = HomeBytes {
            leased: bytes(counts.in_slabs),
            spare: bytes(counts.in_spares),
            host: bytes(counts.on_floor),
        };
        let before = std::mem::replace(&mut state.told, now);
        self.session.homes(before, now);
    }

    /// The engine must not run on: no step begins from now on.
    pub(super) fn lose(&self, state: &mut State, why: impl Into<String>) {
        let why = why.into();
        error!(namespace = %self.config.namespace, why, "the stitched pool is lost");
        state.lost.get_or_insert(why);
        self.dead.store(true, Ordering::Release);
    }

    /// Why no step may begin.
    pub(super) fn death(&self) -> Error {
        match &self.state.lock().lost {
            Some(why) => Error::pool(format!("the engine must stop: {why}")),
            None => Error::pool("it is closed"),
        }
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamPool({})", self.config.namespace)
    }
}
