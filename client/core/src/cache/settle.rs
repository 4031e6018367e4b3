//! What copies wrote becomes readable when they are over: whoever waits for them settles them, and for copies that nobody
//! waits for there is a thread.

use std::{
    collections::VecDeque,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use tracing::warn;

use super::{
    blocks::BlockId,
    core::{Core, Leftover},
    publish::Publishing,
    write::{Settled, Write},
};
use crate::{device, transfer::Pace};

/// Leftovers that are asked in one round whether they are over: the cost of a round is bounded, however many there are.
const AT_ONCE: usize = 16;

/// How long somebody who gives copies up waits for them when the thread is gone.
const LAST_WAIT: Duration = Duration::from_secs(1);

impl Core {
    /// Waits until copies are known to be over, makes what they wrote readable, and publishes it. Whoever comes first does it,
    /// and others are told how that went.
    pub(super) fn settle(&self, write: &Arc<Write>) -> Settled {
        let outcome = write.flight.transfer.wait();
        let (ready, Settled { kept, lost }) = self.make_readable(write, &outcome);
        let duplicates = self.publish(ready);
        Settled {
            kept: kept - duplicates,
            lost: lost + duplicates,
        }
    }

    /// Settles copies that are over. What they wrote is on its way to be published.
    pub(super) fn begin_settling(
        &self,
        write: &Arc<Write>,
        outcome: &device::Result<()>,
    ) -> Publishing {
        let (ready, _) = self.make_readable(write, outcome);
        self.begin_publishing(ready)
    }

    /// Makes readable what was written, and forgets what was not. Gives the blocks to publish, each pinned, and how many are kept
    /// and lost. Whoever comes second finds nothing to publish.
    fn make_readable(
        &self,
        write: &Arc<Write>,
        outcome: &device::Result<()>,
    ) -> (Vec<BlockId>, Settled) {
        let copied = outcome.is_ok() && !write.flight.transfer.is_poisoned();
        let mut state = self.state.lock();
        if let Some(settled) = write.settled.get() {
            return (Vec::new(), *settled);
        }
        let mut settled = Settled::default();
        let mut ready = Vec::new();
        for id in std::mem::take(&mut *write.blocks.lock()) {
            if copied && state.blocks.get(id).place.is_some() {
                state.blocks.make_ready(id);
                ready.push(id);
                settled.kept += 1;
                continue;
            }
            if let Some(place) = state.lose(id)
                && let Some(shelf) = state.shelves.get_mut(place.slab)
            {
                // Never published: nobody reads it.
                shelf.slots.give(place.slot);
            }
            state.blocks.unpin(id);
            settled.lost += 1;
        }
        // Under the state's lock, so nobody else was here meanwhile.
        let _ = write.settled.set(settled);
        state.end_write(write);
        if write.stores {
            state.counts.stored_blocks += u64::from(settled.kept);
        }
        state.counts.dropped_blocks += u64::from(settled.lost);
        drop(state);
        self.ended(&write.flight, outcome);
        self.tell_soon();
        (ready, settled)
    }

    /// Ends copies that are over. What they wrote is on its way to be published; what they read may move again.
    fn begin_ending(&self, leftover: Leftover, outcome: &device::Result<()>) -> Option<Publishing> {
        match leftover {
            Leftover::Write(write) => Some(self.begin_settling(&write, outcome)),
            Leftover::Load { flight, hit } => {
                self.ended(&flight, outcome);
                drop(hit);
                None
            }
        }
    }

    /// Leaves copies to the settling thread. If that is gone, the borrower is closing: they are waited for here, and what
    /// is not known to be over after a moment keeps its blocks for good.
    pub(super) fn leave(&self, leftover: Leftover) {
        let Err(mpsc::SendError(Some(leftover))) = self.leftovers.send(Some(leftover)) else {
            return;
        };
        match leftover
            .flight()
            .transfer
            .wait_until(Instant::now() + LAST_WAIT)
        {
            Some(outcome) => {
                if let Some(publishing) = self.begin_ending(leftover, &outcome) {
                    self.wait_published(publishing);
                }
            }
            None => {
                warn!(
                    "copies are given up that are not known to be over: their blocks stay as they are"
                );
                std::mem::forget(leftover);
            }
        }
    }

    /// The settling thread. It waits for none of the copies, so that one that is stuck holds up no other. Ends when it is
    /// told so and has nothing left.
    pub(super) fn settle_loop(&self, inbox: &mpsc::Receiver<Option<Leftover>>) {
        let mut settling = Settling::default();
        let mut pace = Pace::start();
        let mut open = true;
        while open || !settling.is_over() {
            // The core has a sender, so that nothing coming means that it is time to look again.
            let next = match settling.is_over() {
                true => inbox.recv().ok(),
                false => inbox.recv_timeout(pace.nap()).ok(),
            };
            match next {
                Some(Some(leftover)) => {
                    settling.leftovers.push_back(leftover);
                    pace.go_on();
                }
                Some(None) => open = false,
                None => {}
            }
            if settling.advance(self) {
                pace.go_on();
            }
        }
    }
}

/// What the settling thread has in hand.
#[derive(Default)]
struct Settling {
    leftovers: VecDeque<Leftover>,
    publishing: Vec<Publishing>,
}

impl Settling {
    fn is_over(&self) -> bool {
        self.leftovers.is_empty() && self.publishing.is_empty()
    }

    /// Settles what is over, as far as it is asked in one round. True when something was.
    fn advance(&mut self, core: &Core) -> bool {
        let mut settled = false;
        for _ in 0..self.leftovers.len().min(AT_ONCE) {
            let Some(leftover) = self.leftovers.pop_front() else {
                break;
            };
            match leftover.flight().transfer.outcome() {
                Some(outcome) => {
                    self.publishing
                        .extend(core.begin_ending(leftover, &outcome));
                    settled = true;
                }
                None => self.leftovers.push_back(leftover),
            }
        }
        let before = self.publishing.len();
        self.publishing
            .retain_mut(|publishing| !core.is_published(publishing));
        settled || self.publishing.len() < before
    }
}
