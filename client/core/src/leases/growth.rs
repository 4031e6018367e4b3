//! The leasing thread: takes leases in steps and maps each once, opens replicas' leases, tries routes that are down, and gives
//! back what nobody uses. Imports happen here, and on no request's path.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{Hold, Medium, RegionId, Shortfall};
use tracing::{debug, info, warn};

use super::{
    adopting::{Adopted, give_back},
    core::{GrowthTask, Leases, RecallTask},
    holder::{Holder, Wants},
    inheriting::Heir,
    probe::Prober,
    slabs::Draining,
    state::State,
};
use crate::{Error, session::Left, transfer::AreaId};

/// How often it is looked whether there is room, and whether slabs are of use.
const TICK: Duration = Duration::from_millis(50);
/// How often copies that try routes are looked after.
const PROBING: Duration = Duration::from_millis(5);

/// When to ask again after the broker had nothing to lend.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// When to ask again at most after slabs were granted that cannot be mapped here: twice as long each time.
const ASK_AGAIN_UNMAPPED: Duration = Duration::from_secs(10);
/// When to ask again while slabs are being zeroed for this tenant.
const ASK_AGAIN_SCRUBBING: Duration = Duration::from_millis(20);

/// Regions that could not be mapped, remembered at a time.
const UNMAPPED_REMEMBERED: usize = 65_536;

impl Leases {
    /// The leasing thread. Ends when it is told so.
    pub(super) fn growth_loop(&self, holder: &dyn Holder, inbox: &mpsc::Receiver<GrowthTask>) {
        let mut prober = Prober::default();
        let mut heir = Heir::default();
        loop {
            let pause = match prober.is_busy() {
                true => PROBING,
                false => TICK,
            };
            let task = inbox.recv_timeout(pause);
            // What was left comes before what is new.
            self.inherit(holder, &mut heir);
            match task {
                Ok(GrowthTask::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Ok(GrowthTask::Reserve { bytes, reply }) => {
                    let wants = || Wants {
                        hbm: true,
                        ..holder.wants()
                    };
                    while self.open_bytes() < bytes && self.grow(holder, wants()) {}
                    // The caller may have given up.
                    let _ = reply.send(self.open_bytes());
                }
                Ok(GrowthTask::Open(lease)) => self.open_share(holder, lease),
                Ok(GrowthTask::Grow) | Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            while self.grow(holder, holder.wants()) {}
            prober.advance(self);
            if self.connected().is_some() {
                self.give_back_unused(holder);
            }
        }
        // Nobody opens any more.
        self.state.lock().opening.clear();
        self.opened.notify_all();
    }

    /// Bytes of own leases of HBM that can be used.
    fn open_bytes(&self) -> u64 {
        let totals = self.state.lock().slabs.totals();
        totals.open_bytes.of(Medium::Hbm)
    }

    /// Leases one step more of what is wanted. True when something was granted that can be used.
    fn grow(&self, holder: &dyn Holder, wants: Wants) -> bool {
        let Some(session) = self.connected() else {
            return false;
        };
        let demand = {
            let mut state = self.state.lock();
            let step = |wanted, medium| match wanted {
                true => self.room(&state, medium).min(self.settings.step_bytes),
                false => 0,
            };
            let bytes = step(wants.hbm, Medium::Hbm);
            let host_bytes = step(wants.host, Medium::Host);
            if bytes + host_bytes == 0 || Instant::now() < state.grow_after {
                return false;
            }
            state.grants_in_flight += 1;
            self.settings.demand(bytes, host_bytes)
        };
        let host_wanted = demand.host_bytes > 0;
        let leased = session.lease(demand).wait();
        let mut adopted = 0;
        let mut unmapped = None;
        let mut again = None;
        match leased {
            Ok(leased) => {
                let mut turned_down = Vec::new();
                let mut regions = Vec::new();
                if host_wanted {
                    let mut grants = leased.grants.iter();
                    let granted = grants.any(|grant| grant.device.medium() == Medium::Host);
                    self.state.lock().host_refused = !granted;
                }
                for grant in leased.grants {
                    let unmappable = match self.adopt(
                        holder,
                        session,
                        &grant,
                        Hold::Own,
                        leased.epoch,
                        Left::default(),
                    ) {
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
                } else if let Some((medium, slab_bytes)) = self.slab_too_large() {
                    let max_bytes = self.settings.most(medium);
                    warn!(
                        ?medium,
                        max_bytes,
                        slab_bytes,
                        "slabs on offer are larger than the most that may be leased: nothing is leased. Allow at least \
                         one slab"
                    );
                    again = Some(ASK_AGAIN);
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

    /// The size of the smallest slab that was granted of a kind of memory, when it is more than may be leased of it in all.
    fn slab_too_large(&self) -> Option<(Medium, u64)> {
        let seen = self.state.lock().slab_bytes;
        [Medium::Hbm, Medium::Host].into_iter().find_map(|medium| {
            let most = self.settings.most(medium);
            let slab_bytes = seen.of(medium).filter(|slab_bytes| *slab_bytes > most)?;
            Some((medium, slab_bytes))
        })
    }

    /// Begins to give back what the holder does not use.
    fn give_back_unused(&self, holder: &dyn Holder) {
        let unused = holder.give_up_unused();
        if unused.is_empty() {
            return;
        }
        info!(leases = unused.len(), "giving unused leases back");
        let mut state = self.state.lock();
        // The others are asked back already.
        let given: Vec<AreaId> = (unused.into_iter())
            .filter(|slab| state.slabs.close(*slab, Draining::now()))
            .collect();
        drop(state);
        for slab in given {
            let revoked = false;
            // A draining thread that is gone means that the holder is closing.
            let _ = self.recalls.send(RecallTask::LetGo { slab, revoked });
        }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_others_are_granted_the_broker_is_asked_soon() {
        let mut state = State::new();
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
        let mut state = State::new();
        let pauses: Vec<u128> = (0..8)
            .map(|_| state.longer_map_pause().as_millis())
            .collect();
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
    }
}
