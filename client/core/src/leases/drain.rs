//! The draining thread: lets go of slabs. What is worth moving out of each is moved first, by its holder; when its last transfer is
//! known to be over, it is unmapped and acknowledged. The thread looks at all of them in turn and waits for none, so that a slow
//! copy holds up the slabs that it touches and no others.

use std::{
    sync::{Arc, mpsc},
    time::Instant,
};

use foldhash::fast::RandomState;
use hashbrown::HashSet;
use swiftcache_proto::domain::{Hold, LeaseId};
use tracing::debug;

use super::{
    core::{Leases, RecallTask},
    holder::{Holder, Progress},
    slabs::{Draining, Flight},
    state::micros_since,
};
use crate::{
    session::Call,
    transfer::{AreaId, Pace},
};

/// A slab on its way out.
#[derive(Clone, Copy, Debug)]
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
            let (mut asked_back, mut given_up, mut close) = (Vec::new(), Vec::new(), false);
            for task in first.into_iter().chain(inbox.try_iter()) {
                match task {
                    RecallTask::LetGo {
                        slab,
                        revoked: true,
                    } => asked_back.push(slab),
                    RecallTask::LetGo { slab, .. } => given_up.push(slab),
                    RecallTask::Close => close = true,
                }
                pace.go_on();
            }
            drains.begin(&asked_back, true);
            drains.begin(&given_up, false);
            if close {
                drains.close();
            }
            if drains.advance() {
                pace.go_on();
            }
            if drains.closing && drains.is_over() {
                return;
            }
        }
    }

    /// What is known of each of these slabs that is there and being let go of.
    fn facts(&self, slabs: impl Iterator<Item = AreaId>) -> Vec<Option<Facts>> {
        let state = self.state.lock();
        let facts = |slab| {
            let slab = state.slabs.get(slab)?;
            Some(Facts {
                hold: slab.hold,
                draining: slab.draining?,
            })
        };
        slabs.map(facts).collect()
    }

    /// Those of these slabs of which it is known that no transfer touches them. None can begin: the slabs are closed.
    fn untouched(&self, slabs: &[AreaId]) -> Vec<AreaId> {
        if slabs.is_empty() {
            return Vec::new();
        }
        let flights: Vec<Vec<Arc<Flight>>> = {
            let state = self.state.lock();
            let flights = |slab| {
                let slab = state.slabs.get(slab);
                slab.map_or_else(Vec::new, |slab| slab.flights.clone())
            };
            slabs.iter().map(|slab| flights(*slab)).collect()
        };
        // Asked outside the lock: a stream that lets go of memories may unmap.
        let mut untouched = Vec::new();
        let mut over = Vec::new();
        for (slab, flights) in slabs.iter().zip(flights) {
            let (ended, going): (Vec<_>, Vec<_>) =
                (flights.into_iter()).partition(|flight| flight.transfer.is_over());
            if going.is_empty() {
                untouched.push(*slab);
            }
            over.extend(ended.into_iter().map(|flight| (*slab, flight)));
        }
        if !over.is_empty() {
            let mut state = self.state.lock();
            for (slab, flight) in &over {
                if let Some(slab) = state.slabs.get_mut(*slab) {
                    slab.end(flight);
                }
            }
        }
        untouched
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
        let untouched = self.leases.untouched(&hosts).len() == hosts.len();
        let told = self.released.is_empty() && self.telling.is_empty();
        untouched && told && self.leaving.is_empty() && self.moving == Progress::Idle
    }

    /// Begins to let go of slabs.
    fn begin(&mut self, slabs: &[AreaId], revoked: bool) {
        if slabs.is_empty() {
            return;
        }
        let facts = self.leases.facts(slabs.iter().copied());
        let mut ending = Vec::new();
        for (slab, facts) in slabs.iter().zip(facts) {
            let Some(facts) = facts else {
                continue;
            };
            let worth_it = revoked && facts.hold == Hold::Own && !facts.draining.refused;
            let until = match worth_it && !self.closing {
                true => self.holder.evacuate(*slab, facts.draining.window),
                false => None,
            };
            let stage = match until {
                Some(until) => {
                    self.moving = Progress::Changed;
                    Stage::Moving { until }
                }
                None => {
                    ending.push(*slab);
                    Stage::Ending
                }
            };
            self.leaving.push(Leaving {
                slab: *slab,
                stage,
                revoked,
            });
        }
        self.forget(&ending);
    }

    /// Begins to let go of everything, as it is.
    fn close(&mut self) {
        if std::mem::replace(&mut self.closing, true) {
            return;
        }
        for leaving in &mut self.leaving {
            leaving.stage = Stage::Ending;
        }
        let ending: Vec<AreaId> = self.leaving.iter().map(|leaving| leaving.slab).collect();
        self.forget(&ending);
        let more: Vec<AreaId> = {
            let mut state = self.leases.state.lock();
            let leased = state.slabs.iter().filter(|slab| slab.key.is_some());
            let leased: Vec<AreaId> = leased.map(|slab| slab.area.id).collect();
            (leased.into_iter())
                .filter(|slab| state.slabs.close(*slab, Draining::now()))
                .collect()
        };
        self.begin(&more, false);
    }

    /// Nothing in these slabs is worth waiting for any more.
    fn forget(&self, slabs: &[AreaId]) {
        if !slabs.is_empty() {
            self.holder.forget(slabs);
        }
    }

    /// Brings everything as far as it gets without waiting. True when something changed.
    fn advance(&mut self) -> bool {
        self.moving = self.holder.advance();
        let mut changed = self.moving == Progress::Changed;
        if !self.leaving.is_empty() {
            changed |= self.end_moved();
            changed |= self.let_go();
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

    /// Ends the stay of slabs out of which nothing is moved any more, or in vain. True when there were any.
    fn end_moved(&mut self) -> bool {
        let facts = self
            .leases
            .facts(self.leaving.iter().map(|leaving| leaving.slab));
        let now = Instant::now();
        let mut ending = Vec::new();
        let mut took = Vec::new();
        for (leaving, facts) in self.leaving.iter_mut().zip(facts) {
            let (Some(facts), Stage::Moving { until }) = (facts, leaving.stage) else {
                continue;
            };
            let refused = facts.draining.refused;
            if refused || !self.holder.is_moving(leaving.slab) || now >= until {
                leaving.stage = Stage::Ending;
                ending.push(leaving.slab);
                if !refused {
                    took.push(micros_since(facts.draining.since));
                }
            }
        }
        if !took.is_empty() {
            let mut state = self.leases.state.lock();
            took.into_iter()
                .for_each(|took| state.counts.drain.saturating_record(took));
        }
        self.forget(&ending);
        !ending.is_empty()
    }

    /// Lets go of slabs with nothing in them that no transfer touches any more, if it is known where their blocks went. True when
    /// there were any.
    fn let_go(&mut self) -> bool {
        let ended = self.leaving.iter().filter(|leaving| {
            leaving.stage == Stage::Ending && !self.holder.is_moving(leaving.slab)
        });
        let ended: Vec<AreaId> = ended.map(|leaving| leaving.slab).collect();
        let untouched = self.leases.untouched(&ended);
        self.forget(&untouched);
        let untouched: HashSet<AreaId, RandomState> = untouched.into_iter().collect();
        let before = self.leaving.len();
        let mut gone: Vec<Leaving> = Vec::new();
        {
            let state = self.leases.state.lock();
            self.leaving.retain(|leaving| {
                let slab = state.slabs.get(leaving.slab);
                if slab.is_none_or(|slab| slab.key.is_none() || slab.draining.is_none()) {
                    return false;
                }
                if !untouched.contains(&leaving.slab) {
                    return true;
                }
                gone.push(*leaving);
                false
            });
        }
        for leaving in gone {
            self.unmap(leaving);
        }
        self.leaving.len() < before
    }

    /// Unmaps a slab, and tells the broker.
    fn unmap(&mut self, leaving: Leaving) {
        // Until then it is held, as who resumes the session tells the broker.
        let Some(slab) = self.leases.state.lock().slabs.remove(leaving.slab) else {
            return;
        };
        let (Some(key), Some(draining), hold) = (slab.key, slab.draining, slab.hold) else {
            return;
        };
        // Unmaps before anyone is told.
        drop(slab);
        if !leaving.revoked {
            if hold == Hold::Own {
                self.released.push(key.lease);
            }
            return;
        }
        // Nobody waits for the acknowledgement of a lease that was refused.
        if draining.refused {
            return;
        }
        let took = micros_since(draining.since);
        // Before the donor can have its memory: who has it back finds this counted.
        (self.leases.state.lock().counts.acknowledge).saturating_record(took);
        if let Some(session) = &self.leases.session {
            session.acknowledge(key.lease, key.generation);
        }
        debug!(lease = %key.lease, took_us = took, "lease acknowledged");
    }
}
