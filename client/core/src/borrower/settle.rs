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
    core::Core,
    hit::HitBlocks,
    op::{Op, Purpose},
    publish::Publishing,
};
use crate::{device, transfer::Pace};

/// Leftovers that are asked in one round whether they are over: the cost of a round is bounded, however many there are.
const AT_ONCE: usize = 16;

/// How long somebody who gives copies up waits for them when the thread is gone.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Copies whose owner did not wait for them.
pub(super) struct Leftover {
    pub(super) op: Arc<Op>,
    /// Keeps the blocks in place meanwhile.
    pub(super) hit: Option<Arc<HitBlocks>>,
}

impl Core {
    /// Waits until an op's copies are known to be over, makes what they wrote readable, and publishes it. Whoever comes
    /// first does it, and others are told how that went. Returns blocks kept and blocks lost.
    pub(super) fn settle(&self, op: &Arc<Op>) -> (u32, u32) {
        let outcome = op.transfer.wait();
        let (ready, (kept, lost)) = self.make_readable(op, &outcome);
        let duplicates = self.publish(ready);
        (kept - duplicates, lost + duplicates)
    }

    /// Settles an op that is over. What it wrote is on its way to be published.
    pub(super) fn begin_settling(&self, op: &Arc<Op>, outcome: &device::Result<()>) -> Publishing {
        let (ready, _) = self.make_readable(op, outcome);
        self.begin_publishing(ready)
    }

    /// Makes readable what an op that is over has written, and forgets what it has not. Gives the blocks to publish, each
    /// pinned, and how many are kept and lost. Whoever comes second finds nothing to publish.
    fn make_readable(
        &self,
        op: &Arc<Op>,
        outcome: &device::Result<()>,
    ) -> (Vec<BlockId>, (u32, u32)) {
        let copied = outcome.is_ok() && !op.transfer.is_poisoned();
        let mut state = self.state.lock();
        if let Some(settled) = op.settled.get() {
            return (Vec::new(), *settled);
        }
        let (mut kept, mut lost) = (0, 0);
        let mut ready = Vec::new();
        for id in std::mem::take(&mut *op.writes.lock()) {
            if copied && state.blocks.get(id).place.is_some() {
                state.blocks.make_ready(id);
                ready.push(id);
                kept += 1;
                continue;
            }
            if let Some(place) = state.lose(id)
                && let Some(slab) = state.slabs.get_mut(place.slab)
            {
                // Never published: nobody reads it.
                slab.slots.give(place.slot);
            }
            state.blocks.unpin(id);
            lost += 1;
        }
        // Under the state's lock, so nobody else was here meanwhile.
        let _ = op.settled.set((kept, lost));
        state.end_op(op);
        if op.purpose == Purpose::Store {
            state.counts.stored_blocks += u64::from(kept);
        }
        state.counts.dropped_blocks += u64::from(lost);
        drop(state);
        self.note_outcome(op, outcome);
        self.tell_soon();
        (ready, (kept, lost))
    }

    /// Leaves copies to the settling thread. If that is gone, the borrower is closing: they are waited for here, and what
    /// is not known to be over after a moment keeps its blocks for good.
    pub(super) fn leave(&self, leftover: Leftover) {
        let Err(mpsc::SendError(Some(leftover))) = self.leftovers.send(Some(leftover)) else {
            return;
        };
        match leftover.op.transfer.wait_until(Instant::now() + LAST_WAIT) {
            Some(outcome) => {
                let (ready, _) = self.make_readable(&leftover.op, &outcome);
                self.publish(ready);
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
            match leftover.op.transfer.outcome() {
                Some(outcome) => {
                    let publishing = core.begin_settling(&leftover.op, &outcome);
                    self.publishing.push(publishing);
                    settled = true;
                    // Its blocks may move again.
                    drop(leftover.hit);
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
