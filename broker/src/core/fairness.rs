//! Who gets the next slab when there are not enough: whoever holds less for its weight.
//!
//! A session that was granted less than it asked for *waits*; its claim is remembered for `wait_ms` after it last
//! asked. Holdings are counted in bytes of leases that are not revoked, at two levels. A tenant's *namespace* has a
//! weight (`namespace_weights`; 1 unless configured), and namespaces share by what each holds for its weight, however
//! many sessions it has: a model with ten replicas gets no ten shares. Within a namespace sessions share alike.
//!
//! * *Granting.* While others wait that would hold no more (for their weight) with another slab than the asker holds
//!   without, the asker is granted a free slab only if enough free bytes remain for them to catch up with it.
//! * *Taking.* When no free slab is left, the asker takes slabs from the namespace that holds the most for its weight,
//!   if that is left with at least as much for its weight as the asker's then has; else from the largest holder of its
//!   own namespace that is left with at least as much as the asker. As many as it lacks, less those already on their
//!   way to it.
//! * *Nobody starves.* A namespace that holds nothing may take a slab from any that is left with as much as it takes,
//!   whatever the weights; and its only slab is never taken by these rules.
//!
//! The hysteresis is the slab between giver and taker: a giver ends no poorer than the taker, so it has no claim to
//! take the slab back, and the granting rule keeps it from being handed the slab instead of the taker. Every slab that
//! moves between namespaces lowers the sum of their holdings' squares by weight (or feeds one that had nothing, which
//! happens once), and every slab that moves within one the sum of its sessions' squares. So however many borrowers want
//! everything, slabs come to rest, spread as evenly as slabs can be: five between two borrowers at 3 and 2, whoever
//! came first; eight between weights 3 and 1 at 6 and 2.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use swiftcache_proto::domain::{LeaseId, RevokeReason, SessionId};

use super::{
    Account, arena::Key, index::Namespace, leases::Lease, policy::Demand, sessions::Session,
    state::State,
};

/// The most slabs taken from others on account of one demand: choosing each looks at all the leases of a holder, and
/// a session that lacks more asks again.
const TAKEN_AT_ONCE: usize = 64;

/// Whose share a slab counts towards: a tenant's namespace.
pub(super) type Party = (Arc<str>, Arc<str>);

/// What a session lacked when it last asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) missing: u64,
    /// The device it computes on.
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    pub(super) party: Party,
}

/// A claim, and until when it is remembered, milliseconds.
#[derive(Clone, Debug)]
pub(super) struct Wait {
    pub(super) claim: Claim,
    pub(super) until: u64,
}

/// What everybody gets for each unit of weight, as a fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Level {
    bytes: u64,
    weights: u64,
}

impl Level {
    /// What a claimant of this weight gets; no bound when there is enough for all.
    pub(super) fn share(level: Option<Self>, weight: u64) -> u64 {
        level.map_or(u64::MAX, |level| {
            scaled(level.bytes, weight, level.weights.max(1))
        })
    }
}

/// `bytes * numerator / denominator`.
fn scaled(bytes: u64, numerator: u64, denominator: u64) -> u64 {
    let scaled = u128::from(bytes) * u128::from(numerator) / u128::from(denominator);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// The largest level at which claimants of these demands and weights together get no more than `pool`; `None` when
/// there is enough for all.
pub(super) fn max_min_level(mut demands: Vec<(u64, u64)>, mut pool: u64) -> Option<Level> {
    let mut weights: u64 = demands.iter().map(|(_, weight)| weight).sum();
    // The first to be met is who wants least for its weight.
    demands.sort_unstable_by(|(one, its), (other, theirs)| {
        let one = u128::from(*one) * u128::from(*theirs);
        one.cmp(&(u128::from(*other) * u128::from(*its)))
    });
    for (demand, weight) in demands {
        let level = Level {
            bytes: pool,
            weights,
        };
        if demand > Level::share(Some(level), weight) {
            return Some(level);
        }
        pool -= demand;
        weights -= weight;
    }
    None
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

    fn weight(&self, (_, name): &Party) -> u64 {
        let weight = self.config.namespace_weights.get(&**name);
        weight.map_or(1, |weight| u64::from(*weight).max(1))
    }

    /// What a namespace holds, bytes.
    fn holds(&self, (tenant, name): &Party) -> u64 {
        let key = self.index.find_namespace(tenant, name);
        key.map_or(0, |key| self.index.namespace(key).active_bytes)
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
        let own = demand.party();
        let held = self.sessions[&demand.session].active_bytes;
        let mut claimed = 0;
        let mut free = u64::MAX;
        // Slabs that other namespaces miss, and the free bytes within their reach.
        let mut others: BTreeMap<&Party, (u64, u64)> = BTreeMap::new();
        for (session, Wait { claim, .. }) in &self.waits {
            let useful =
                bytes >= claim.block_bytes && self.devices.path(claim.device, device).is_some();
            if *session == demand.session || !useful {
                continue;
            }
            let missing = claim.missing.div_ceil(bytes);
            if claim.party != own {
                let (slabs, free) = others.entry(&claim.party).or_insert((0, u64::MAX));
                *slabs += missing;
                *free = (*free).min(self.free_within_reach(claim.device));
                continue;
            }
            let behind = held.saturating_sub(self.sessions[session].active_bytes) / bytes;
            let slabs = missing.min(behind);
            if slabs > 0 {
                claimed += slabs * bytes;
                free = free.min(self.free_within_reach(claim.device));
            }
        }
        let (own_holds, own_weight) = (self.holds(&own), self.weight(&own));
        for (party, (missing, within_reach)) in others {
            let even = scaled(own_holds, self.weight(party), own_weight);
            let holds = self.holds(party);
            let behind = even.saturating_sub(holds) / bytes;
            let starves = holds == 0 && own_holds > 0;
            let slabs = missing.min(behind.max(starves.into()));
            if slabs > 0 {
                claimed += slabs * bytes;
                free = free.min(within_reach);
            }
        }
        free.saturating_sub(bytes) >= claimed
    }

    /// Asks the largest holders to let go of what the demand lacks and may have.
    pub(super) fn reclaim_for(&mut self, demand: &Demand) {
        let mut coming = self.on_its_way_to(demand);
        let mut lacking = demand.missing.saturating_sub(coming);
        for _ in 0..TAKEN_AT_ONCE {
            if lacking == 0 {
                return;
            }
            let Some(lease) = self.slab_to_take(demand, coming) else {
                return;
            };
            let bytes = self.leases[lease].bytes;
            let drain_ms = self.config.default_drain_ms;
            self.revoke(lease, RevokeReason::Fairness, drain_ms, None);
            coming += bytes;
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
        let Some(unit) = slab_sizes.min().copied() else {
            return coming;
        };
        let own = demand.party();
        // What each namespace holds, and what its sessions lack besides.
        let mut parties: BTreeMap<Party, (u64, u64)> = BTreeMap::new();
        for (_, namespace) in self.index.iter() {
            let party = (namespace.tenant.clone(), namespace.name.clone());
            parties.insert(party, (namespace.active_bytes, 0));
        }
        for wait in self.waits.values() {
            let party = parties.entry(wait.claim.party.clone()).or_default();
            party.1 += wait.claim.missing.div_ceil(unit) * unit;
        }
        let free = self.lendable_bytes(|account| account.free);
        let held: u64 = parties.values().map(|(holds, _)| holds).sum();
        let demands = parties
            .iter()
            .map(|(party, (holds, missing))| (holds + missing, self.weight(party)));
        let level = max_min_level(demands.collect(), free + coming + held);
        let mut claimed = 0;
        for (party, (holds, missing)) in &parties {
            let share = Level::share(level, self.weight(party));
            claimed += if *party == own {
                self.claimed_by_replicas(demand, share.min(holds + missing), unit)
            } else {
                let room = share.saturating_sub(*holds) / unit * unit;
                (*missing).min(room)
            };
        }
        coming.saturating_sub(claimed)
    }

    /// What other sessions of the demand's namespace may have of what its share still brings it.
    fn claimed_by_replicas(&self, demand: &Demand, share: u64, unit: u64) -> u64 {
        let own = demand.party();
        let of_own = |wait: &Wait| (wait.claim.party == own).then_some(wait.claim.missing);
        let missing = |id: &SessionId| self.waits.get(id).and_then(of_own);
        let key = self.index.find_namespace(&own.0, &own.1);
        let holds_some = |session: &Session| {
            let mut leases = session.leases.iter();
            leases.any(|id| Some(self.leases[self.lease_ids[id]].namespace) == key)
        };
        let demands = self.sessions.iter().filter_map(|(id, session)| {
            let missing = missing(id);
            let counts = missing.is_some() || holds_some(session);
            counts.then(|| (session.active_bytes + missing.unwrap_or(0), 1))
        });
        let level = max_min_level(demands.collect(), share);
        let others = self.waits.iter().filter(|(id, _)| **id != demand.session);
        others
            .filter_map(|(id, wait)| {
                let held = self.sessions[id].active_bytes;
                let room = Level::share(level, 1).saturating_sub(held) / unit;
                Some(of_own(wait)?.div_ceil(unit).min(room) * unit)
            })
            .sum()
    }

    /// The next slab to take for the asker, to whom `coming` bytes are on their way: of another namespace, else of
    /// another session of its own.
    fn slab_to_take(&self, demand: &Demand, coming: u64) -> Option<Key<Lease>> {
        let own = demand.party();
        let (weight, holds) = (self.weight(&own), self.holds(&own).saturating_add(coming));
        let mut parties = Vec::new();
        for (key, namespace) in self.index.iter() {
            let party = (namespace.tenant.clone(), namespace.name.clone());
            let (theirs, bytes) = (self.weight(&party), namespace.active_bytes);
            if party == own || bytes == 0 {
                continue;
            }
            // What it can give and still hold as much for its weight as the asker's namespace then does.
            let ahead = u128::from(weight) * u128::from(bytes);
            let behind = u128::from(theirs) * u128::from(holds);
            let most = ahead.saturating_sub(behind) / u128::from(weight + theirs);
            let starves = if holds == 0 { bytes / 2 } else { 0 };
            let most = u64::try_from(most).unwrap_or(u64::MAX).max(starves);
            parties.push((Reverse(scaled(bytes, 1 << 20, theirs)), key, most));
        }
        parties.sort_unstable_by_key(|(holds, key, _)| (*holds, *key));
        let of_others = parties.into_iter().find_map(|(_, key, most)| {
            self.largest_first(demand.session)
                .find_map(|session| self.cheapest(demand, session, key, most))
        });
        of_others.or_else(|| {
            let key = self.index.find_namespace(&own.0, &own.1)?;
            let held = self.sessions[&demand.session].active_bytes;
            let would_hold = held.saturating_add(coming);
            self.largest_first(demand.session)
                .take_while(|session| session.active_bytes > would_hold)
                .find_map(|session| {
                    let most = (session.active_bytes - would_hold) / 2;
                    self.cheapest(demand, session, key, most)
                })
        })
    }

    fn largest_first(&self, asker: SessionId) -> impl Iterator<Item = &Session> {
        let others = self.sessions.iter().filter(|(id, _)| **id != asker);
        let mut holders: Vec<_> = others.filter(|(_, s)| s.active_bytes > 0).collect();
        holders.sort_by_key(|(id, session)| (Reverse(session.active_bytes), **id));
        holders.into_iter().map(|(_, session)| session)
    }

    /// The lease of a session that is cheapest to lose (fewest blocks, then found longest ago), of a namespace, of no
    /// more than `most` bytes and of use to the asker.
    fn cheapest(
        &self,
        demand: &Demand,
        holder: &Session,
        namespace: Key<Namespace>,
        most: u64,
    ) -> Option<Key<Lease>> {
        let useful = |id: &LeaseId| {
            let key = self.lease_ids[id];
            let lease = &self.leases[key];
            let region = &self.regions[lease.region];
            let useful = lease.revocation().is_none()
                && lease.namespace == namespace
                && lease.bytes <= most
                && region.serves(demand)
                && region.listed.is_some()
                && self.devices.path(demand.device, region.device).is_some();
            useful.then_some((lease.blocks.published(), lease.last_hit, *id, key))
        };
        let leases = holder.leases.iter().filter_map(useful);
        let cheapest = leases.min_by_key(|(published, hit, id, _)| (*published, *hit, *id));
        cheapest.map(|(.., key)| key)
    }
}
