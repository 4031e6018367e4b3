//! Revocations as they come in: no new copy touches the slab from then on. Letting go of it is `drain_loop`'s.

use std::time::{Duration, Instant};

use tracing::info;

use super::{
    core::Core,
    slab::{Draining, Kind, LeaseKey},
    state::State,
};
use crate::{
    session::{Connected, Held, Observer, Revocation},
    transfer::AreaId,
};

/// What the draining thread is asked to do.
#[derive(Debug)]
pub(super) enum DrainTask {
    /// Let go of a slab that is marked as draining.
    LetGo(AreaId),
    /// The borrower closes: let go of everything, and end.
    Close,
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
        let refused: Vec<AreaId> = (state.slabs.iter())
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
    fn stop_using(&self, state: &mut State, index: AreaId, window: Duration, refused: bool) {
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
                op.transfer.poison();
            }
            state.slabs.refuse(index);
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
