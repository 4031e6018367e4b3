//! Points in a stream.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    context::{Entered, Event},
    driver::sys,
    lane::Lane,
};
use crate::{Result, nap, stream::Completion};

/// How long a waiting thread keeps asking before it sleeps in between: most of a short copy.
const SPIN: Duration = Duration::from_micros(50);

/// A point in a stream.
pub(super) struct Point {
    lane: Arc<Lane>,
    /// The last copy before it.
    number: u64,
    /// Lies at the point or behind it. None where the driver would not take it.
    mark: Mutex<Option<Event>>,
    outcome: OnceLock<Result<()>>,
}

impl std::fmt::Debug for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "copy {} on {:?}", self.number, self.lane)
    }
}

impl Point {
    /// The point behind copy `number`, with its mark if there is one.
    pub(super) fn new(lane: &Arc<Lane>, number: u64, mark: Option<Event>) -> Self {
        Self {
            lane: Arc::clone(lane),
            number,
            mark: Mutex::new(mark),
            outcome: OnceLock::new(),
        }
    }

    /// How it ended, once that has been noticed.
    pub(super) fn noticed(&self) -> Option<Result<()>> {
        self.outcome.get().cloned()
    }

    /// Has `wait` make a stream wait for the mark, which is made now if it is missing.
    pub(super) fn with_mark(
        &self,
        entered: &Entered<'_>,
        wait: impl FnOnce(sys::CUevent) -> Result<()>,
    ) -> Result<()> {
        let mut mark = self.mark.lock();
        let event = match &mut *mark {
            Some(event) => event,
            missing => missing.insert(self.lane.mark(entered)?),
        };
        wait(event.raw())
    }
}

impl Completion for Point {
    fn outcome(&self) -> Option<Result<()>> {
        if let Some(outcome) = self.noticed() {
            return Some(outcome);
        }
        let outcome = self.lane.ask(self.number, &self.mark)?;
        Some(self.outcome.get_or_init(|| outcome).clone())
    }

    fn wait(&self) -> Result<()> {
        // The driver would keep a processor busy, and events that it sleeps for hold launches up: see `Context::event`.
        let began = Instant::now();
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            let waited = began.elapsed();
            if waited < SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(nap(waited));
            }
        }
    }
}
