//! The draining thread: lets go of slabs. What is worth moving out of each is moved first, by its holder; when its last transfer is
//! known to be over, it is unmapped and acknowledged. The thread looks at all of them in turn and waits for none, so that a slow
//! copy holds up the slabs that it touches and no others.

use std::{sync::mpsc, time::Instant};

use swiftcache_proto::domain::{Hold, LeaseId};
use tracing::debug;

use super::{
    core::{Leases, RecallTask},
    holder::{Holder, Progress},
    slabs::{Draining, LeaseKey, Slab},
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
    /// What is said in the end: a revoked lease is acknowledged, another one is released.
    revoked: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The holder moves blocks out, as long.
    Moving { until: Instant },
    /// Nothing in it is worth anything any more. Transfers may still touch it.
    Ending,
}

/// What is known of a slab that is let go of.
#[derive(Clone, Copy, Debug)]
struct Facts {
    key: Option<LeaseKey>,
    hold: Hold,
    draining: Draining,
}

/// What the draining thread has in hand.
struct Drains<'a> {
    leases: &'a Leases,
    holder: &'a dyn Holder,
    leaving: Vec<Leaving>,
    /// How far the holder got in its last step.
    moving: Progress,
    closing: bool,
    /// Leases that were let go of without being asked back.
    released: Vec<LeaseId>,
    /// What it is telling the broker.
    telling: Vec<Call<()>>,
}

impl Leases {
    /// The draining thread. Ends when it is told to close, and everything is let go of.
    pub(super) fn drain_loop(&self, holder: &dyn Holder, inbox: &mpsc::Receiver<RecallTask>) {
        let mut drains = Drains {
            leases: self,
            holder,
            leaving: Vec::new(),
            moving: Progress::Idle,
            closing: false,
            released: Vec::new(),
            telling: Vec::new(),
        };
        let mut pace = Pace::start();
        loop {
            // The leases have a sender, so that nothing coming means that it is time to look again.
            let first = match drains.is_idle() {
                true => inbox.recv().ok(),
                false => inbox.recv_timeout(pace.nap()).ok(),
            };
            // Slabs that are revoked together are drained together: what little room there is elsewhere goes to the
            // hottest blocks of them all.
            for task in first.into_iter().chain(inbox.try_iter()) {
                match task {
                    RecallTask::LetGo { slab, revoked } => drains.begin(slab, revoked),
                    RecallTask::Close => drains.close(),
                }
                pace.go_on();
            }
            if drains.advance() {
                pace.go_on();
            }
            if drains.closing && drains.is_over() {
                return;
            }
        }
    }

    fn facts(&self, slab: AreaId) -> Option<Facts> {
        let state = self.state.lock();
        let slab = state.slabs.get(slab)?;
        Some(Facts {
            key: slab.key,
            hold: slab.hold,
            draining: slab.draining?,
        })
    }

    /// Whether it is known that no transfer touches the slab. None can begin: the slab is closed.
    fn is_untouched(&self, slab: AreaId) -> bool {
        let flights = {
            let state = self.state.lock();
            let slab = state.slabs.get(slab);
            slab.map_or_else(Vec::new, |slab| slab.flights.clone())
        };
        // Asked outside the lock: a stream that lets go of memories may unmap.
        let over: Vec<_> = flights
            .iter()
            .filter(|flight| flight.transfer.is_over())
            .collect();
        if let Some(slab) = self.state.lock().slabs.get_mut(slab) {
            for flight in &over {
                slab.end(flight);
            }
        }
        over.len() == flights.len()
    }

    /// Host memory that transfers may still touch.
    fn busy_host_slabs(&self) -> Vec<AreaId> {
        let state = self.state.lock();
        let hosts = state.slabs.iter().filter(|slab| slab.key.is_none());
        let busy = hosts.filter(|slab| !slab.flights.is_empty());
        busy.map(|slab| slab.area.id).collect()
    }
}

impl Drains<'_> {
    /// Nothing is to be looked at before something comes in.
    fn is_idle(&self) -> bool {
        !self.closing
            && self.leaving.is_empty()
            && self.telling.is_empty()
            && self.moving == Progress::Idle
    }

    /// Whether everything is let go of: no transfer is in flight, no lease mapped, and the broker knows.
    fn is_over(&self) -> bool {
        let hosts = self.leases.busy_host_slabs();
        let untouched = hosts.into_iter().all(|host| self.leases.is_untouched(host));
        let told = self.released.is_empty() && self.telling.is_empty();
        untouched && told && self.leaving.is_empty() && self.moving == Progress::Idle
    }

    /// Begins to let go of a slab.
    fn begin(&mut self, slab: AreaId, revoked: bool) {
        let Some(facts) = self.leases.facts(slab) else {
            return;
        };
        let worth_it = revoked && facts.hold == Hold::Own && !facts.draining.refused;
        let until = match worth_it && !self.closing {
            true => self.holder.evacuate(slab, facts.draining.window),
            false => None,
        };
        let mut leaving = Leaving {
            slab,
            stage: Stage::Ending,
            revoked,
        };
        match until {
            Some(until) => {
                leaving.stage = Stage::Moving { until };
                self.moving = Progress::Changed;
            }
            None => self.end(&mut leaving),
        }
        self.leaving.push(leaving);
    }

    /// Begins to let go of everything, as it is.
    fn close(&mut self) {
        if std::mem::replace(&mut self.closing, true) {
            return;
        }
        for mut leaving in std::mem::take(&mut self.leaving) {
            self.end(&mut leaving);
            self.leaving.push(leaving);
        }
        let more: Vec<AreaId> = {
            let mut state = self.leases.state.lock();
            let leased = state.slabs.iter().filter(|slab| slab.key.is_some());
            let leased: Vec<AreaId> = leased.map(|slab| slab.area.id).collect();
            (leased.into_iter())
                .filter(|slab| state.slabs.close(*slab, Draining::now()))
                .collect()
        };
        for slab in more {
            self.begin(slab, false);
        }
    }

    /// Nothing in the slab is worth waiting for any more.
    fn end(&self, leaving: &mut Leaving) {
        leaving.stage = Stage::Ending;
        self.holder.forget(leaving.slab);
    }

    /// Brings everything as far as it gets without waiting. True when something changed.
    fn advance(&mut self) -> bool {
        self.moving = self.holder.advance();
        let mut changed = self.moving == Progress::Changed;
        for mut leaving in std::mem::take(&mut self.leaving) {
            let before = leaving.stage;
            let gone = self.advance_slab(&mut leaving);
            changed |= gone || leaving.stage != before;
            if !gone {
                self.leaving.push(leaving);
            }
        }
        changed | self.tell_released()
    }

    /// Tells the broker of leases that were let go of: of as many at once as there are.
    fn tell_released(&mut self) -> bool {
        let before = self.telling.len();
        self.telling.retain_mut(|call| match call.try_take() {
            Some(Ok(())) => false,
            Some(Err(error)) => {
                debug!(%error, "the broker was not told of leases given back; the next resumption tells it");
                false
            }
            None => true,
        });
        let told = self.telling.len() < before;
        let released = std::mem::take(&mut self.released);
        if let (false, Some(session)) = (released.is_empty(), self.leases.connected()) {
            // A holder that closes leaves what it has published to its heir.
            self.telling.push(match self.closing {
                true => session.bequeath(released),
                false => session.release(released),
            });
            return true;
        }
        told
    }

    /// Brings one slab as far as it gets. True when it is gone.
    fn advance_slab(&mut self, leaving: &mut Leaving) -> bool {
        let slab = leaving.slab;
        let Some(facts) = self.leases.facts(slab) else {
            return true;
        };
        if facts.draining.refused && leaving.stage != Stage::Ending {
            self.end(leaving);
        }
        if let Stage::Moving { until } = leaving.stage
            && (!self.holder.is_moving(slab) || Instant::now() >= until)
        {
            let took = micros_since(facts.draining.since);
            let mut state = self.leases.state.lock();
            state.counts.drain.saturating_record(took);
            drop(state);
            self.end(leaving);
        }
        leaving.stage == Stage::Ending && self.let_go(leaving)
    }

    /// Lets go of a slab with nothing in it, if no transfer touches it any more and it is known where its blocks went.
    fn let_go(&mut self, leaving: &Leaving) -> bool {
        let slab = leaving.slab;
        if self.holder.is_moving(slab) || !self.leases.is_untouched(slab) {
            return false;
        }
        let Some(Facts {
            key,
            hold,
            draining,
        }) = self.leases.facts(slab)
        else {
            return true;
        };
        let Some(key) = key else { return true };
        self.holder.forget(slab);
        let gone: Option<Box<Slab>> = self.leases.state.lock().slabs.remove(slab);
        // Unmaps before anyone is told.
        drop(gone);
        if !leaving.revoked {
            if hold == Hold::Own {
                self.released.push(key.lease);
            }
            return true;
        }
        // Nobody waits for the acknowledgement of a lease that was refused.
        if !draining.refused {
            let took = micros_since(draining.since);
            let mut state = self.leases.state.lock();
            state.counts.acknowledge.saturating_record(took);
            drop(state);
            if let Some(session) = &self.leases.session {
                session.acknowledge(key.lease, key.generation);
            }
            debug!(lease = %key.lease, took_us = took, "lease acknowledged");
        }
        true
    }
}
