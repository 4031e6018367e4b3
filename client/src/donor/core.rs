//! A donor's regions, and what the broker says about them.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::RegionId;
use tonic::Code;
use tracing::{debug, warn};

use super::{
    DonorConfig, DonorStatus,
    region::{Phase, Region},
    withdrawal::Asking,
};
use crate::{
    Error, Result,
    borrower::Latency,
    device::{CopyStream, DeviceLayer},
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
    Stop,
}

pub(super) struct Core {
    pub(super) session: Session,
    layer: Arc<dyn DeviceLayer>,
    pub(super) config: DonorConfig,
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
    scrubbed: u64,
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
        config: DonorConfig,
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
        };
        let core = Self {
            session,
            layer,
            config,
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
        let mut stream = None;
        loop {
            match inbox.recv_timeout(TICK) {
                Ok(Task::Connected(connected)) => self.after_connection(&connected),
                Ok(Task::Returned(region)) => self.take_back(region),
                Ok(Task::Scrub(scrub)) => self.scrub_slab(&scrub, &mut stream),
                Ok(Task::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.offer_unconfirmed();
                    self.withdraw_unheard();
                }
            }
        }
    }

    /// Takes one slab and offers it.
    pub(super) fn offer_one(&self) -> Result<()> {
        let best = || self.layer.handle_kinds().first().copied();
        let kind = self.config.handle.or_else(best).ok_or_else(|| {
            let problem = format!("the {} backend exports nothing", self.layer.name());
            Error::config("device", problem)
        })?;
        let device = &self.config.device;
        let memory = self.layer.allocate(device, self.config.slab_bytes, kind)?;
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
        let (offer, memory) = {
            let state = self.state.lock();
            let Some(region) = state.regions.get(&id) else {
                return Ok(());
            };
            (region.offer(&self.config), region.memory.clone())
        };
        let export = self.layer.export(&memory)?;
        self.session.offer(offer, &export).wait()?;
        if let Some(region) = self.state.lock().regions.get_mut(&id) {
            region.confirmed = true;
        }
        debug!(region = %id, "region offered");
        Ok(())
    }

    fn scrub_slab(&self, scrub: &Scrub, stream: &mut Option<Arc<dyn CopyStream>>) {
        let memory = {
            let mut state = self.state.lock();
            let Some(region) = state.regions.get_mut(&scrub.region) else {
                return;
            };
            region.begin_scrub(scrub).then(|| region.memory.clone())
        };
        if let Some(memory) = memory {
            let start = u64::from(scrub.slab) * self.config.slab_bytes;
            if let Err(error) = self.zero(&memory, start, stream) {
                // Unsaid, the slab stays out of other tenants' hands.
                warn!(%error, region = %scrub.region, "a slab could not be zeroed");
                return;
            }
            self.state.lock().scrubbed += 1;
        }
        self.session.scrubbed(scrub);
    }

    fn zero(
        &self,
        memory: &crate::device::Memory,
        start: u64,
        stream: &mut Option<Arc<dyn CopyStream>>,
    ) -> Result<()> {
        let stream = match stream {
            Some(stream) => stream,
            None => stream.insert(self.layer.stream(&self.config.device)?),
        };
        stream.zero(memory, start, self.config.slab_bytes)?;
        Ok(stream.record()?.wait()?)
    }

    fn after_connection(&self, connected: &Connected) {
        if connected.replaced {
            self.start_over();
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
                }
            }
        }
        for id in gone {
            self.take_back(id);
        }
        self.offer_unconfirmed();
        self.withdraw_unheard();
    }

    /// The broker knows nothing of this donor: frees everything, and offers as much anew. Safe whoever may still have
    /// the old allocations mapped, since an allocation outlives its importers' mappings.
    fn start_over(&self) {
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
            if let Err(error) = self.offer_one() {
                warn!(%error, "a slab is not on offer again");
            }
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
            ..DonorStatus::default()
        };
        for region in state.regions.values() {
            match region.phase {
                Phase::Offered => status.offered_bytes += self.config.slab_bytes,
                Phase::Withdrawing { .. } => status.withdrawing_bytes += self.config.slab_bytes,
            }
        }
        status
    }

    pub(super) fn wait_returned(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        let all_back = |state: &State| {
            state.freeing == 0
                && (state.regions.values()).all(|region| region.phase == Phase::Offered)
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
