//! Calls under way on a connection: one that has had none for long is closed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// The calls of a connection that are under way. Clones count together.
#[derive(Clone, Debug)]
pub struct Calls(Arc<Mutex<UnderWay>>);

#[derive(Debug)]
struct UnderWay {
    calls: usize,
    /// When the last one ended.
    since: Instant,
}

impl Default for Calls {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(UnderWay {
            calls: 0,
            since: Instant::now(),
        })))
    }
}

impl Calls {
    /// A call begins. It is over when what this returns is dropped.
    pub fn begin(&self) -> Call {
        self.0.lock().calls += 1;
        Call(self.clone())
    }

    /// For how long there has been none.
    pub(crate) fn idle(&self) -> Duration {
        let under_way = self.0.lock();
        match under_way.calls {
            0 => under_way.since.elapsed(),
            _ => Duration::ZERO,
        }
    }
}

/// A call that is under way.
#[derive(Debug)]
pub struct Call(Calls);

impl Drop for Call {
    fn drop(&mut self) {
        let mut under_way = self.0.0.lock();
        under_way.calls -= 1;
        under_way.since = Instant::now();
    }
}
