//! The draining thread: lets go of slabs. Each goes its way from what is still being written to it, over what is worth moving
//! out of it, to its last copy; then it is unmapped and acknowledged. The thread looks at all of them in turn and waits for
//! none, so that a slow copy holds up the slabs that it touches and no others.

use std::{
    sync::{Arc, mpsc},
    time::Instant,
};

use swiftcache_proto::domain::LeaseId;
use tracing::debug;

use super::{
    core::Core,
    drain::DrainTask,
    op::Op,
    publish::Publishing,
    rescue::Rescue,
    slab::{Draining, Kind, Slab},
    state::micros_since,
};
use crate::{
    session::Call,
    transfer::{AreaId, Pace},
};

/// A slab on its way out.
#[derive(Debug)]
struct Leaving {
    slab: AreaId,
    stage: Stage,
    /// What is said in the end: a revoked lease is acknowledged, one of a borrower that closes is released.
    revoked: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// What is being written becomes worth moving when it is there: waited for as long.
    Writing { until: Instant },
    /// Blocks are moved out, as long.
    Moving { until: Instant },
    /// Nothing in it is worth anything any more. Copies may still touch it.
    Ending,
}

/// What the draining thread has in hand.
#[derive(Default)]
struct Drains {
    leaving: Vec<Leaving>,
    rescue: Rescue,
    /// What was written to revoked slabs and lies in others too.
    publishing: Vec<Publishing>,
    closing: bool,
    /// Leases that a closing borrower has let go of.
    released: Vec<LeaseId>,
    /// What it is telling the broker.
    telling: Vec<Call<()>>,
}

impl Core {
    /// The draining thread. Ends when the borrower closes and everything is let go of.
    pub(super) fn drain_loop(&self, inbox: &mpsc::Receiver<DrainTask>) {
        let mut drains = Drains::default();
        let mut pace = Pace::start();
        loop {
            // The core has a sender, so that nothing coming means that it is time to look again.
            let first = match drains.is_idle() {
                true => inbox.recv().ok(),
                false => inbox.recv_timeout(pace.nap()).ok(),
            };
            // Slabs that are revoked together are drained together: what little room there is elsewhere goes to the
            // hottest blocks of them all.
            for task in first.into_iter().chain(inbox.try_iter()) {
                match task {
                    DrainTask::LetGo(slab) => drains.begin(self, slab),
                    DrainTask::Close => drains.close(self),
                }
                pace.go_on();
            }
            if drains.advance(self) {
                pace.go_on();
            }
            if drains.closing && drains.is_over(self) {
                return;
            }
        }
    }

    fn draining(&self, slab: AreaId) -> Option<(Kind, Draining)> {
        let state = self.state.lock();
        let slab = state.slabs.get(slab)?;
        Some((slab.kind, slab.draining?))
    }

    /// Copies that write to a slab what becomes readable when they are over.
    fn writes_to(&self, slab: AreaId) -> Vec<Arc<Op>> {
        let state = self.state.lock();
        let ops = state.slabs.get(slab).map(|slab| slab.ops.as_slice());
        let writes = ops.unwrap_or_default().iter().filter(|op| op.is_write());
        writes.cloned().collect()
    }

    /// Forgets what is left in a slab.
    fn drop_blocks(&self, slab: AreaId) {
        let mut state = self.state.lock();
        let occupants = state.slabs.get(slab).map(|slab| slab.occupants.clone());
        for id in occupants.unwrap_or_default().into_iter().flatten() {
            if state.lose(id).is_some() {
                state.counts.dropped_blocks += 1;
            }
        }
    }

    /// Whether it is known that no copy touches the slab. None can begin: the slab is draining.
    fn is_untouched(&self, slab: AreaId) -> bool {
        let ops = {
            let state = self.state.lock();
            let slab = state.slabs.get(slab);
            slab.map_or_else(Vec::new, |slab| slab.ops.clone())
        };
        // Asked outside the lock: a stream that lets go of memories may unmap.
        let over: Vec<_> = ops.iter().filter(|op| op.transfer.is_over()).collect();
        if let Some(slab) = self.state.lock().slabs.get_mut(slab) {
            for op in &over {
                slab.end_op(op);
            }
        }
        over.len() == ops.len()
    }

    /// Takes a slab that nothing touches out of the table. Unmapped when it is dropped.
    fn take_out(&self, slab: AreaId) -> Option<Box<Slab>> {
        self.drop_blocks(slab);
        self.state.lock().slabs.remove(slab)
    }

    /// Slabs of the host tier that copies may still touch.
    fn busy_host_slabs(&self) -> Vec<AreaId> {
        let state = self.state.lock();
        let hosts = (state.slabs.iter()).filter(|(_, slab)| slab.kind == Kind::Host);
        let busy = hosts.filter(|(_, slab)| !slab.ops.is_empty());
        busy.map(|(index, _)| index).collect()
    }
}

impl Drains {
    /// Nothing is to be looked at before something comes in.
    fn is_idle(&self) -> bool {
        !self.closing
            && self.leaving.is_empty()
            && self.publishing.is_empty()
            && self.rescue.is_over()
    }

    /// Whether a closing borrower has let go of everything: no copy of it is in flight, no lease mapped, and the broker
    /// knows.
    fn is_over(&self, core: &Core) -> bool {
        let hosts = core.busy_host_slabs();
        let untouched = hosts.into_iter().all(|host| core.is_untouched(host));
        let told = self.released.is_empty() && self.telling.is_empty();
        untouched
            && told
            && self.leaving.is_empty()
            && self.publishing.is_empty()
            && self.rescue.is_over()
    }

    /// Begins to let go of a revoked slab.
    fn begin(&mut self, core: &Core, slab: AreaId) {
        let Some((kind, draining)) = core.draining(slab) else {
            return;
        };
        let own = matches!(kind, Kind::Own(_));
        let window = (draining.window / 2).min(core.config.drain.move_for);
        let mut leaving = Leaving {
            slab,
            stage: Stage::Writing {
                until: draining.since + window,
            },
            revoked: true,
        };
        if !own || draining.refused || !core.config.drain.move_blocks || self.closing {
            self.end(core, &mut leaving);
        }
        self.leaving.push(leaving);
    }

    /// Begins to let go of everything, as it is.
    fn close(&mut self, core: &Core) {
        if std::mem::replace(&mut self.closing, true) {
            return;
        }
        for mut leaving in std::mem::take(&mut self.leaving) {
            self.end(core, &mut leaving);
            self.leaving.push(leaving);
        }
        if let Some(session) = core.connected() {
            self.telling.extend(core.tell_closed(session));
        }
        let mut more = Vec::new();
        for (index, slab) in core.state.lock().slabs.iter_mut() {
            if slab.kind.key().is_some() && slab.draining.is_none() {
                slab.draining = Some(Draining::now());
                more.push(index);
            }
        }
        for slab in more {
            let mut leaving = Leaving {
                slab,
                stage: Stage::Ending,
                revoked: false,
            };
            self.end(core, &mut leaving);
            self.leaving.push(leaving);
        }
    }

    /// Nothing in the slab is worth waiting for any more.
    fn end(&mut self, core: &Core, leaving: &mut Leaving) {
        leaving.stage = Stage::Ending;
        self.rescue.forget(leaving.slab);
        core.drop_blocks(leaving.slab);
    }

    /// Brings everything as far as it gets without waiting. True when something changed.
    fn advance(&mut self, core: &Core) -> bool {
        let before = self.publishing.len();
        self.publishing
            .retain_mut(|publishing| !core.is_published(publishing));
        let mut changed = self.publishing.len() < before;
        // Whoever comes out of the first stage has blocks for the rescue, and what the rescue is through with goes on.
        changed |= self.advance_slabs(core);
        changed |= self.rescue.advance(core);
        changed |= self.advance_slabs(core);
        changed |= self.tell_released(core);
        changed
    }

    /// Tells the broker of leases that a closing borrower has let go of: of as many at once as there are.
    fn tell_released(&mut self, core: &Core) -> bool {
        let before = self.telling.len();
        self.telling.retain_mut(|call| match call.try_take() {
            Some(Ok(())) => false,
            Some(Err(error)) => {
                debug!(%error, "the broker was not told by a borrower that closes; leaving tells it");
                false
            }
            None => true,
        });
        let told = self.telling.len() < before;
        let released = std::mem::take(&mut self.released);
        if let (false, Some(session)) = (released.is_empty(), core.connected()) {
            self.telling.push(session.release(released));
            return true;
        }
        told
    }

    fn advance_slabs(&mut self, core: &Core) -> bool {
        let mut changed = false;
        for mut leaving in std::mem::take(&mut self.leaving) {
            let before = leaving.stage;
            let gone = self.advance_slab(core, &mut leaving);
            changed |= gone || leaving.stage != before;
            if !gone {
                self.leaving.push(leaving);
            }
        }
        changed
    }

    /// Brings one slab as far as it gets. True when it is gone.
    fn advance_slab(&mut self, core: &Core, leaving: &mut Leaving) -> bool {
        let slab = leaving.slab;
        let Some((_, draining)) = core.draining(slab) else {
            return true;
        };
        if draining.refused && leaving.stage != Stage::Ending {
            self.end(core, leaving);
        }
        if let Stage::Writing { until } = leaving.stage {
            let mut all_there = true;
            for op in core.writes_to(slab) {
                match op.transfer.outcome() {
                    Some(outcome) => self.publishing.push(core.begin_settling(&op, &outcome)),
                    None => all_there = false,
                }
            }
            if all_there || Instant::now() >= until {
                self.rescue.add(core, slab);
                leaving.stage = Stage::Moving { until };
            }
        }
        if let Stage::Moving { until } = leaving.stage
            && (!self.rescue.has(slab) || Instant::now() >= until)
        {
            let took = micros_since(draining.since);
            core.state.lock().drain.saturating_record(took);
            self.end(core, leaving);
        }
        leaving.stage == Stage::Ending && self.let_go(core, leaving)
    }

    /// Lets go of a slab with nothing in it, if no copy touches it any more and the blocks that were moved out are known.
    fn let_go(&mut self, core: &Core, leaving: &Leaving) -> bool {
        let slab = leaving.slab;
        if self.rescue.has(slab) || !core.is_untouched(slab) {
            return false;
        }
        let Some((kind, draining)) = core.draining(slab) else {
            return true;
        };
        let Some(key) = kind.key() else { return true };
        // Unmaps before anyone is told.
        drop(core.take_out(slab));
        if !leaving.revoked {
            if matches!(kind, Kind::Own(_)) {
                self.released.push(key.lease);
            }
            return true;
        }
        // Nobody waits for the acknowledgement of a lease that was refused.
        if !draining.refused {
            let took = micros_since(draining.since);
            core.state.lock().acknowledge.saturating_record(took);
            if let Some(session) = &core.session {
                session.acknowledge(key.lease, key.generation);
            }
            debug!(lease = %key.lease, took_us = took, "lease acknowledged");
        }
        true
    }
}
