//! A donor: its regions, its thread, and what the broker says about them.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::{DeviceUuid, HandleKind, RegionId};
use tracing::warn;

use super::{
    DonorStatus,
    region::{Known, Phase, Region},
    resume::Sequel,
    scrub::Scrubs,
    target::{Target, TopUp},
    withdrawal::Asking,
};
use crate::{
    device::DeviceLayer,
    latency::Latency,
    session::{Connected, Observer, Orphan, Scrub, Session},
};

/// How often offers and withdrawals that failed on the way are made again.
const TICK: Duration = Duration::from_millis(200);

/// What the donor's thread is told.
#[derive(Debug)]
pub(super) enum Task {
    /// A connection is up, and what it says has been taken note of.
    Connected(Sequel),
    Returned(RegionId),
    Scrub(Scrub),
    /// Regions were added or asked back.
    Tell,
    Stop,
}

/// Where regions' memory comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// An allocation for each, which is freed when it comes back.
    Allocations {
        slab_bytes: u64,
        handle: Option<HandleKind>,
        /// They follow the device's idle HBM.
        elastic: bool,
    },
    /// An engine's pool, which lives on, and so do mappings of it that nobody knows of.
    Pool,
}

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

pub(super) struct State {
    pub(super) regions: HashMap<RegionId, Region>,
    /// The last connection whose list of regions was taken note of. Offers are made on no other, or a list that is older
    /// than an offer could be taken for what the broker says of it.
    pub(super) connection: u64,
    /// When bytes were last asked for: a region may come back before the answer says which.
    pub(super) asked: Option<Instant>,
    pub(super) asking: Vec<Asking>,
    pub(super) give_back: Histogram<u64>,
    pub(super) returned: u64,
    /// Regions that are this donor's own again, and whose memory is being freed.
    pub(super) freeing: usize,
    pub(super) scrubbed: u64,
    pub(super) failed_scrubs: u64,
    /// What a fixed donor keeps on offer. Nobody keeps up what a donor without a target has on offer.
    pub(super) target: Option<Target>,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            regions: HashMap::new(),
            connection: 0,
            asked: None,
            asking: Vec::new(),
            // One microsecond to an hour.
            give_back: Histogram::new_with_max(3_600_000_000, 3)
                .expect("constants that hdrhistogram accepts"),
            returned: 0,
            freeing: 0,
            scrubbed: 0,
            failed_scrubs: 0,
            target: None,
        }
    }
}

/// Called on the session's thread: takes note under a lock, and passes on what takes longer.
impl Observer for Core {
    fn regions(&self) -> Vec<RegionId> {
        self.state.lock().regions.keys().copied().collect()
    }

    fn connected(&self, connected: &Connected) {
        let sequel = self.state.lock().take_note(connected, self.source);
        self.tell(Task::Connected(sequel));
    }

    fn returned(&self, region: RegionId) {
        self.tell(Task::Returned(region));
    }

    /// The donor's owner may know why: memory of another PID namespace, a device node that a container lacks.
    fn cannot_map(&self, id: RegionId, sessions: u32) {
        let mut state = self.state.lock();
        let Some(region) = state.regions.get_mut(&id) else {
            return;
        };
        if sessions > region.unmappable_by {
            warn!(
                device = %self.device, region = %id, sessions,
                "borrowers say that they cannot map a slab; they are lent no more of it, and others are"
            );
        }
        region.unmappable_by = sessions;
    }

    fn scrub(&self, scrub: &Scrub) {
        self.tell(Task::Scrub(*scrub));
    }
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

    /// The donor's thread. Between two offers it looks whether there is something else: somebody waits for what is asked
    /// back.
    pub(super) fn work(&self, inbox: &mpsc::Receiver<Task>) {
        let mut scrubs = Scrubs::default();
        let mut top_up = TopUp::new();
        let mut due = VecDeque::new();
        let mut ticked = Instant::now();
        loop {
            let tick = match due.is_empty() {
                true => TICK.saturating_sub(ticked.elapsed()),
                false => Duration::ZERO,
            };
            let waits = [scrubs.pause(), top_up.pause(self)];
            let pause = waits.into_iter().flatten().fold(tick, Duration::min);
            let mut told = false;
            match inbox.recv_timeout(pause) {
                Ok(Task::Returned(region)) => {
                    self.take_back(region);
                    top_up.hasten();
                }
                Ok(Task::Scrub(scrub)) => scrubs.ask(self, &scrub),
                Ok(Task::Connected(sequel)) => {
                    self.follow_up(sequel, self.source);
                    top_up.hasten();
                    told = true;
                }
                Ok(Task::Tell) => {
                    top_up.hasten();
                    told = true;
                }
                Ok(Task::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => match due.pop_front() {
                    Some(region) => self.offer_again(region),
                    None => top_up.advance(self),
                },
            }
            if told || ticked.elapsed() >= TICK {
                self.withdraw_unheard();
                scrubs.clean_soiled(self);
                if told || due.is_empty() {
                    due = self.due_offers();
                }
                ticked = Instant::now();
            }
            scrubs.advance(self);
        }
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
