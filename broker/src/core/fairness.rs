//! Who gets the next slab when there are not enough: whoever holds less.
//!
//! A session that was granted less than it asked for *waits*; its claim is remembered for `wait_ms` after it last
//! asked. Holdings are counted in bytes of leases that are not revoked.
//!
//! * *Granting.* While sessions wait that would hold no more with another slab than the asker holds without, the asker
//!   is granted a free slab only if enough free bytes remain for them to catch up with it.
//! * *Taking.* When no free slab is left, the asker takes slabs from the largest holder that is left with at least as
//!   much as the asker then has: as many as it lacks, less those already on their way to it.
//!
//! The hysteresis is the slab between the two: a giver ends no poorer than the taker, so it has no claim to take the
//! slab back, and the granting rule keeps it from being handed the slab instead of the taker. Every slab taken lowers
//! the sum of the squares of all holdings, so that however many borrowers want everything, slabs come to rest, spread
//! as evenly as slabs can be: five between two borrowers at 3 and 2, whoever came first.

use std::cmp::Reverse;

use swiftcache_proto::domain::{LeaseId, RevokeReason};

use super::{Account, arena::Key, leases::Lease, policy::Demand, state::State};

/// The most slabs taken from others on account of one demand: choosing each looks at all the leases of a holder, and
/// a session that lacks more asks again.
const TAKEN_AT_ONCE: usize = 64;

/// What a session lacked when it last asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) missing: u64,
    /// The device it computes on.
    pub(super) device: usize,
    pub(super) block_bytes: u64,
}

/// A claim, and until when it is remembered, milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) claim: Claim,
    pub(super) until: u64,
}

/// The largest level at which claimants of these demands together get no more than `pool`; `u64::MAX` when there is
/// enough for all.
pub(super) fn max_min_level(mut demands: Vec<u64>, mut pool: u64) -> u64 {
    demands.sort_unstable();
    let count = demands.len() as u64;
    for (already_met, demand) in (0..).zip(demands) {
        let level = pool / (count - already_met);
        if demand > level {
            return level;
        }
        pool -= demand;
    }
    u64::MAX
}

impl State {
    pub(super) fn wait(&mut self, demand: &Demand) {
        let wait = Wait {
            claim: self.claim_of(demand),
            until: self.now.saturating_add(self.config.wait_ms.into()),
        };
        self.waits.insert(demand.session, wait);
    }

    pub(super) fn expire_waits(&mut self) {
        let now = self.now;
        self.waits.retain(|_, wait| wait.until > now);
    }

    /// What everybody who holds or waits would have if the lendable bytes were divided max-min fairly.
    fn level(&self) -> u64 {
        let coming = |account: &Account| account.free + account.draining + account.scrubbing;
        let mut pool = self.lendable_bytes(coming);
        let mut demands = Vec::new();
        for (id, session) in &self.sessions {
            pool += session.active_bytes;
            let missing = self.waits.get(id).map_or(0, |wait| wait.claim.missing);
            if session.active_bytes + missing > 0 {
                demands.push(session.active_bytes + missing);
            }
        }
        max_min_level(demands, pool)
    }

    fn lendable_bytes(&self, column: impl Fn(&Account) -> u64) -> u64 {
        let devices = self.devices.list.iter();
        devices.map(|device| column(&device.lendable)).sum()
    }

    /// Free bytes that a session computing on this device reaches.
    fn free_within_reach(&self, from: usize) -> u64 {
        let devices = self.devices.list.iter().enumerate();
        devices
            .filter(|(to, _)| self.devices.path(from, *to).is_some())
            .map(|(_, device)| device.lendable.free)
            .sum()
    }

    /// Whether the demand may have a free slab on this device of this many bytes, given who else waits.
    pub(super) fn fair(&self, demand: &Demand, device: usize, bytes: u64) -> bool {
        let held = self.sessions[&demand.session].active_bytes;
        let mut claimed = 0;
        let mut free = u64::MAX;
        for (session, Wait { claim, .. }) in &self.waits {
            let behind = held.saturating_sub(self.sessions[session].active_bytes) / bytes;
            let slabs = claim.missing.div_ceil(bytes).min(behind);
            let useful =
                bytes >= claim.block_bytes && self.devices.path(claim.device, device).is_some();
            if *session != demand.session && useful && slabs > 0 {
                claimed += slabs * bytes;
                free = free.min(self.free_within_reach(claim.device));
            }
        }
        free.saturating_sub(bytes) >= claimed
    }

    /// Asks the largest holders to let go of what the demand lacks and may have.
    pub(super) fn reclaim_for(&mut self, demand: &Demand) {
        let on_its_way = self.on_its_way_to(demand);
        let held = self.sessions[&demand.session].active_bytes;
        let mut would_hold = held.saturating_add(on_its_way);
        let mut lacking = demand.missing.saturating_sub(on_its_way);
        for _ in 0..TAKEN_AT_ONCE {
            if lacking == 0 {
                return;
            }
            let Some(lease) = self.slab_to_take(demand, would_hold) else {
                return;
            };
            let bytes = self.leases[lease].bytes;
            let drain_ms = self.config.default_drain_ms;
            self.revoke(lease, RevokeReason::Fairness, drain_ms, None);
            would_hold += bytes;
            lacking = lacking.saturating_sub(bytes);
        }
    }

    /// Bytes being drained or zeroed, less what others who wait may have of them.
    fn on_its_way_to(&self, demand: &Demand) -> u64 {
        let coming = self.lendable_bytes(|account| account.draining + account.scrubbing);
        let slab_sizes = self
            .devices
            .list
            .iter()
            .flat_map(|device| device.slab_sizes.keys());
        let (Some(unit), level) = (slab_sizes.min(), self.level()) else {
            return coming;
        };
        let others = self
            .waits
            .iter()
            .filter(|(session, _)| **session != demand.session);
        let claimed: u64 = others
            .map(|(session, wait)| {
                let held = self.sessions[session].active_bytes;
                let room = level.saturating_sub(held) / unit;
                wait.claim.missing.div_ceil(*unit).min(room) * unit
            })
            .sum();
        coming.saturating_sub(claimed)
    }

    /// The lease cheapest to lose (fewest blocks, then found longest ago) of the largest holder that is left with at
    /// least as much as the asker, who would then hold `would_hold` and the slab. Only slabs of use to the asker.
    fn slab_to_take(&self, demand: &Demand, would_hold: u64) -> Option<Key<Lease>> {
        let mut holders: Vec<_> = self
            .sessions
            .iter()
            .filter(|(id, session)| **id != demand.session && session.active_bytes > would_hold)
            .collect();
        holders.sort_by_key(|(id, session)| (Reverse(session.active_bytes), **id));
        holders.into_iter().find_map(|(_, session)| {
            let most = (session.active_bytes - would_hold) / 2;
            let useful = |id: &LeaseId| {
                let key = self.lease_ids[id];
                let lease = &self.leases[key];
                let region = &self.regions[lease.region];
                let useful = lease.revocation().is_none()
                    && lease.bytes <= most
                    && lease.bytes >= demand.block_bytes
                    && region.listed.is_some()
                    && self.devices.path(demand.device, region.device).is_some();
                useful.then_some((lease.blocks.published(), lease.last_hit, *id, key))
            };
            let leases = session.leases.iter().filter_map(useful);
            let cheapest = leases.min_by_key(|(published, hit, id, _)| (*published, *hit, *id));
            cheapest.map(|(.., key)| key)
        })
    }
}
