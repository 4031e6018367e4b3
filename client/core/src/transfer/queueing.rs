//! What is in flight: copies that were queued together.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use parking_lot::{Condvar, Mutex};

use super::{
    pace::Pace,
    route::{Direction, Route},
};
use crate::device::{CopyStream, Memory, Piece, Result, Ticket};

/// The end of what was queued on one stream.
#[derive(Clone, Debug)]
struct End {
    lane: Lane,
    ticket: Ticket,
}

/// A stream in use.
#[derive(Clone, Debug)]
struct Lane {
    /// Whose stream it is.
    route: Arc<Route>,
    /// What a failure is put down to, if that is known.
    suspect: Option<Arc<Route>>,
}

/// Copies that were queued together.
#[derive(Debug, Default)]
pub(crate) struct Transfer {
    /// One for each stream that was used, once nothing more is queued.
    ends: Mutex<Option<Vec<End>>>,
    queued: Condvar,
    /// It was counted as failed.
    failed: AtomicBool,
    /// Its bytes are worth nothing: some copies could not be queued, or memory that it reads was taken away.
    poisoned: AtomicBool,
}

impl Transfer {
    /// How it ended, once it is known that no copy is in flight any more, queued or not. An error means that some failed.
    /// None until then: see [`Ticket::outcome`].
    pub(crate) fn outcome(&self) -> Option<Result<()>> {
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
    pub(crate) fn is_over(&self) -> bool {
        self.outcome().is_some()
    }

    /// Blocks until it is known that no copy is in flight any more, queued or not. An error means that some failed.
    pub(crate) fn wait(&self) -> Result<()> {
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
    pub(crate) fn wait_until(&self, deadline: Instant) -> Option<Result<()>> {
        let pace = Pace::start();
        loop {
            let outcome = self.outcome();
            if outcome.is_some() || Instant::now() >= deadline {
                return outcome;
            }
            thread::sleep(pace.nap());
        }
    }

    /// The routes on whose streams its copies are known to have ended well.
    pub(crate) fn worked_on(&self) -> Vec<Arc<Route>> {
        self.routes(true, |lane| Some(&lane.route))
    }

    /// The routes that failed copies of it are put down to.
    pub(crate) fn failed_on(&self) -> Vec<Arc<Route>> {
        self.routes(false, |lane| lane.suspect.as_ref())
    }

    fn routes(&self, well: bool, of: impl Fn(&Lane) -> Option<&Arc<Route>>) -> Vec<Arc<Route>> {
        let ends = self.ends.lock();
        let ended_so = |end: &&End| {
            let outcome = end.ticket.outcome();
            outcome.is_some_and(|outcome| outcome.is_ok() == well)
        };
        let ends = ends.iter().flatten().filter(ended_so);
        ends.filter_map(|end| of(&end.lane).cloned()).collect()
    }

    /// Takes note that copies of it have failed. True the first time.
    pub(crate) fn note_failure(&self) -> bool {
        !self.failed.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}

/// A [`Transfer`] while its copies are queued. Ends with it, however queueing went: every stream in use is asked for its end
/// then, since a call that fails may have queued some of its copies.
pub(crate) struct Queueing<'a> {
    transfer: &'a Transfer,
    direction: Direction,
    lanes: Vec<Lane>,
}

impl<'a> Queueing<'a> {
    /// Copies are queued on routes' streams of this direction.
    pub(crate) fn new(transfer: &'a Transfer, direction: Direction) -> Self {
        Self {
            transfer,
            direction,
            lanes: Vec::new(),
        }
    }

    /// Nothing may be queued on a route's stream before this. A failure is put down to `suspect`.
    pub(super) fn on(
        &mut self,
        route: &Arc<Route>,
        suspect: Option<&Arc<Route>>,
    ) -> &Arc<dyn CopyStream> {
        let same = |lane: &Lane| Arc::ptr_eq(&lane.route, route);
        let at = match self.lanes.iter().position(same) {
            Some(at) => {
                let lane = &mut self.lanes[at];
                let agree = lane.suspect.as_ref().map(Arc::as_ptr) == suspect.map(Arc::as_ptr);
                lane.suspect = lane.suspect.take().filter(|_| agree);
                at
            }
            None => {
                self.lanes.push(Lane {
                    route: Arc::clone(route),
                    suspect: suspect.cloned(),
                });
                self.lanes.len() - 1
            }
        };
        self.lanes[at].route.stream(self.direction)
    }

    /// Queues the copy of a whole memory into another one of as many bytes.
    pub(crate) fn copy(
        &mut self,
        route: &Arc<Route>,
        from: &Memory,
        to: &Memory,
        bytes: u64,
    ) -> Result<()> {
        let whole = Piece {
            from: 0,
            to: 0,
            bytes,
        };
        self.on(route, None).copy(from, to, &[whole])
    }

    /// Queues zeroing of a memory's first bytes.
    pub(crate) fn zero(&mut self, route: &Arc<Route>, memory: &Memory, bytes: u64) -> Result<()> {
        self.on(route, None).zero(memory, 0, bytes)
    }

    /// The routes in use.
    pub(super) fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.lanes.iter().map(|lane| &lane.route)
    }

    /// Which of a route's streams is used.
    pub(super) fn direction(&self) -> Direction {
        self.direction
    }
}

impl Drop for Queueing<'_> {
    fn drop(&mut self) {
        let end = |lane: Lane| End {
            ticket: lane.route.stream(self.direction).end(),
            lane,
        };
        let ends = self.lanes.drain(..).map(end).collect();
        *self.transfer.ends.lock() = Some(ends);
        self.transfer.queued.notify_all();
    }
}
