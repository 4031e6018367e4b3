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

use std::{collections::BTreeMap, sync::Arc};

use swiftcache_proto::domain::{LinkKind, SessionId};

use super::{
    account::Account,
    arena::{LeaseKey, NamespaceKey, RegionKey},
    books::Books,
    claims::{Claim, Party},
    shares::{Level, max_min_level, scaled},
};

/// A demand being served.
pub(super) struct Demand {
    pub(super) session: SessionId,
    pub(super) tenant: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    /// Devices it can reach, best first.
    pub(super) tiers: Vec<(LinkKind, Vec<usize>)>,
    /// Still to be granted, bytes.
    pub(super) missing: u64,
}

impl Demand {
    /// Whose share it counts towards.
    fn party(&self) -> Party {
        (self.tenant.clone(), self.namespace.clone())
    }

    /// Whether it could use a slab of a region. An engine that lends part of its pool gains nothing by leasing it, and CUDA
    /// opens a handle in other processes only. What a session cannot map is of no use to it.
    pub(super) fn can_use(&self, books: &Books, region: RegionKey) -> bool {
        let outline = books.regions.get(region).outline();
        outline.donor != self.session
            && outline.slab_bytes >= self.block_bytes
            && !books.unmappable.contains(self.session, region)
    }
}

/// Remembers what a demand lacks, for as long as its session may ask again.
pub(super) fn wait(books: &mut Books, demand: &Demand) {
    let claim = Claim {
        missing: demand.missing,
        device: demand.device,
        block_bytes: demand.block_bytes,
        party: demand.party(),
    };
    let until = books.now.saturating_add(books.config.wait_ms.into());
    books.claims.wait(demand.session, claim, until);
}

fn namespace_of(books: &Books, (tenant, name): &Party) -> Option<NamespaceKey> {
    books.index.find_namespace(tenant, name)
}

/// What a namespace holds, bytes.
fn holds(books: &Books, party: &Party) -> u64 {
    namespace_of(books, party).map_or(0, |key| books.claims.holds(key))
}

fn lendable_bytes(books: &Books, column: impl Fn(&Account) -> u64) -> u64 {
    let shelves = books.regions.shelves().iter();
    shelves.map(|shelf| column(&shelf.lendable())).sum()
}

/// Free bytes that a session computing on this device reaches.
fn free_within_reach(books: &Books, from: usize) -> u64 {
    let shelves = books.regions.shelves().iter().enumerate();
    let reached = shelves.filter(|(to, _)| books.devices.path(from, *to).is_some());
    reached.map(|(_, shelf)| shelf.lendable().free).sum()
}

/// Whether the demand may have a free slab on this device of this many bytes, given who else waits.
pub(super) fn fair(books: &Books, demand: &Demand, device: usize, bytes: u64) -> bool {
    let own = demand.party();
    let held = books.claims.held(demand.session);
    let mut claimed = 0;
    let mut free = u64::MAX;
    // Slabs that other namespaces miss, and the free bytes within their reach.
    let mut others: BTreeMap<&Party, (u64, u64)> = BTreeMap::new();
    for (session, claim) in books.claims.waits() {
        let useful =
            bytes >= claim.block_bytes && books.devices.path(claim.device, device).is_some();
        if session == demand.session || !useful {
            continue;
        }
        let missing = claim.missing.div_ceil(bytes);
        if claim.party != own {
            let (slabs, free) = others.entry(&claim.party).or_insert((0, u64::MAX));
            *slabs += missing;
            *free = (*free).min(free_within_reach(books, claim.device));
            continue;
        }
        let behind = held.saturating_sub(books.claims.held(session)) / bytes;
        let slabs = missing.min(behind);
        if slabs > 0 {
            claimed += slabs * bytes;
            free = free.min(free_within_reach(books, claim.device));
        }
    }
    let own_holds = holds(books, &own);
    let own_weight = books.claims.weight(&own.1);
    for (party, (missing, within_reach)) in others {
        let even = scaled(own_holds, books.claims.weight(&party.1), own_weight);
        let theirs = holds(books, party);
        let behind = even.saturating_sub(theirs) / bytes;
        let starves = theirs == 0 && own_holds > 0;
        let slabs = missing.min(behind.max(starves.into()));
        if slabs > 0 {
            claimed += slabs * bytes;
            free = free.min(within_reach);
        }
    }
    free.saturating_sub(bytes) >= claimed
}

/// Bytes being drained or zeroed, less what others who wait may have of them.
pub(super) fn on_its_way_to(books: &Books, demand: &Demand) -> u64 {
    let coming = lendable_bytes(books, |account| account.draining + account.scrubbing);
    let shelves = books.regions.shelves().iter();
    let Some(unit) = shelves.flat_map(|shelf| shelf.slab_sizes().next()).min() else {
        return coming;
    };
    let own = demand.party();
    // What each namespace holds, and what its sessions lack besides.
    let mut parties: BTreeMap<Party, (u64, u64)> = BTreeMap::new();
    for (key, held) in books.claims.wealthiest() {
        let namespace = books.index.namespace(key);
        let party = (namespace.tenant().clone(), namespace.name().clone());
        parties.insert(party, (held, 0));
    }
    for (_, claim) in books.claims.waits() {
        let party = parties.entry(claim.party.clone()).or_default();
        party.1 += claim.missing.div_ceil(unit) * unit;
    }
    let free = lendable_bytes(books, |account| account.free);
    let held: u64 = parties.values().map(|(holds, _)| holds).sum();
    let demands = parties
        .iter()
        .map(|(party, (holds, missing))| (holds + missing, books.claims.weight(&party.1)));
    let level = max_min_level(demands.collect(), free + coming + held);
    let mut claimed = 0;
    for (party, (holds, missing)) in &parties {
        let share = Level::share(level, books.claims.weight(&party.1));
        claimed += if *party == own {
            claimed_by_replicas(books, demand, share.min(holds + missing), unit)
        } else {
            let room = share.saturating_sub(*holds) / unit * unit;
            (*missing).min(room)
        };
    }
    coming.saturating_sub(claimed)
}

/// What other sessions of the demand's namespace may have of what its share still brings it.
fn claimed_by_replicas(books: &Books, demand: &Demand, share: u64, unit: u64) -> u64 {
    let own = demand.party();
    let waiting: BTreeMap<SessionId, u64> = (books.claims.waits())
        .filter(|(_, claim)| claim.party == own)
        .map(|(id, claim)| (id, claim.missing))
        .collect();
    let mut demands: BTreeMap<SessionId, u64> = BTreeMap::new();
    let key = namespace_of(books, &own);
    for (id, held) in key.into_iter().flat_map(|key| books.claims.largest(key)) {
        demands.insert(id, held);
    }
    for (id, missing) in &waiting {
        let held = books.claims.held(*id);
        demands.insert(*id, held + missing);
    }
    let demands = demands.into_values().map(|demand| (demand, 1));
    let level = max_min_level(demands.collect(), share);
    let others = waiting.iter().filter(|(id, _)| **id != demand.session);
    others
        .map(|(id, missing)| {
            let held = books.claims.held(*id);
            let room = Level::share(level, 1).saturating_sub(held) / unit;
            missing.div_ceil(unit).min(room) * unit
        })
        .sum()
}

/// The next slab to take for the asker, to whom `coming` bytes are on their way: of another namespace, else of
/// another session of its own.
pub(super) fn slab_to_take(books: &mut Books, demand: &Demand, coming: u64) -> Option<LeaseKey> {
    let own = demand.party();
    let own_key = namespace_of(books, &own);
    let weight = books.claims.weight(&own.1);
    let would_hold = holds(books, &own).saturating_add(coming);
    let mut next = books.claims.next_wealthiest(None);
    while let Some((key, bytes)) = next {
        if Some(key) != own_key {
            let theirs = books.claims.weight(books.index.namespace(key).name());
            // What it can give and still hold as much for its weight as the asker's namespace then does.
            let ahead = u128::from(weight) * u128::from(bytes);
            let behind = u128::from(theirs) * u128::from(would_hold);
            let most = ahead.saturating_sub(behind) / u128::from(weight + theirs);
            let starves = if would_hold == 0 { bytes / 2 } else { 0 };
            let most = u64::try_from(most).unwrap_or(u64::MAX).max(starves);
            if let Some(lease) = take_from(books, demand, key, |_| Some(most)) {
                return Some(lease);
            }
        }
        next = books.claims.next_wealthiest(Some(key));
    }
    let asker_would_hold = books.claims.held(demand.session).saturating_add(coming);
    take_from(books, demand, own_key?, |held| {
        let ahead = held
            .checked_sub(asker_would_hold)
            .filter(|ahead| *ahead > 0);
        Some(ahead? / 2)
    })
}

/// A lease of the first session of a namespace, the largest holder first, that has one of use to the asker and no larger
/// than `most` allows, given what the session holds. None once that says that nobody further has to give.
fn take_from(
    books: &mut Books,
    demand: &Demand,
    namespace: NamespaceKey,
    most: impl Fn(u64) -> Option<u64>,
) -> Option<LeaseKey> {
    let mut next = books.claims.next_largest(namespace, None);
    while let Some((session, held)) = next {
        if session != demand.session {
            let most = most(held)?;
            if let Some(lease) = cheapest(books, demand, session, namespace, most) {
                return Some(lease);
            }
        }
        next = books.claims.next_largest(namespace, Some(session));
    }
    None
}

/// The lease of a session that is cheapest to lose, of a namespace, of no more than `most` bytes and of use to the asker.
fn cheapest(
    books: &mut Books,
    demand: &Demand,
    session: SessionId,
    namespace: NamespaceKey,
    most: u64,
) -> Option<LeaseKey> {
    // Taken out, so that what lookups did not tell it can be caught up with.
    let mut claims = std::mem::take(&mut books.claims);
    let piles = |device, bytes| {
        bytes <= most
            && bytes >= demand.block_bytes
            && books.devices.path(demand.device, device).is_some()
    };
    let region = |lease| books.leases.get(lease).terms().region;
    let wanted = |lease| {
        let region = region(lease);
        books.regions.is_listed(region) && demand.can_use(books, region)
    };
    let last_hit = |lease| books.leases.get(lease).last_hit();
    let cheapest = claims.cheapest(session, namespace, piles, wanted, last_hit);
    books.claims = claims;
    cheapest
}
