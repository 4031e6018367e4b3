//! A donor: its regions, and whom it speaks to.

use std::{
    mem,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::DeviceUuid;

use super::{
    DonorStatus,
    region::{Known, Phase, Region, Source},
    state::{State, Task},
};
use crate::{
    device::DeviceLayer,
    latency::Latency,
    session::{Observer, Orphan, Session},
};

pub(super) struct Core {
    pub(super) session: Session,
    pub(super) layer: Arc<dyn DeviceLayer>,
    pub(super) device: DeviceUuid,
    /// See [`DonorConfig::drain`](super::DonorConfig::drain).
    pub(super) drain: Duration,
    pub(super) source: Source,
    pub(super) state: Mutex<State>,
    pub(super) returned: Condvar,
    tasks: mpsc::Sender<Task>,
}

impl Core {
    pub(super) fn new(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        device: DeviceUuid,
        drain: Duration,
        source: Source,
    ) -> (Arc<Self>, mpsc::Receiver<Task>) {
        let (tasks, inbox) = mpsc::channel();
        let core = Arc::new(Self {
            session,
            layer,
            device,
            drain,
            source,
            state: Mutex::new(State::new()),
            returned: Condvar::new(),
            tasks,
        });
        let observer: Arc<dyn Observer> = Arc::clone(&core) as _;
        core.session.observe(&observer);
        // It is told of connections from the next one on. Nothing was offered on this one or before it.
        let epoch = core.session.epoch();
        let mut state = core.state.lock();
        state.connection = state.connection.max(epoch);
        drop(state);
        (core, inbox)
    }

    pub(super) fn tell(&self, task: Task) {
        // A thread that is gone means that the donor is closing.
        let _ = self.tasks.send(task);
    }

    pub(super) fn status(&self) -> DonorStatus {
        let state = self.state.lock();
        let mut status = DonorStatus {
            returned: state.returned,
            give_back: Latency::from(&state.give_back),
            scrubbed: state.scrubbed,
            failed_scrubs: state.failed_scrubs,
            asked_bytes: state.asked_bytes(),
            target_bytes: state.target.as_ref().map_or(0, |target| target.bytes),
            ..DonorStatus::default()
        };
        for region in state.regions.values() {
            let bytes = region.memory.bytes();
            match region.phase {
                Phase::Offered => {
                    status.offered_bytes += bytes;
                    if region.unmappable_by > 0 {
                        status.unmappable_bytes += bytes;
                    }
                    if !region.confirmed {
                        status.unconfirmed_bytes += bytes;
                    }
                }
                Phase::Withdrawing { .. } => status.withdrawing_bytes += bytes,
                Phase::Stranded => status.stranded_bytes += bytes,
            }
        }
        status
    }

    /// Waits for all that was asked back and can come.
    pub(super) fn wait_returned(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        let all_back = |state: &State| {
            let mut regions = state.regions.values();
            state.freeing == 0 && !regions.any(Region::may_be_on_its_way_back)
        };
        while !all_back(&state) {
            if (self.returned.wait_until(&mut state, deadline)).timed_out() {
                return all_back(&state);
            }
        }
        true
    }
}

/// What the broker may still lend is the session's to see to: it has it withdrawn, and keeps the memory until it is back.
/// An engine's pool is kept for as long as the process runs, since its borrowers may be writing to it.
impl Drop for Core {
    fn drop(&mut self) {
        let regions = mem::take(&mut self.state.get_mut().regions);
        let mut orphans = Vec::new();
        for region in regions.into_values() {
            if region.known == Known::No {
                continue;
            }
            let memory = match self.source {
                Source::Allocations { .. } => Some(region.memory),
                Source::Pool => {
                    mem::forget(region.memory);
                    None
                }
            };
            if region.phase != Phase::Stranded {
                orphans.push(Orphan {
                    region: region.id,
                    memory,
                    known: region.known == Known::Yes,
                    drain: self.drain,
                });
            }
        }
        self.session.adopt(orphans);
    }
}
