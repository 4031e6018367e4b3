//! Leases: taken in steps, mapped once, given back when unused; and replicas' leases, opened for reading.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{LeaseId, LinkKind, Shortfall};
use tracing::{debug, info, warn};

use super::{
    blocks::List,
    core::{Core, Source},
    keeper::KeeperTask,
    slab::{Kind, LeaseKey, Slab, SlabMemory},
    state::{Pending, State},
};
use crate::{
    Error, Result,
    session::{Demand, Grant, Session},
};

/// When to ask again after the broker had nothing to lend.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// When to ask again at most after slabs were granted that cannot be mapped here: twice as long each time.
const ASK_AGAIN_UNMAPPED: Duration = Duration::from_secs(10);
/// When to ask again while slabs are being zeroed for this tenant.
const ASK_AGAIN_SCRUBBING: Duration = Duration::from_millis(20);

/// What became of a grant.
#[derive(Debug)]
enum Adopted {
    /// It is in use.
    Yes,
    /// It must not be used, or not any more.
    No,
    /// It cannot be mapped in this process.
    Unmapped(Error),
}

impl Core {
    /// Whether another lease could be had, as far as is known here.
    pub(super) fn may_grow(&self, state: &State) -> bool {
        let most = self.config.max_leased_bytes;
        let next = state.slab_bytes.unwrap_or(1);
        self.connected().is_some()
            && state.leased_bytes().saturating_add(next) <= most
            && Instant::now() >= state.grow_after
    }

    /// Has the keeper lease more.
    pub(super) fn grow_soon(&self) {
        // A keeper that is gone means that the borrower is closing.
        let _ = self.keeper.send(KeeperTask::Grow);
    }

    /// Whether there is less free room than one step: the next stores should find it.
    pub(super) fn wants_room(&self, state: &State) -> bool {
        let step = self.config.lease_step_bytes / self.config.layout.block_bytes();
        u64::from(state.free_slots(List::Donor)) < step.max(1)
    }

    /// Leases one step more. True when something was granted.
    pub(super) fn grow(self: &Arc<Self>) -> bool {
        let Some(session) = self.connected() else {
            return false;
        };
        let demand = {
            let mut state = self.state.lock();
            let left = (self.config.max_leased_bytes).saturating_sub(state.leased_bytes());
            if !self.may_grow(&state) {
                return false;
            }
            state.grants_in_flight += 1;
            Demand {
                namespace: self.config.layout.namespace.clone(),
                device: self.config.device.clone(),
                bytes: self.config.lease_step_bytes.min(left),
                block_bytes: self.config.layout.block_bytes(),
            }
        };
        let leased = session.lease(demand).wait();
        let mut adopted = 0;
        let mut unmapped = None;
        let mut again = None;
        match leased {
            Ok(leased) => {
                let mut turned_down = Vec::new();
                for grant in leased.grants {
                    match self.adopt(session, &grant, leased.epoch, false) {
                        Adopted::Yes => {
                            adopted += 1;
                            continue;
                        }
                        Adopted::No => {}
                        Adopted::Unmapped(error) => unmapped = Some(error),
                    }
                    turned_down.push(grant.lease);
                }
                if adopted == 0
                    && let Some(error) = &unmapped
                {
                    // The broker would grant the same again: what keeps this process from it may last.
                    let pause = self.state.lock().longer_map_pause();
                    let slabs = turned_down.len();
                    warn!(%error, slabs, ?pause, "granted slabs cannot be mapped");
                    again = Some(pause);
                } else if leased.shortfall == Shortfall::Scrubbing {
                    again = Some(ASK_AGAIN_SCRUBBING);
                } else if adopted == 0 {
                    debug!(shortfall = ?leased.shortfall, "the broker has nothing to lend");
                    again = Some(ASK_AGAIN);
                }
                for lease in turned_down {
                    // One by one: some may be over already, which the broker says and nobody minds.
                    let _ = session.release(vec![lease]).wait();
                }
            }
            Err(error) => {
                debug!(%error, "no lease");
                again = Some(ASK_AGAIN);
            }
        }
        let mut state = self.state.lock();
        if let Some(again) = again {
            state.grow_after = Instant::now() + again;
        }
        state.end_grant_call();
        adopted > 0
    }

    /// Opens a replica's lease for reading. Blocks the caller, the first time only, for the broker and the mapping.
    pub(super) fn share(&self, session: &Session, lease: LeaseId) -> bool {
        self.state.lock().grants_in_flight += 1;
        let shared = match session.share(lease, self.config.device.clone()).wait() {
            Ok((grant, epoch)) => {
                grant.block_bytes == self.config.layout.block_bytes()
                    && match self.adopt(session, &grant, epoch, true) {
                        Adopted::Yes => true,
                        Adopted::No => false,
                        Adopted::Unmapped(error) => {
                            warn!(%error, %lease, "a replica's slab cannot be mapped");
                            false
                        }
                    }
            }
            Err(error) => {
                debug!(%error, %lease, "a replica's lease cannot be read");
                false
            }
        };
        self.state.lock().end_grant_call();
        shared
    }

    /// Maps a granted slab and takes it into use. Otherwise an own lease is the caller's to release.
    fn adopt(&self, session: &Session, grant: &Grant, epoch: u64, shared: bool) -> Adopted {
        {
            let mut state = self.state.lock();
            let most = self.config.max_leased_bytes;
            state.slab_bytes = Some(
                (state.slab_bytes).map_or(grant.slab_bytes, |seen| seen.min(grant.slab_bytes)),
            );
            let too_much = !shared && state.leased_bytes() + grant.slab_bytes > most;
            // A grant of an earlier connection: the broker has been told since that it is not held.
            let stale = session.epoch() != epoch;
            let revoked = state.revoked_early.contains(&grant.lease);
            let known = state.slabs.of_lease(grant.lease).is_some()
                || state.pending.contains_key(&grant.lease);
            if too_much || stale || revoked || known {
                return if known && shared {
                    Adopted::Yes
                } else {
                    Adopted::No
                };
            }
            let pending = Pending {
                shared,
                bytes: grant.slab_bytes,
                revoked: false,
                refused: false,
            };
            state.pending.insert(grant.lease, pending);
        }
        // From here on the lease is claimed when the session resumes, and its revocations are remembered.
        let mapped = self.map(session, grant);
        let mut state = self.state.lock();
        let pending = state.pending.remove(&grant.lease);
        let taken = pending.is_none_or(|pending| pending.revoked || pending.refused);
        match mapped {
            Ok(memory) if !taken => {
                let key = LeaseKey {
                    lease: grant.lease,
                    generation: grant.generation,
                };
                let kind = if shared {
                    Kind::Shared(key)
                } else {
                    Kind::Own(key)
                };
                info!(
                    lease = %grant.lease, bytes = grant.slab_bytes, device = %grant.device,
                    link = %grant.link, slots = grant.slots, shared, "lease mapped"
                );
                state
                    .slabs
                    .insert(Slab::new(kind, grant.slab_bytes, memory));
                state.map_pause = Duration::ZERO;
                Adopted::Yes
            }
            outcome => {
                drop(state);
                // Unmaps before anyone is told.
                let error = outcome.map(drop).err();
                if pending.is_some_and(|pending| pending.revoked) {
                    session.acknowledge(grant.lease, grant.generation);
                }
                error.map_or(Adopted::No, Adopted::Unmapped)
            }
        }
    }

    fn map(&self, session: &Session, grant: &Grant) -> Result<SlabMemory> {
        let streams = self.streams(Source::Device(grant.device.clone()))?;
        let device = &self.config.device;
        let mapping = self
            .mappings
            .open(session, self.layer.as_ref(), device, grant)?;
        let layers = &self.config.layout.layer_bytes;
        Ok(SlabMemory::new(
            mapping.memory.clone(),
            grant.offset,
            grant.slots,
            layers,
            grant.link,
            streams,
            Some(mapping),
        ))
    }

    /// Takes the host tier's memory into use.
    pub(super) fn open_host_tier(&self) -> Result<()> {
        let block_bytes = self.config.layout.block_bytes();
        let slots = self.config.host_tier_bytes / block_bytes;
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        if slots == 0 {
            return Ok(());
        }
        let bytes = u64::from(slots) * block_bytes;
        let memory = self.layer.allocate_host(&self.config.device, bytes)?;
        let streams = self.streams(Source::Host)?;
        let layers = &self.config.layout.layer_bytes;
        let memory = SlabMemory::new(memory, 0, slots, layers, LinkKind::Host, streams, None);
        let slab = Slab::new(Kind::Host, bytes, memory);
        self.state.lock().slabs.insert(slab);
        Ok(())
    }

    /// Gives back leases that have held nothing for a while, as long as a step's room is left.
    pub(super) fn release_idle(&self) {
        let Some(session) = self.connected() else {
            return;
        };
        let now = Instant::now();
        let step = self.config.lease_step_bytes / self.config.layout.block_bytes();
        let mut idle = Vec::new();
        {
            let mut state = self.state.lock();
            let mut free = u64::from(state.free_slots(List::Donor));
            let mut candidates = state.slabs.placement.clone();
            candidates.reverse();
            for index in candidates {
                let Some(slab) = state.slabs.get(index) else {
                    continue;
                };
                let Kind::Own(key) = slab.kind else { continue };
                let slots = u64::from(slab.memory.slots);
                let unused = slab.is_active()
                    && slab.occupied == 0
                    && slab.ops.is_empty()
                    && slab.slots.free() == slab.memory.slots
                    && now.duration_since(slab.empty_since) >= self.config.idle_release;
                if unused && free >= slots + step.max(1) {
                    free -= slots;
                    idle.push((key.lease, state.slabs.remove(index)));
                }
            }
        }
        if idle.is_empty() {
            return;
        }
        let leases: Vec<LeaseId> = idle.iter().map(|(lease, _)| *lease).collect();
        info!(leases = leases.len(), "giving unused leases back");
        // Unmaps first.
        drop(idle);
        if let Err(error) = session.release(leases).wait() {
            debug!(%error, "unused leases not released; the next resumption does");
        }
    }
}

impl State {
    /// How long to leave the broker alone after slabs were granted that cannot be mapped: longer each time in a row.
    fn longer_map_pause(&mut self) -> Duration {
        let longer = (2 * self.map_pause).clamp(ASK_AGAIN, ASK_AGAIN_UNMAPPED);
        self.map_pause = longer;
        longer
    }

    fn end_grant_call(&mut self) {
        self.grants_in_flight -= 1;
        if self.grants_in_flight == 0 {
            self.revoked_early.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_mapped_is_asked_for_less_and_less_often() {
        let mut state = State::new();
        let pauses: Vec<u128> = (0..8)
            .map(|_| state.longer_map_pause().as_millis())
            .collect();
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
    }
}
