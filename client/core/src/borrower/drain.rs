//! Revocation: stop new copies, rescue hot blocks, wait for copies in flight, unmap, acknowledge.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use tracing::{debug, info};

use super::{
    core::Core,
    rescue::Rescue,
    slab::{Draining, Kind, LeaseKey, SlabIndex},
    state::{State, micros_since},
};
use crate::session::{Connected, Held, Observer, Revocation};

/// What the draining thread is asked to do.
#[derive(Debug)]
pub(super) enum DrainTask {
    /// Let go of a slab that is marked as draining.
    LetGo(SlabIndex),
    Stop,
}

/// Called on the session's thread. Everything that must happen at once happens here, under the state's lock; the
/// rest is the draining thread's.
impl Observer for Core {
    fn held(&self) -> Held {
        self.state.lock().held()
    }

    fn revoked(&self, revocation: &Revocation) -> bool {
        let mut state = self.state.lock();
        state.counts.revocations += 1;
        let found = state.slabs.of_lease(revocation.lease);
        if let Some((index, slab)) = found
            && slab.kind.key().map(|key| key.generation) == Some(revocation.generation)
        {
            let window = Duration::from_millis(revocation.drain_ms.into());
            info!(lease = %revocation.lease, reason = %revocation.reason, ?window, "lease revoked");
            self.stop_using(&mut state, index, window, false);
            return true;
        }
        if let Some(pending) = state.pending.get_mut(&revocation.lease) {
            pending.revoked = true;
            return true;
        }
        // Perhaps the grant is still on its way: it must not be used when it comes. Nothing is mapped yet, so the
        // session may acknowledge at once.
        if state.grants_in_flight > 0 {
            state.revoked_early.insert(revocation.lease);
        }
        false
    }

    fn connected(&self, connected: &Connected) {
        let mut state = self.state.lock();
        let refused: Vec<SlabIndex> = (state.slabs.iter())
            .filter(|(_, slab)| {
                (slab.kind.key())
                    .is_some_and(|key| connected.replaced || connected.refused.contains(&key.lease))
            })
            .map(|(index, _)| index)
            .collect();
        for index in refused {
            state.counts.refused_leases += 1;
            self.stop_using(&mut state, index, Duration::ZERO, true);
        }
        for (lease, pending) in &mut state.pending {
            pending.refused |= connected.replaced || connected.refused.contains(lease);
        }
        drop(state);
        // A keeper that is gone means that the borrower is closing.
        let _ = (self.keeper).send(super::keeper::KeeperTask::Connected {
            restarted: connected.restarted,
        });
    }
}

impl Core {
    /// From here on no copy that touches the slab begins.
    fn stop_using(&self, state: &mut State, index: SlabIndex, window: Duration, refused: bool) {
        let Some(slab) = state.slabs.get_mut(index) else {
            return;
        };
        // Already being drained: sent again after a lost stream, or refused meanwhile.
        if slab.draining.is_none() {
            slab.draining = Some(Draining {
                since: Instant::now(),
                window,
                refused: false,
            });
            // A draining thread that is gone means that the borrower is closing.
            let _ = self.drains.send(DrainTask::LetGo(index));
        }
        if refused {
            for op in &slab.ops {
                op.poison();
            }
            state.slabs.refuse(index);
        }
    }

    /// The draining thread. Slabs that are revoked together are drained together, so that what little room there is
    /// goes to the hottest blocks of them all.
    pub(super) fn drain_loop(self: &Arc<Self>, inbox: &mpsc::Receiver<DrainTask>) {
        while let Ok(DrainTask::LetGo(index)) = inbox.recv() {
            let mut rescue = Rescue::default();
            self.begin(index, &mut rescue);
            while !rescue.is_over() {
                loop {
                    match inbox.try_recv() {
                        Ok(DrainTask::LetGo(index)) => self.begin(index, &mut rescue),
                        Ok(DrainTask::Stop) => {
                            self.abandon(rescue);
                            return;
                        }
                        Err(_) => break,
                    }
                }
                self.rescue_some(&mut rescue);
            }
        }
    }

    /// Lets go of a slab, now or when its blocks have been rescued.
    fn begin(self: &Arc<Self>, index: SlabIndex, rescue: &mut Rescue) {
        let Some((kind, draining)) = self.draining(index) else {
            return;
        };
        let own = matches!(kind, Kind::Own(_));
        if own && !draining.refused && self.config.drain.move_blocks {
            let window = (draining.window / 2).min(self.config.drain.move_for);
            self.begin_rescue(index, draining.since + window, rescue);
        } else {
            self.let_go(index);
        }
    }

    /// Nothing in the slab is worth waiting for any more.
    pub(super) fn let_go(self: &Arc<Self>, index: SlabIndex) {
        let Some((kind, draining)) = self.draining(index) else {
            return;
        };
        let Some(key) = kind.key() else { return };
        self.drop_blocks(index);
        self.wait_for_copies(index);
        let mut state = self.state.lock();
        // Refused meanwhile, perhaps: then nobody waits for an acknowledgement.
        let refused = (state.slabs.get(index))
            .and_then(|slab| slab.draining)
            .is_none_or(|draining| draining.refused);
        let slab = state.slabs.remove(index);
        drop(state);
        // Unmaps before anyone is told.
        drop(slab);
        if refused {
            return;
        }
        let took = micros_since(draining.since);
        self.state.lock().acknowledge.saturating_record(took);
        if let Some(session) = &self.session {
            session.acknowledge(key.lease, key.generation);
        }
        debug!(lease = %key.lease, took_us = took, "lease acknowledged");
    }

    fn draining(&self, index: SlabIndex) -> Option<(Kind, Draining)> {
        let state = self.state.lock();
        let slab = state.slabs.get(index)?;
        Some((slab.kind, slab.draining?))
    }

    /// Forgets what is left in a slab.
    fn drop_blocks(&self, index: SlabIndex) {
        let mut state = self.state.lock();
        let occupants = state.slabs.get(index).map(|slab| slab.occupants.clone());
        for id in occupants.unwrap_or_default().into_iter().flatten() {
            if state.lose(id).is_some() {
                state.counts.dropped_blocks += 1;
            }
        }
    }

    /// Waits until no copy touches the slab. None can begin: the slab is draining.
    fn wait_for_copies(&self, index: SlabIndex) {
        loop {
            let op = {
                let state = self.state.lock();
                let slab = state.slabs.get(index);
                slab.and_then(|slab| slab.ops.first().cloned())
            };
            let Some(op) = op else { return };
            // A copy that failed is over like any other.
            if let Err(error) = op.wait() {
                debug!(%error, "copies that a revocation waited for had failed");
            }
            if let Some(slab) = self.state.lock().slabs.get_mut(index) {
                slab.end_op(&op);
            }
        }
    }

    /// Lets go of everything: no copy is in flight afterwards, and no lease held.
    pub(super) fn close(self: &Arc<Self>) {
        let mut hosts = Vec::new();
        let leased: Vec<(SlabIndex, LeaseKey, bool)> = {
            let mut state = self.state.lock();
            let mut leased = Vec::new();
            for (index, slab) in state.slabs.iter_mut() {
                if slab.kind == Kind::Host {
                    hosts.push(index);
                }
                if let Some(key) = slab.kind.key() {
                    slab.draining.get_or_insert(Draining {
                        since: Instant::now(),
                        window: Duration::ZERO,
                        refused: false,
                    });
                    leased.push((index, key, matches!(slab.kind, Kind::Own(_))));
                }
            }
            leased
        };
        for host in hosts {
            self.wait_for_copies(host);
        }
        if let Some(session) = self.connected() {
            self.tell_closed(session);
        }
        let mut released = Vec::new();
        for (index, key, own) in leased {
            self.drop_blocks(index);
            self.wait_for_copies(index);
            let slab = self.state.lock().slabs.remove(index);
            // Unmaps before anyone is told.
            drop(slab);
            if own {
                released.push(key.lease);
            }
        }
        if !released.is_empty()
            && let Some(session) = self.connected()
            && let Err(error) = session.release(released).wait()
        {
            debug!(%error, "leases not released; leaving does");
        }
    }
}

impl Kind {
    /// The lease behind a slab, if there is one.
    pub(super) fn key(&self) -> Option<LeaseKey> {
        match self {
            Self::Own(key) | Self::Shared(key) => Some(*key),
            Self::Host => None,
        }
    }
}
