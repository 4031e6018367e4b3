//! Copies in flight, as revocations and unmapping see them.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::{blocks::BlockId, slab::SlabIndex};
use crate::device::{Result, Ticket};

/// What copies are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Load,
    Store,
    /// From one slab to another.
    Move,
}

/// A set of copies that were queued together. Registered with every slab they touch, under the state's lock and
/// before the first of them is queued, so that a slab without one has no copy in flight.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) purpose: Purpose,
    pub(super) slabs: Vec<SlabIndex>,
    /// Blocks that become ready when the copies are over; taken by whoever settles them.
    pub(super) writes: Mutex<Vec<BlockId>>,
    /// One for each stream, once all copies are queued.
    last: Mutex<Option<Vec<Ticket>>>,
    queued: Condvar,
    /// A slab it reads was taken away in a way that makes its bytes worth nothing.
    poisoned: AtomicBool,
}

impl Op {
    pub(super) fn new(purpose: Purpose, slabs: Vec<SlabIndex>, writes: Vec<BlockId>) -> Self {
        Self {
            purpose,
            slabs,
            writes: Mutex::new(writes),
            last: Mutex::new(None),
            queued: Condvar::new(),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Everything is queued: these tickets, one for each stream, mark its end.
    pub(super) fn queued(&self, tickets: Vec<Ticket>) {
        *self.last.lock() = Some(tickets);
        self.queued.notify_all();
    }

    /// Blocks until no copy is in flight any more, queued or not. An error means that some failed.
    pub(super) fn wait(&self) -> Result<()> {
        let tickets = {
            let mut last = self.last.lock();
            loop {
                match &*last {
                    Some(tickets) => break tickets.clone(),
                    None => self.queued.wait(&mut last),
                }
            }
        };
        // Every stream must be over, whichever fails first.
        let outcomes: Vec<_> = tickets.iter().map(Ticket::wait).collect();
        outcomes.into_iter().collect()
    }

    /// Whether no copy is in flight any more. A failed copy is over too.
    pub(super) fn is_over(&self) -> bool {
        let last = self.last.lock();
        (last.as_ref()).is_some_and(|tickets| {
            tickets
                .iter()
                .all(|ticket| ticket.is_done().unwrap_or(true))
        })
    }

    pub(super) fn is_write(&self) -> bool {
        !self.writes.lock().is_empty()
    }

    pub(super) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}

/// Makes an [`Op`] count as queued even if queueing it is cut short: a drain must never wait for ever.
pub(super) struct Queueing<'a> {
    op: &'a Op,
    tickets: Vec<Ticket>,
}

impl<'a> Queueing<'a> {
    pub(super) fn new(op: &'a Op) -> Self {
        Self {
            op,
            tickets: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, ticket: Ticket) {
        self.tickets.push(ticket);
    }
}

impl Drop for Queueing<'_> {
    fn drop(&mut self) {
        self.op.queued(std::mem::take(&mut self.tickets));
    }
}
