//! What the parts of this room share: its settings, its state, and the way to its threads.

use std::{
    fmt,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    time::Instant,
};

use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::{DeviceUuid, Hold, LeaseClass, LeaseId, Medium};

use super::{
    mapping::Mappings,
    slabs::{Flight, Slab},
    state::{Counts, Registering, State},
};
use crate::{
    device::DeviceLayer,
    session::{Demand, Session},
    transfer::{AreaId, BlockArea, Routes},
};

/// What is leased, and for whom.
#[derive(Clone, Debug)]
pub(crate) struct LeaseSettings {
    pub(crate) namespace: String,
    /// The device whose copies touch the slabs.
    pub(crate) device: DeviceUuid,
    /// Bytes of one block in each layer.
    pub(crate) layer_bytes: Vec<u64>,
    /// The most HBM that is leased, bytes.
    pub(crate) max_bytes: u64,
    /// The most host memory of donors that is leased where HBM falls short, bytes.
    pub(crate) max_host_bytes: u64,
    /// How much is asked for at a time, bytes.
    pub(crate) step_bytes: u64,
    /// What for.
    pub(crate) class: LeaseClass,
    /// What borrowers have left that are gone is taken over.
    pub(crate) inherit: bool,
}

impl LeaseSettings {
    pub(super) fn block_bytes(&self) -> u64 {
        self.layer_bytes.iter().sum()
    }

    /// The most that is leased of a kind of memory, bytes.
    pub(super) fn most(&self, medium: Medium) -> u64 {
        match medium {
            Medium::Hbm => self.max_bytes,
            Medium::Host => self.max_host_bytes,
        }
    }

    /// A demand for so many bytes of HBM, and so many of host memory.
    pub(super) fn demand(&self, bytes: u64, host_bytes: u64) -> Demand {
        Demand {
            namespace: self.namespace.clone(),
            device: self.device.clone(),
            bytes,
            block_bytes: self.block_bytes(),
            class: self.class,
            host_bytes,
        }
    }
}

/// What the leasing thread is asked to do.
#[derive(Debug)]
pub(super) enum GrowthTask {
    /// The holder is short of room.
    Grow,
    /// Lease up to this many bytes in all, and say how many there are.
    Reserve {
        bytes: u64,
        reply: mpsc::SyncSender<u64>,
    },
    /// Open a replica's lease for reading.
    Open(LeaseId),
    Stop,
}

/// What the draining thread is asked to do.
#[derive(Debug)]
pub(super) enum RecallTask {
    /// Let go of a slab that is closed.
    LetGo {
        slab: AreaId,
        /// It was asked back: a revoked lease is acknowledged in the end, another one released.
        revoked: bool,
    },
    /// Let go of everything, and end.
    Close,
}

/// The receiving ends of the threads.
#[derive(Debug)]
pub(crate) struct Inboxes {
    pub(super) tasks: Receiver<GrowthTask>,
    pub(super) recalls: Receiver<RecallTask>,
}

/// Leases and what is mapped of them.
pub(crate) struct Leases {
    pub(super) session: Option<Session>,
    pub(super) layer: Arc<dyn DeviceLayer>,
    pub(super) settings: LeaseSettings,
    pub(super) state: Mutex<State>,
    /// Replicas' leases are open now, or turned out not to be.
    pub(super) opened: Condvar,
    pub(super) mappings: Arc<Mappings>,
    pub(super) routes: Arc<Routes>,
    pub(super) tasks: Sender<GrowthTask>,
    pub(super) recalls: Sender<RecallTask>,
}

impl Leases {
    pub(crate) fn new(
        session: Option<Session>,
        layer: Arc<dyn DeviceLayer>,
        routes: Arc<Routes>,
        settings: LeaseSettings,
    ) -> (Arc<Self>, Inboxes) {
        let (tasks, task_inbox) = mpsc::channel();
        let (recalls, recall_inbox) = mpsc::channel();
        let leases = Arc::new(Self {
            session,
            layer,
            settings,
            state: Mutex::new(State::new()),
            opened: Condvar::new(),
            mappings: Arc::default(),
            routes,
            tasks,
            recalls,
        });
        let inboxes = Inboxes {
            tasks: task_inbox,
            recalls: recall_inbox,
        };
        (leases, inboxes)
    }

    /// The session, while it is connected.
    pub(super) fn connected(&self) -> Option<&Session> {
        let session = self.session.as_ref();
        session.filter(|session| session.is_connected())
    }

    /// Takes host memory of this process into the table, so that transfers are registered with it as with any slab.
    pub(crate) fn add_host(&self, area: Arc<BlockArea>) {
        let bytes = area.memory.bytes();
        (self.state.lock().slabs).insert(Slab::new(None, Hold::Own, bytes, area));
    }

    /// Holds the table while a transfer is planned.
    pub(crate) fn registering(&self) -> Registering<'_> {
        Registering(self.state.lock())
    }

    /// A transfer is known to be over.
    pub(crate) fn end(&self, flight: &Arc<Flight>) {
        let mut state = self.state.lock();
        for id in &flight.slabs {
            if let Some(slab) = state.slabs.get_mut(*id) {
                slab.end(flight);
            }
        }
    }

    /// Whether another lease of a kind of memory could be had, as far as is known here.
    pub(crate) fn may_grow(&self, medium: Medium) -> bool {
        let state = self.state.lock();
        let refused = match medium {
            Medium::Hbm => Instant::now() < state.grow_after,
            Medium::Host => state.host_refused,
        };
        self.connected().is_some() && self.room(&state, medium) > 0 && !refused
    }

    /// How much more of a kind of memory may be leased: a slab at least, or nothing. Bytes.
    pub(super) fn room(&self, state: &State, medium: Medium) -> u64 {
        let left = (self.settings.most(medium)).saturating_sub(state.leased_bytes(medium));
        let next = state.slab_bytes.of(medium).unwrap_or(1);
        let in_vain = state.asked_in_vain.of(medium);
        if left >= next && left > in_vain {
            left
        } else {
            0
        }
    }

    /// Leases more soon.
    pub(crate) fn grow_soon(&self) {
        // A thread that is gone means that the holder is closing.
        let _ = self.tasks.send(GrowthTask::Grow);
    }

    /// Leases up to `bytes` of HBM in all now; blocks. Returns the bytes held, which may be fewer.
    pub(crate) fn reserve(&self, bytes: u64) -> u64 {
        let (reply, answer) = mpsc::sync_channel(1);
        let bytes = bytes.min(self.settings.max_bytes);
        match self.tasks.send(GrowthTask::Reserve { bytes, reply }) {
            Ok(()) => answer.recv().unwrap_or(0),
            Err(_) => 0,
        }
    }

    /// Opens a replica's lease for reading in the background, if it can be read. Waits for that until `deadline`. True when it is
    /// open.
    pub(crate) fn open_by(&self, lease: LeaseId, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        let barred = state.unreadable.contains(lease, Instant::now());
        let known = state.slabs.of_lease(lease).is_some();
        if !known && !barred && state.opening.insert(lease) {
            let told = self.tasks.send(GrowthTask::Open(lease));
            if told.is_err() {
                state.opening.remove(&lease);
            }
        }
        while state.opening.contains(&lease) {
            if self.opened.wait_until(&mut state, deadline).timed_out() {
                return false;
            }
        }
        state.slabs.of_lease(lease).is_some()
    }

    /// What has become of leases, and what is held now.
    pub(crate) fn counts(&self) -> Counts {
        self.state.lock().counts()
    }
}

impl fmt::Debug for Leases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Leases({})", self.settings.namespace)
    }
}
