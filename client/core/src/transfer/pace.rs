//! How often to ask what is not over yet.

use std::time::{Duration, Instant};

use crate::device::nap;

/// The shortest sleep: asking more often would only heat a processor.
const SHORTEST_NAP: Duration = Duration::from_micros(20);

/// A thread's pace: the longer nothing has changed, the less often it asks.
pub(crate) struct Pace {
    quiet_since: Instant,
}

impl Pace {
    pub(crate) fn start() -> Self {
        Self {
            quiet_since: Instant::now(),
        }
    }

    /// Something has changed: more may follow soon.
    pub(crate) fn go_on(&mut self) {
        self.quiet_since = Instant::now();
    }

    /// How long to sleep before asking again.
    pub(crate) fn nap(&self) -> Duration {
        nap(self.quiet_since.elapsed()).max(SHORTEST_NAP)
    }
}
