//! A donor's regions, and what the broker says about them.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::{DeviceUuid, HandleKind, RegionId};
use tonic::Code;
use tracing::{debug, error, warn};

use super::{
    DonorStatus,
    region::{Phase, Region},
    scrub::Scrubs,
    withdrawal::Asking,
};
use crate::{
    Error, Result,
    device::DeviceLayer,
    latency::Latency,
    session::{Connected, Observer, Scrub, Session},
};

/// How often offers and withdrawals that failed on the way are made again.
const TICK: Duration = Duration::from_millis(200);

/// What the donor's thread is told.
#[derive(Debug)]
pub(super) enum Task {
    Connected(Connected),
    Returned(RegionId),
    Scrub(Scrub),
    /// Regions were added or asked back.
    Tell,
    Stop,
}

/// Where regions' memory comes from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// An allocation for each, which is freed when it comes back.
    Allocations {
        slab_bytes: u64,
        handle: Option<HandleKind>,
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
    source: Source,
    pub(super) state: Mutex<State>,
    pub(super) returned: Condvar,
    tasks: mpsc::Sender<Task>,
}

pub(super) struct State {
    pub(super) regions: HashMap<RegionId, Region>,
    /// When bytes were last asked for: a region may come back before the answer says which.
    pub(super) asked: Option<Instant>,
    pub(super) asking: Vec<Asking>,
    pub(super) give_back: Histogram<u64>,
    pub(super) returned: u64,
    /// Regions that are this donor's own again, and whose memory is being freed.
    pub(super) freeing: u64,
    pub(super) scrubbed: u64,
    pub(super) failed_scrubs: u64,
}

/// Called on the session's thread: passes everything on.
impl Observer for Core {
    fn connected(&self, connected: &Connected) {
        self.tell(Task::Connected(connected.clone()));
    }

    fn returned(&self, region: RegionId) {
        self.tell(Task::Returned(region));
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
        let state = State {
            regions: HashMap::new(),
            asked: None,
            asking: Vec::new(),
            // One microsecond to an hour.
            give_back: Histogram::new_with_max(3_600_000_000, 3)
                .expect("constants that hdrhistogram accepts"),
            returned: 0,
            freeing: 0,
            scrubbed: 0,
            failed_scrubs: 0,
        };
        let core = Self {
            session,
            layer,
            device,
            drain,
            source,
            state: Mutex::new(state),
            returned: Condvar::new(),
            tasks,
        };
        (Arc::new(core), inbox)
    }

    pub(super) fn tell(&self, task: Task) {
        // A thread that is gone means that the donor is closing.
        let _ = self.tasks.send(task);
    }

    /// The donor's thread.
    pub(super) fn work(&self, inbox: &mpsc::Receiver<Task>) {
        let mut scrubs = Scrubs::default();
        let mut ticked = Instant::now();
        loop {
            let tick = TICK.saturating_sub(ticked.elapsed());
            let pause = scrubs.pause().map_or(tick, |pause| pause.min(tick));
            match inbox.recv_timeout(pause) {
                Ok(Task::Connected(connected)) => self.after_connection(&connected),
                Ok(Task::Returned(region)) => self.take_back(region),
                Ok(Task::Scrub(scrub)) => scrubs.ask(self, &scrub),
                Ok(Task::Tell) => self.tell_again(),
                Ok(Task::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            scrubs.advance(self);
            if ticked.elapsed() >= TICK {
                self.tell_again();
                ticked = Instant::now();
            }
        }
    }

    /// Tells the broker what it has not heard. What is asked back comes first: somebody waits for it.
    fn tell_again(&self) {
        self.withdraw_unheard();
        self.offer_unconfirmed();
    }

    /// Allocates one slab and offers it.
    pub(super) fn offer_one(&self, slab_bytes: u64, handle: Option<HandleKind>) -> Result<()> {
        let best = || self.layer.handle_kinds().first().copied();
        let kind = handle.or_else(best).ok_or_else(|| {
            let problem = format!("the {} backend exports nothing", self.layer.name());
            Error::config("device", problem)
        })?;
        let memory = self.layer.allocate(&self.device, slab_bytes, kind)?;
        let region = Region::new(memory, self.session.epoch());
        let id = region.id;
        // Known before it is offered, so that it can come back at any time.
        self.state.lock().regions.insert(id, region);
        match self.offer(id) {
            // Perhaps it is offered: it must stay, and is offered again when the broker is back.
            Err(Error::Deadline { .. }) | Ok(()) => Ok(()),
            Err(error) => {
                self.state.lock().regions.remove(&id);
                Err(error)
            }
        }
    }

    pub(super) fn offer(&self, id: RegionId) -> Result<()> {
        let (offer, memory, heard_before) = {
            let mut state = self.state.lock();
            let Some(region) = state.regions.get_mut(&id) else {
                return Ok(());
            };
            let heard_before = std::mem::replace(&mut region.maybe_known, true);
            (region.offer(), region.memory.clone(), heard_before)
        };
        let export = self.layer.export(&memory)?;
        let answer = self.session.offer(offer, &export).wait();
        if let Some(region) = self.state.lock().regions.get_mut(&id) {
            region.confirmed |= answer.is_ok();
            // Refused at its first offer, it is not known now either.
            region.maybe_known = heard_before || !matches!(answer, Err(Error::Refused { .. }));
        }
        answer?;
        debug!(region = %id, "region offered");
        Ok(())
    }

    fn after_connection(&self, connected: &Connected) {
        if connected.replaced {
            self.start_over(connected.epoch);
            return;
        }
        let mut gone = Vec::new();
        {
            let mut state = self.state.lock();
            for (id, region) in &mut state.regions {
                if region.since_epoch >= connected.epoch {
                    // Offered since: the broker's list is older.
                    continue;
                }
                let known = connected.regions.contains(id);
                match &mut region.phase {
                    Phase::Offered => region.confirmed &= known && !connected.restarted,
                    // It was returned, and the word got lost.
                    Phase::Withdrawing { .. } if !known && region.confirmed => gone.push(*id),
                    Phase::Withdrawing { heard, .. } => *heard = false,
                    Phase::Stranded => {}
                }
            }
        }
        for id in gone {
            self.take_back(id);
        }
        self.offer_unconfirmed();
        self.withdraw_unheard();
    }

    /// The broker knows nothing of what this donor offered before that connection.
    fn start_over(&self, epoch: u64) {
        match self.source {
            Source::Allocations { slab_bytes, handle } => self.replace_all(slab_bytes, handle),
            Source::Pool => {
                self.strand_before(epoch);
                self.offer_unconfirmed();
            }
        }
    }

    /// Frees everything, and offers as much anew. Safe whoever may still have the old allocations mapped, since an
    /// allocation outlives its importers' mappings.
    fn replace_all(&self, slab_bytes: u64, handle: Option<HandleKind>) {
        let old = std::mem::take(&mut self.state.lock().regions);
        let offered = (old.values())
            .filter(|region| region.phase == Phase::Offered)
            .count();
        warn!(
            regions = old.len(),
            "the broker forgot this donor; offering fresh memory"
        );
        drop(old);
        self.returned.notify_all();
        for _ in 0..offered {
            if let Err(error) = self.offer_one(slab_bytes, handle) {
                warn!(%error, "a slab is not on offer again");
            }
        }
    }

    /// Nobody can tell any more who has the pool's lent parts mapped and still writes there, so they stay unused.
    fn strand_before(&self, epoch: u64) {
        let mut stranded = 0;
        for region in self.state.lock().regions.values_mut() {
            let lost = region.maybe_known && region.since_epoch < epoch;
            if lost && region.phase != Phase::Stranded {
                region.phase = Phase::Stranded;
                stranded += region.memory.bytes();
            }
        }
        if stranded > 0 {
            error!(
                bytes = stranded,
                "the broker lost its records of what this engine lent; it stays out of use until the engine restarts"
            );
        }
    }

    /// Offers what the broker has not confirmed.
    fn offer_unconfirmed(&self) {
        if !self.session.is_connected() {
            return;
        }
        let unconfirmed: Vec<RegionId> = (self.state.lock().regions.values())
            .filter(|region| region.phase == Phase::Offered && !region.confirmed)
            .map(|region| region.id)
            .collect();
        for id in unconfirmed {
            match self.offer(id) {
                Ok(()) => {}
                Err(error) if is_refused(&error, Code::FailedPrecondition) => {
                    debug!(%error, region = %id, "the broker takes it for given back");
                    self.mark_withdrawing(&[id], Instant::now(), false);
                    self.withdraw_these(vec![id]);
                }
                Err(error) => debug!(%error, region = %id, "not offered again yet"),
            }
        }
    }

    pub(super) fn status(&self) -> DonorStatus {
        let state = self.state.lock();
        let mut status = DonorStatus {
            returned: state.returned,
            give_back: Latency::from(&state.give_back),
            scrubbed: state.scrubbed,
            failed_scrubs: state.failed_scrubs,
            ..DonorStatus::default()
        };
        for region in state.regions.values() {
            match region.phase {
                Phase::Offered => status.offered_bytes += region.memory.bytes(),
                Phase::Withdrawing { .. } => status.withdrawing_bytes += region.memory.bytes(),
                Phase::Stranded => status.stranded_bytes += region.memory.bytes(),
            }
        }
        status
    }

    /// Waits for all that was asked back and can come.
    pub(super) fn wait_returned(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        let all_back = |state: &State| {
            state.freeing == 0
                && !(state.regions.values())
                    .any(|region| matches!(region.phase, Phase::Withdrawing { .. }))
        };
        while !all_back(&state) {
            if (self.returned.wait_until(&mut state, deadline)).timed_out() {
                return all_back(&state);
            }
        }
        true
    }
}

pub(super) fn is_refused(error: &Error, code: Code) -> bool {
    matches!(error, Error::Refused { status, .. } if status.code() == code)
}
