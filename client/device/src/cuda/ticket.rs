//! Points in a stream, and what stays mapped until they are passed.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    context::Event,
    driver::{Code, NOT_READY, sys},
};
use crate::{Memory, Result, stream::Completion};

/// How long a waiting thread keeps asking before it sleeps in between: most of a short copy.
const SPIN: Duration = Duration::from_micros(50);
/// The longest it sleeps: what waiting may take beyond the copies.
const LONGEST_NAP: Duration = Duration::from_micros(200);

/// The memories that queued copies need, each with its latest copy.
#[derive(Default)]
pub(super) struct Holds(Mutex<Vec<(Memory, u64)>>);

impl Holds {
    pub(super) fn keep(&self, memory: &Memory, number: u64) {
        let mut held = self.0.lock();
        match held.iter_mut().find(|(held, _)| held.is(memory)) {
            Some((_, latest)) => *latest = number,
            None => held.push((memory.clone(), number)),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Lets go of what only copies up to `number` needed.
    pub(super) fn release(&self, number: u64) {
        let mut over = Vec::new();
        let mut held = self.0.lock();
        let mut index = 0;
        while let Some((_, latest)) = held.get(index) {
            if *latest <= number {
                over.push(held.swap_remove(index));
            } else {
                index += 1;
            }
        }
        // Unmapping takes its time, and must not hold up the next copy.
        drop(held);
        drop(over);
    }
}

/// A point in a stream.
pub(super) struct Point {
    event: Event,
    holds: Arc<Holds>,
    number: u64,
    outcome: OnceLock<Result<()>>,
}

impl std::fmt::Debug for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "copy {} on {}", self.number, self.event.context.uuid)
    }
}

impl Point {
    /// The point that `event` marks, behind copy `number` of the stream whose memories `holds` keeps.
    pub(super) fn new(event: Event, holds: Arc<Holds>, number: u64) -> Self {
        Self {
            event,
            holds,
            number,
            outcome: OnceLock::new(),
        }
    }

    /// For the driver.
    pub(super) fn event(&self) -> sys::CUevent {
        self.event.raw()
    }

    /// How it ended, once that has been noticed.
    pub(super) fn outcome(&self) -> Option<Result<()>> {
        self.outcome.get().cloned()
    }

    fn settle(&self, code: Code) -> Result<()> {
        let outcome = self
            .outcome
            .get_or_init(|| self.event.context.check(code, "copying"));
        if outcome.is_ok() {
            self.holds.release(self.number);
        }
        outcome.clone()
    }
}

impl Completion for Point {
    fn is_done(&self) -> Result<bool> {
        if let Some(outcome) = self.outcome.get() {
            return outcome.clone().map(|()| true);
        }
        let context = &self.event.context;
        let entered = context.enter()?;
        // SAFETY: the event is alive, recorded, and of this context.
        let code = unsafe { (entered.core().event_query)(self.event.raw()) };
        drop(entered);
        if code == NOT_READY {
            return Ok(false);
        }
        self.settle(code).map(|()| true)
    }

    fn wait(&self) -> Result<()> {
        if let Some(outcome) = self.outcome.get() {
            return outcome.clone();
        }
        // The driver would keep a processor busy, and events that it sleeps for hold launches up: see `Context::event`.
        let began = Instant::now();
        while !self.is_done()? {
            let waited = began.elapsed();
            if waited < SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep((waited / 8).min(LONGEST_NAP));
            }
        }
        Ok(())
    }
}
