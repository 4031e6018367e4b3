//! Revocations as they come in: no new transfer touches the slab from then on. Letting go of it is `drain`'s.

use std::time::{Duration, Instant};

use tracing::debug;

use super::{
    core::{Leases, RecallTask},
    slabs::{ByMedium, Draining},
    state::State,
};
use crate::{
    session::{Connected, Held, Observer, Revocation},
    transfer::AreaId,
};

/// Called on the session's thread. Everything that must happen at once happens here, under the lock; the rest is the draining
/// thread's.
impl Observer for Leases {
    fn held(&self) -> Held {
        self.state.lock().held()
    }

    fn revoked(&self, revocation: &Revocation) -> bool {
        let mut state = self.state.lock();
        state.counts.revocations += 1;
        let found = state.slabs.of_lease(revocation.lease);
        let found = found.map(|slab| (slab.area.id, slab.key.map(|key| key.generation)));
        if let Some((slab, generation)) = found
            && generation == Some(revocation.generation)
        {
            let window = Duration::from_millis(revocation.drain_ms.into());
            debug!(lease = %revocation.lease, reason = %revocation.reason, ?window, "lease revoked");
            self.recall(&mut state, slab, window);
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
        let is_refused = |lease| connected.replaced || connected.refused.contains(&lease);
        let slabs = state.slabs.iter();
        let refused = slabs.filter(|slab| slab.key.is_some_and(|key| is_refused(key.lease)));
        let refused: Vec<AreaId> = refused.map(|slab| slab.area.id).collect();
        for slab in refused {
            state.counts.refused += 1;
            self.recall(&mut state, slab, Duration::ZERO);
            state.slabs.refuse(slab);
        }
        for (lease, pending) in &mut state.pending {
            pending.refused |= is_refused(*lease);
        }
        state.grow_after = Instant::now();
        state.asked_in_vain = ByMedium::default();
        drop(state);
        self.grow_soon();
    }
}

impl Leases {
    /// From here on no transfer that touches the slab begins.
    fn recall(&self, state: &mut State, slab: AreaId, window: Duration) {
        let draining = Draining {
            window,
            ..Draining::now()
        };
        // Already being let go of: sent again after a lost stream, or refused meanwhile.
        if state.slabs.close(slab, draining) {
            let revoked = true;
            // A draining thread that is gone means that the holder is closing.
            let _ = self.recalls.send(RecallTask::LetGo { slab, revoked });
        }
    }
}
