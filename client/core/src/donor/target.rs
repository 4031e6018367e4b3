//! What a fixed donor keeps on offer. Whatever takes a slab away from it (a refusal, a full device, a broker that restarts in
//! the middle of an offer, or loses its records) costs it the slab for a while, and never for good: the donor's thread tries
//! again, with pauses that grow.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{
    core::Core,
    region::{Phase, Source},
    state::{State, Target, Task},
};
use crate::Error;

/// The pause after the first failure. Each failure doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl State {
    /// On offer, lent or not, bytes.
    fn offered_bytes(&self) -> u64 {
        let offered = (self.regions.values()).filter(|region| region.phase == Phase::Offered);
        offered.map(|region| region.memory.bytes()).sum()
    }

    /// Whether a slab more is to be on offer.
    fn lacks_a_slab(&self) -> bool {
        let Some(target) = &self.target else {
            return false;
        };
        self.offered_bytes() + target.slab_bytes <= target.bytes
    }
}

/// When the donor's thread adds the next slab.
pub(super) struct TopUp {
    due: Instant,
    /// The pause after the next failure.
    pause: Duration,
}

impl TopUp {
    pub(super) fn new() -> Self {
        Self {
            due: Instant::now(),
            pause: FIRST_PAUSE,
        }
    }

    /// Something has changed: what failed may work now.
    pub(super) fn hasten(&mut self) {
        *self = Self::new();
    }

    /// How long the thread may sleep, if a slab is missing and may be added.
    pub(super) fn pause(&self, core: &Core) -> Option<Duration> {
        let waits = core.lacks_a_slab() && core.hindrance().is_none();
        waits.then(|| self.due.saturating_duration_since(Instant::now()))
    }

    /// Adds a slab if one is missing and it is time.
    pub(super) fn advance(&mut self, core: &Core) {
        let Source::Allocations {
            slab_bytes, handle, ..
        } = core.source
        else {
            return;
        };
        let now = Instant::now();
        if now < self.due || !core.lacks_a_slab() || core.hindrance().is_some() {
            return;
        }
        match core.offer_one(slab_bytes, handle) {
            Ok(_) => {
                self.hasten();
                core.note_progress();
            }
            Err(error) => {
                core.note_problem(&error);
                self.due = now + self.pause;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

impl Core {
    /// Sets the target, and has the thread begin.
    pub(super) fn keep(&self, bytes: u64, slab_bytes: u64) {
        self.state.lock().target = Some(Target {
            bytes: bytes / slab_bytes * slab_bytes,
            slab_bytes,
            problem: None,
        });
        self.tell(Task::Tell);
    }

    /// So many bytes less are to be on offer than are now.
    pub(super) fn keep_less(&self, bytes: u64) {
        let mut state = self.state.lock();
        let left = state.offered_bytes().saturating_sub(bytes);
        if let Some(target) = &mut state.target {
            target.bytes = target
                .bytes
                .min(left / target.slab_bytes * target.slab_bytes);
        }
    }

    fn lacks_a_slab(&self) -> bool {
        self.state.lock().lacks_a_slab()
    }

    /// Why nothing may be added now.
    fn hindrance(&self) -> Option<String> {
        if self.session.hold(&self.device).is_some() {
            let device = &self.device;
            return Some(format!("{device} is held for an engine's start"));
        }
        self.session.problem()
    }

    /// Why less is on offer than the target.
    pub(super) fn problem(&self) -> Option<String> {
        if !self.lacks_a_slab() {
            return None;
        }
        self.hindrance().or_else(|| {
            let state = self.state.lock();
            state
                .target
                .as_ref()
                .and_then(|target| target.problem.clone())
        })
    }

    /// A slab could not be added. Said once for each cause, since it is tried again and again.
    fn note_problem(&self, error: &Error) {
        let mut state = self.state.lock();
        let offered = state.offered_bytes();
        let Some(target) = &mut state.target else {
            return;
        };
        let problem = error.to_string();
        if target.problem.as_ref() != Some(&problem) {
            warn!(
                device = %self.device,
                "{offered} of {} bytes on offer; the rest is tried again: {problem}",
                target.bytes
            );
            target.problem = Some(problem);
        }
    }

    /// A slab was added.
    fn note_progress(&self) {
        let mut state = self.state.lock();
        if state.lacks_a_slab() {
            return;
        }
        if let Some(target) = &mut state.target {
            target.problem = None;
            info!(device = %self.device, bytes = target.bytes, "all of it is on offer");
        }
    }
}
