//! Copies in flight, as revocations and unmapping see them.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use parking_lot::{Condvar, Mutex};

use super::{blocks::BlockId, pace::Pace, slab::SlabIndex};
use crate::device::{CopyStream, Result, Ticket};

/// What copies are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Load,
    Store,
    /// From one slab to another.
    Move,
    /// Finding out whether a route works.
    Probe,
}

/// The end of what was queued on one stream.
#[derive(Clone, Debug)]
struct End {
    stream: Arc<dyn CopyStream>,
    ticket: Ticket,
}

/// A set of copies that were queued together. Registered with every slab they touch, under the state's lock and
/// before the first of them is queued, so that a slab without one has no copy in flight.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) purpose: Purpose,
    pub(super) slabs: Vec<SlabIndex>,
    /// Blocks that become ready when the copies are over; taken by whoever settles them.
    pub(super) writes: Mutex<Vec<BlockId>>,
    /// How many of them were kept and lost, once somebody has settled them.
    pub(super) settled: OnceLock<(u32, u32)>,
    /// One for each stream that was used, once nothing more is queued.
    ends: Mutex<Option<Vec<End>>>,
    queued: Condvar,
    /// It was counted as failed.
    failed: AtomicBool,
    /// Its bytes are worth nothing: some copies could not be queued, or a slab it reads was taken away.
    poisoned: AtomicBool,
}

impl Op {
    pub(super) fn new(purpose: Purpose, slabs: Vec<SlabIndex>, writes: Vec<BlockId>) -> Self {
        Self {
            purpose,
            slabs,
            writes: Mutex::new(writes),
            settled: OnceLock::new(),
            ends: Mutex::new(None),
            queued: Condvar::new(),
            failed: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
        }
    }

    /// How it ended, once it is known that no copy is in flight any more, queued or not. An error means that some failed.
    /// None until then: see [`Ticket::outcome`].
    pub(super) fn outcome(&self) -> Option<Result<()>> {
        let mut all = Some(Ok(()));
        // Each is asked, whatever the others say: that is what lets streams go of memories.
        for end in self.ends.lock().as_ref()? {
            match end.ticket.outcome() {
                Some(outcome) => all = all.map(|before| before.and(outcome)),
                None => all = None,
            }
        }
        all
    }

    /// Whether it is known that no copy is in flight any more. A failed copy is over too.
    pub(super) fn is_over(&self) -> bool {
        self.outcome().is_some()
    }

    /// Blocks until it is known that no copy is in flight any more, queued or not. An error means that some failed.
    pub(super) fn wait(&self) -> Result<()> {
        let ends = {
            let mut ends = self.ends.lock();
            loop {
                match &*ends {
                    Some(ends) => break ends.clone(),
                    None => self.queued.wait(&mut ends),
                }
            }
        };
        // Every stream must be over, whichever fails first.
        let outcomes: Vec<_> = ends.iter().map(|end| end.ticket.wait()).collect();
        outcomes.into_iter().collect()
    }

    /// Like [`wait`](Self::wait), but gives up at `deadline`.
    pub(super) fn wait_until(&self, deadline: Instant) -> Option<Result<()>> {
        let pace = Pace::start();
        loop {
            let outcome = self.outcome();
            if outcome.is_some() || Instant::now() >= deadline {
                return outcome;
            }
            thread::sleep(pace.nap());
        }
    }

    pub(super) fn is_write(&self) -> bool {
        !self.writes.lock().is_empty()
    }

    /// The streams on which its copies are known to have ended: well, or not.
    pub(super) fn streams(&self, well: bool) -> Vec<Arc<dyn CopyStream>> {
        let ends = self.ends.lock();
        let ended_so = |end: &&End| {
            end.ticket
                .outcome()
                .is_some_and(|ended| ended.is_ok() == well)
        };
        let ends = ends.iter().flatten().filter(ended_so);
        ends.map(|end| Arc::clone(&end.stream)).collect()
    }

    /// Takes note that copies of it have failed. True the first time.
    pub(super) fn note_failure(&self) -> bool {
        !self.failed.swap(true, Ordering::AcqRel)
    }

    pub(super) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}

/// An [`Op`] while its copies are queued. Ends with it, however queueing went: every stream in use is asked for its end
/// then, since a call that fails may have queued some of its copies.
pub(super) struct Queueing<'a> {
    op: &'a Op,
    streams: Vec<Arc<dyn CopyStream>>,
}

impl<'a> Queueing<'a> {
    pub(super) fn new(op: &'a Op) -> Self {
        Self {
            op,
            streams: Vec::new(),
        }
    }

    /// Nothing may be queued on a stream before this.
    pub(super) fn on(&mut self, stream: &Arc<dyn CopyStream>) {
        if !(self.streams.iter()).any(|other| Arc::ptr_eq(other, stream)) {
            self.streams.push(Arc::clone(stream));
        }
    }

    /// The streams in use.
    pub(super) fn streams(&self) -> &[Arc<dyn CopyStream>] {
        &self.streams
    }
}

impl Drop for Queueing<'_> {
    fn drop(&mut self) {
        let end = |stream: Arc<dyn CopyStream>| End {
            ticket: stream.end(),
            stream,
        };
        let ends = self.streams.drain(..).map(end).collect();
        *self.op.ends.lock() = Some(ends);
        self.op.queued.notify_all();
    }
}
