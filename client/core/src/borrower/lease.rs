//! Leases: taken in steps, mapped once, given back when unused; and replicas' leases, opened for reading.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{LeaseId, LinkKind, RegionId, Shortfall};
use tonic::Code;
use tracing::{debug, info, warn};

use super::{
    blocks::List,
    core::Core,
    keeper::KeeperTask,
    slab::{Kind, LeaseKey, Slab},
    state::{Pending, State},
    unreadable::Lasting,
};
use crate::{
    Error, Result,
    session::{Call, Demand, Grant, Session},
    transfer::{BlockArea, RouteSet, Source},
};

/// When to ask again after the broker had nothing to lend.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// When to ask again at most after slabs were granted that cannot be mapped here: twice as long each time.
const ASK_AGAIN_UNMAPPED: Duration = Duration::from_secs(10);
/// When to ask again while slabs are being zeroed for this tenant.
const ASK_AGAIN_SCRUBBING: Duration = Duration::from_millis(20);

/// Regions that could not be mapped, remembered at a time.
const UNMAPPED_REMEMBERED: usize = 65_536;

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

/// Why a replica's lease is not open for reading.
#[derive(Clone, Copy, Debug)]
struct NotShared {
    lasting: Lasting,
    /// The broker may take this session for a reader.
    opened: bool,
    /// This process cannot map its memory.
    unmappable: bool,
}

impl NotShared {
    /// Revoked meanwhile, or answered by an earlier connection.
    const NOT_NOW: Self = Self {
        lasting: Lasting::Moment,
        opened: true,
        unmappable: false,
    };
    const OTHER_LAYOUT: Self = Self {
        lasting: Lasting::ForGood,
        opened: true,
        unmappable: false,
    };

    /// The broker did not open it; or nobody knows, and then the session reconnects and tells what it reads.
    fn refused(error: &Error) -> Self {
        let lasting = match error {
            // Otherwise: being revoked, its donor has not come back yet, or too many readers.
            Error::Refused { status, .. }
                if !matches!(
                    status.code(),
                    Code::FailedPrecondition | Code::ResourceExhausted
                ) =>
            {
                Lasting::ForGood
            }
            _ => Lasting::Moment,
        };
        Self {
            lasting,
            opened: false,
            unmappable: false,
        }
    }

    fn unmapped(error: &Error) -> Self {
        let unmappable = matches!(error, Error::Device(_));
        Self {
            lasting: match unmappable {
                true => Lasting::ForGood,
                false => Lasting::Moment,
            },
            opened: true,
            unmappable,
        }
    }
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
        u64::from(state.free_slots(List::Donor, RouteSet::ALL)) < step.max(1)
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
                let mut regions = Vec::new();
                for grant in leased.grants {
                    let unmappable = match self.adopt(session, &grant, leased.epoch, false) {
                        Adopted::Yes => {
                            adopted += 1;
                            continue;
                        }
                        Adopted::No => false,
                        Adopted::Unmapped(error) => {
                            regions.push(grant.region);
                            let unmappable = matches!(error, Error::Device(_));
                            unmapped = Some(error);
                            unmappable
                        }
                    };
                    turned_down.push((grant.lease, unmappable));
                }
                if adopted == 0
                    && let Some(error) = &unmapped
                {
                    let pause = self.state.lock().pause_after(&regions);
                    let slabs = turned_down.len();
                    warn!(%error, slabs, ?pause, "granted slabs cannot be mapped");
                    again = Some(pause);
                } else if leased.shortfall == Shortfall::Scrubbing {
                    again = Some(ASK_AGAIN_SCRUBBING);
                } else if adopted == 0 {
                    debug!(shortfall = ?leased.shortfall, "the broker has nothing to lend");
                    again = Some(ASK_AGAIN);
                }
                for (lease, unmappable) in turned_down {
                    // One by one: some may be over already, which the broker says and nobody minds.
                    let _ = give_back(session, lease, unmappable).wait();
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

    /// Opens a replica's lease for reading. Blocks the caller, the first time only, for the broker and the mapping. What
    /// is opened in vain is given back, and not opened again.
    pub(super) fn share(&self, session: &Session, lease: LeaseId) -> bool {
        {
            let mut state = self.state.lock();
            let now = Instant::now();
            if state.grants_in_flight == 0 {
                state.unreadable.expire(now);
            }
            if state.unreadable.contains(lease, now) {
                return false;
            }
            state.grants_in_flight += 1;
        }
        let failed = match session.share(lease, self.config.device.clone()).wait() {
            Ok((grant, epoch)) => self.open_shared(session, &grant, epoch).err(),
            Err(error) => {
                debug!(%error, %lease, "a replica's lease cannot be read");
                Some(NotShared::refused(&error))
            }
        };
        if let Some(failed) = failed {
            self.give_share_back(lease, failed);
        }
        self.state.lock().end_grant_call();
        failed.is_none()
    }

    fn open_shared(
        &self,
        session: &Session,
        grant: &Grant,
        epoch: u64,
    ) -> std::result::Result<(), NotShared> {
        let lease = grant.lease;
        let own = self.config.layout.block_bytes();
        if grant.block_bytes != own {
            let theirs = grant.block_bytes;
            warn!(%lease, own, theirs, "a replica's lease holds blocks of another size");
            return Err(NotShared::OTHER_LAYOUT);
        }
        match self.adopt(session, grant, epoch, true) {
            Adopted::Yes => Ok(()),
            Adopted::No => Err(NotShared::NOT_NOW),
            Adopted::Unmapped(error) => {
                warn!(%error, %lease, "a replica's slab cannot be mapped");
                Err(NotShared::unmapped(&error))
            }
        }
    }

    /// Nothing of the lease is read: remembers that, and has the broker told if it may take this session for a reader.
    fn give_share_back(&self, lease: LeaseId, failed: NotShared) {
        let mut state = self.state.lock();
        // Another thread has opened it, or is about to.
        if state.slabs.of_lease(lease).is_some() || state.pending.contains_key(&lease) {
            return;
        }
        state.unreadable.add(lease, failed.lasting, Instant::now());
        if failed.opened {
            state.unreadable.begin_giving_back(lease);
            let unmappable = failed.unmappable;
            // A keeper that is gone means that the borrower is closing: so is the session, or its next connection tells.
            let _ = (self.keeper).send(KeeperTask::GiveBack { lease, unmappable });
        }
    }

    /// Tells the broker that a replica's lease is not read after all.
    pub(super) fn tell_unread(&self, lease: LeaseId, unmappable: bool) {
        if let Some(session) = self.connected() {
            // Nothing to give back, or the next connection's resumption gives it back.
            if let Err(error) = give_back(session, lease, unmappable).wait() {
                debug!(%error, %lease, "a replica's lease was not given back");
            }
        }
        self.state.lock().unreadable.end_giving_back(lease);
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
            // Opened in vain before: the broker is being told so.
            let given_back = shared && state.unreadable.contains(grant.lease, Instant::now());
            let revoked = state.revoked_early.contains(&grant.lease) || given_back;
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
            Ok(area) if !taken => {
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
                state.slabs.insert(Slab::new(kind, grant.slab_bytes, area));
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

    fn map(&self, session: &Session, grant: &Grant) -> Result<BlockArea> {
        let route = self.routes.to(Source::Device(grant.device.clone()))?;
        let device = &self.config.device;
        let mapping = self
            .mappings
            .open(session, self.layer.as_ref(), device, grant)?;
        let layers = &self.config.layout.layer_bytes;
        let memory = mapping.memory.clone();
        let (base, slots, link) = (grant.offset, grant.slots, grant.link);
        let area = BlockArea::new(memory, base, slots, layers, link, route);
        Ok(area.keeping(mapping))
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
        let route = self.routes.to(Source::Host)?;
        let layers = &self.config.layout.layer_bytes;
        let area = BlockArea::new(memory, 0, slots, layers, LinkKind::Host, route);
        let slab = Slab::new(Kind::Host, bytes, area);
        let mut state = self.state.lock();
        state.slabs.insert(slab);
        if self.session.is_some() {
            state.blocks.host_news.gather();
        }
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
            let mut free = u64::from(state.free_slots(List::Donor, RouteSet::ALL));
            let mut candidates = state.slabs.placement.clone();
            candidates.reverse();
            for index in candidates {
                let Some(slab) = state.slabs.get(index) else {
                    continue;
                };
                let Kind::Own(key) = slab.kind else { continue };
                let slots = u64::from(slab.area.slots);
                let unused = slab.is_active()
                    && slab.occupied == 0
                    && slab.ops.is_empty()
                    && slab.slots.free() == slab.area.slots
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

/// Tells the broker that a lease is not held, or not read; perhaps because its memory cannot be mapped.
fn give_back(session: &Session, lease: LeaseId, unmappable: bool) -> Call<()> {
    match unmappable {
        true => session.cannot_map(vec![lease]),
        false => session.release(vec![lease]),
    }
}

impl State {
    /// How long to leave the broker alone after slabs of these regions were granted, which cannot be mapped. A broker
    /// that is told so grants others next. An older one grants the same again, and what keeps this process from them
    /// may last.
    fn pause_after(&mut self, regions: &[RegionId]) -> Duration {
        if self.unmapped.len() > UNMAPPED_REMEMBERED {
            self.unmapped.clear();
        }
        let known = self.unmapped.len();
        self.unmapped.extend(regions);
        match self.unmapped.len() > known {
            true => ASK_AGAIN,
            false => self.longer_map_pause(),
        }
    }

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
    use crate::{
        borrower::tests::{device, layer},
        transfer::Routes,
    };

    fn state() -> State {
        State::new(Arc::new(Routes::new(layer(), device())))
    }

    #[test]
    fn while_others_are_granted_the_broker_is_asked_soon() {
        let mut state = state();
        let region = |n| RegionId([n; 16]);
        for n in 0..5 {
            assert_eq!(state.pause_after(&[region(n), region(0)]), ASK_AGAIN);
        }
        // The twin: a broker that grants the same again.
        let pauses: Vec<u128> = (0..3)
            .map(|_| state.pause_after(&[region(0), region(4)]).as_millis())
            .collect();
        assert_eq!(pauses, [200, 400, 800]);
    }

    #[test]
    fn what_cannot_be_mapped_is_asked_for_less_and_less_often() {
        let mut state = state();
        let pauses: Vec<u128> = (0..8)
            .map(|_| state.longer_map_pause().as_millis())
            .collect();
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
    }
}
