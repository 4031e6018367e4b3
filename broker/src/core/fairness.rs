//! Who gets the next slab when there are not enough: whoever holds less for its weight.
//!
//! A session that was granted less than it asked for *waits*; its claim is remembered for `wait_ms` after it last
//! asked. Holdings are counted in bytes of leases that are not revoked, at four levels: users, the tenants of each, the
//! namespaces of each of those, and their sessions. The first three have weights (`tenant_weights`, `namespace_weights`; 1
//! unless configured). Two claims are compared at the level where they part: what one user's namespaces take from each
//! other is that user's own matter, and however many namespaces, labels or sessions a user makes up, another user's share
//! stays the same. A model with ten replicas gets no ten shares either.
//!
//! HBM and host memory are shared out apart by the same rules.
//!
//! * *Granting.* While others wait that would hold no more (for their weight) with another slab than the asker holds
//!   without, the asker is granted a free slab only if enough free bytes remain for them to catch up with it.
//! * *Taking.* When no free slab is left, the asker takes slabs from the user that holds the most for its weight,
//!   if that is left with at least as much for its weight as the asker's then has; else in the same way from another tenant of
//!   its own user, else from another namespace of its own tenant; else from the largest holder of its own namespace that is
//!   left with at least as much as the asker. As many as it lacks, less those already on their way to it.
//! * *Working sets stay.* A lease of that class counts as held, and is never taken by these rules: a running engine would have to be
//!   held up for it.
//! * *Nobody starves.* A user that holds nothing may take a slab from any that is left with as much as it takes,
//!   whatever the weights; and its only slab is never taken by these rules. So with tenants of one user, and with namespaces
//!   of one tenant, among themselves.
//!
//! The hysteresis is the slab between giver and taker: a giver ends no poorer than the taker, so it has no claim to
//! take the slab back, and the granting rule keeps it from being handed the slab instead of the taker. Every slab that
//! moves lowers the sum of squared holdings by weight at the level where giver and taker part (or feeds one that had
//! nothing, which happens once). So however many borrowers want everything, slabs come to rest, spread as evenly as slabs can
//! be: five between two borrowers at 3 and 2, whoever came first; eight between weights 3 and 1 at 6 and 2.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use swiftcache_proto::domain::{LeaseClass, LinkKind, Medium, SessionId};

use super::{
    account::Account,
    arena::{LeaseKey, NamespaceKey, RegionKey},
    books::{Books, keys_of},
    claims::Claim,
    holders::{Holder, LEVELS, Path, path, tenant_of},
    regions::Shelf,
    sessions::Session,
    shares::{Level, max_min_level, scaled},
};

/// A demand being served.
pub(super) struct Demand {
    pub(super) session: SessionId,
    pub(super) tenant: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    pub(super) class: LeaseClass,
    /// The kind of memory that is asked for.
    pub(super) medium: Medium,
    /// Devices of that kind that it can reach, best first.
    pub(super) tiers: Vec<(LinkKind, Vec<usize>)>,
    /// Still to be granted, bytes.
    pub(super) missing: u64,
}

impl Demand {
    /// Whose share it counts towards.
    fn path(&self) -> Path {
        path(&self.tenant, &self.namespace)
    }

    /// The same session's demand of so much host memory.
    pub(super) fn of_host_memory(&self, books: &Books, bytes: u64) -> Self {
        Self {
            tenant: self.tenant.clone(),
            namespace: self.namespace.clone(),
            medium: Medium::Host,
            tiers: books.devices.tiers(self.device, Medium::Host),
            missing: bytes,
            ..*self
        }
    }

    /// Whether it could use a slab of a region. An engine that lends part of its pool gains nothing by leasing it, and CUDA
    /// opens a handle in other processes only. What a session cannot map is of no use to it.
    pub(super) fn can_use(&self, books: &Books, region: RegionKey) -> bool {
        books.regions.get(region).slab_bytes() >= self.block_bytes
            && is_of_use_to(books, self.session, region)
    }

    /// Whether slabs are on offer within its reach, and it can use none of them.
    fn is_for_nothing(&self, books: &Books) -> bool {
        let mut offered = (books.regions.iter())
            .map(|(key, _)| key)
            .filter(|key| is_within_reach(books, self.medium, self.device, *key))
            .peekable();
        offered.peek().is_some() && !offered.any(|key| self.can_use(books, key))
    }
}

/// Whether a region can be lent from, is memory of this kind, and can be reached from a device.
fn is_within_reach(books: &Books, medium: Medium, from: usize, region: RegionKey) -> bool {
    let device = books.regions.get(region).device();
    books.regions.is_listed(region)
        && books.devices.medium(device) == medium
        && books.devices.path(from, device).is_some()
}

/// Whether a session can use slabs of a region, if its blocks fit.
fn is_of_use_to(books: &Books, session: SessionId, region: RegionKey) -> bool {
    books.regions.get(region).donor() != session && !books.unmappable.contains(session, region)
}

/// Remembers what a demand lacks, for as long as its session may ask again. Nothing is kept for who can use nothing.
pub(super) fn wait(books: &mut Books, demand: &Demand) {
    if demand.is_for_nothing(books) {
        return;
    }
    let claim = Claim {
        missing: demand.missing,
        device: demand.device,
        block_bytes: demand.block_bytes,
        path: demand.path(),
    };
    let until = books.now.saturating_add(books.config.wait_ms.into());
    let claims = books.claims.of_mut(demand.medium);
    claims.wait(demand.session, claim, until);
}

/// The level at which the paths of two claims part; `None` within one namespace.
fn parting(one: &Path, other: &Path) -> Option<usize> {
    (0..LEVELS).find(|level| one[*level] != other[*level])
}

/// What is offered of a kind of memory, with the device that holds it.
fn shelves(books: &Books, medium: Medium) -> impl Iterator<Item = (usize, &Shelf)> {
    let shelves = books.regions.shelves().iter().enumerate();
    shelves.filter(move |(device, _)| books.devices.medium(*device) == medium)
}

fn lendable_bytes(books: &Books, medium: Medium, column: impl Fn(&Account) -> u64) -> u64 {
    let shelves = shelves(books, medium);
    shelves.map(|(_, shelf)| column(&shelf.lendable())).sum()
}

/// Free bytes of a kind of memory that a session computing on this device reaches and can use.
fn free_within_reach(books: &Books, medium: Medium, session: SessionId, from: usize) -> u64 {
    let reached = shelves(books, medium).filter(|(to, _)| books.devices.path(from, *to).is_some());
    let free: u64 = reached.map(|(_, shelf)| shelf.lendable().free).sum();
    let own = books.sessions.get(session).map(Session::regions);
    let of_no_use: BTreeSet<RegionKey> = keys_of(books, own.into_iter().flatten())
        .into_iter()
        .chain(books.unmappable.of(session))
        .filter(|key| is_within_reach(books, medium, from, *key))
        .collect();
    let lost = of_no_use.into_iter().map(|key| books.regions.get(key));
    free.saturating_sub(lost.map(|region| region.account().free).sum())
}

/// Whether the demand may have a free slab of this region, given who else waits.
pub(super) fn fair(books: &Books, demand: &Demand, region: RegionKey) -> bool {
    let its = books.regions.get(region);
    let (device, bytes) = (its.device(), its.slab_bytes());
    let own = demand.path();
    let held = books.claims.of(demand.medium).held(demand.session);
    let mut claimed = 0;
    let mut free = u64::MAX;
    // With the slab, the rest of its allocation may be out of other tenants' reach.
    let closed = books.regions.free_beside(region).saturating_sub(bytes);
    // By who parts from the asker, and where: the slabs that they miss, and the free bytes within their reach.
    let mut others: BTreeMap<(usize, &Holder), (u64, u64)> = BTreeMap::new();
    for (session, claim) in books.claims.of(demand.medium).waits() {
        let useful = bytes >= claim.block_bytes
            && is_of_use_to(books, session, region)
            && books.devices.path(claim.device, device).is_some()
            && books.regions.can_open_to(region, tenant_of(&claim.path), 0);
        if session == demand.session || !useful {
            continue;
        }
        let missing = claim.missing.div_ceil(bytes);
        if let Some(level) = parting(&own, &claim.path) {
            let other = others.entry((level, &claim.path[level]));
            let (slabs, free) = other.or_insert((0, u64::MAX));
            *slabs += missing;
            let within_reach = free_within_reach(books, demand.medium, session, claim.device);
            *free = (*free).min(match *tenant_of(&claim.path) == *demand.tenant {
                true => within_reach,
                false => within_reach.saturating_sub(closed),
            });
            continue;
        }
        let behind = held.saturating_sub(books.claims.of(demand.medium).held(session)) / bytes;
        let slabs = missing.min(behind);
        if slabs > 0 {
            claimed += slabs * bytes;
            free = free.min(free_within_reach(
                books,
                demand.medium,
                session,
                claim.device,
            ));
        }
    }
    // From the namespaces up: what is claimed within the asker's side is its side's too, once it is granted.
    let (mut within, mut below) = (claimed, LEVELS);
    for ((level, other), (missing, within_reach)) in others.into_iter().rev() {
        if level != below {
            (within, below) = (claimed, level);
        }
        let own = &own[level];
        let own_holds = books.claims.of(demand.medium).holders().bytes(own) + within;
        let (weight, its) = (
            books.claims.of(demand.medium).weight(other),
            books.claims.of(demand.medium).weight(own),
        );
        let even = scaled(own_holds, weight, its);
        let theirs = books.claims.of(demand.medium).holders().bytes(other);
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

/// What holders of one kind hold, and what their sessions lack besides.
type Wants = BTreeMap<Holder, (u64, u64)>;

/// Bytes that are free only once they are zeroed, in slabs that the demand can use, of donors that can be told.
fn to_be_zeroed(books: &Books, demand: &Demand) -> u64 {
    let devices = demand.tiers.iter().flat_map(|(_, devices)| devices);
    let dirty = devices.flat_map(|number| books.regions.shelf(*number).with_dirty(&demand.tenant));
    let able = dirty.filter(|(_, (.., key))| {
        let donor = books.sessions.get(books.regions.get(*key).donor());
        donor.is_some_and(|donor| donor.is_attached()) && demand.can_use(books, *key)
    });
    able.map(|(dirt, (.., key))| books.regions.get(key).free_bytes(dirt))
        .sum()
}

/// Bytes that are drained, zeroed, or to be zeroed, and will be somebody's who waits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Coming {
    /// What the asker may have of them.
    pub(super) to_asker: u64,
    /// What others may have of them within the asker's user, within its tenant, and within its namespace.
    within: [u64; LEVELS],
}

/// Who may have what is on its way.
pub(super) fn on_its_way(books: &Books, demand: &Demand) -> Coming {
    let moving = lendable_bytes(books, demand.medium, |account| {
        account.draining + account.scrubbing
    });
    let coming = moving + to_be_zeroed(books, demand);
    let shelves = shelves(books, demand.medium);
    let Some(unit) = (shelves.flat_map(|(_, shelf)| shelf.slab_sizes().next())).min() else {
        return Coming {
            to_asker: coming,
            ..Coming::default()
        };
    };
    let own = demand.path();
    // Among whom the asker's share is divided, at each level.
    let mut wants: [Wants; LEVELS] = Default::default();
    let mut held = 0;
    for (holder, bytes) in books.claims.of(demand.medium).holders().iter() {
        let (level, beside) = match holder {
            Holder::User(_) => {
                held += bytes;
                (0, true)
            }
            Holder::Tenant(tenant) => (1, own[0].is_user_of(tenant)),
            Holder::Namespace(tenant, _) => (2, own[1] == Holder::Tenant(tenant.clone())),
        };
        if beside {
            wants[level].entry(holder.clone()).or_default().0 = bytes;
        }
    }
    for (_, claim) in books.claims.of(demand.medium).waits() {
        let last = parting(&own, &claim.path).unwrap_or(LEVELS - 1);
        for (wants, holder) in wants.iter_mut().zip(&claim.path).take(last + 1) {
            let missing = claim.missing.div_ceil(unit) * unit;
            wants.entry(holder.clone()).or_default().1 += missing;
        }
    }
    let free = lendable_bytes(books, demand.medium, |account| account.free);
    let mut pool = free + moving + held;
    // At each level, and among the sessions of the asker's namespace.
    let mut claimed = [0; LEVELS + 1];
    for ((wants, own), claimed) in wants.iter().zip(&own).zip(&mut claimed) {
        let demands = (wants.iter()).map(|(holder, (holds, missing))| {
            (
                holds + missing,
                books.claims.of(demand.medium).weight(holder),
            )
        });
        let level = max_min_level(demands.collect(), pool);
        pool = 0;
        for (holder, (holds, missing)) in wants {
            let share = Level::share(level, books.claims.of(demand.medium).weight(holder));
            if holder == own {
                pool = share.min(holds + missing);
            } else {
                let room = share.saturating_sub(*holds) / unit * unit;
                *claimed += (*missing).min(room);
            }
        }
    }
    claimed[LEVELS] = claimed_by_replicas(books, demand, pool, unit);
    let to_asker = coming.saturating_sub(claimed.iter().sum());
    let mut within = [0; LEVELS];
    for (level, within) in within.iter_mut().enumerate() {
        let (outside, inside) = claimed.split_at(level + 1);
        let left = coming.saturating_sub(outside.iter().sum::<u64>() + to_asker);
        *within = left.min(inside.iter().sum());
    }
    Coming { to_asker, within }
}

/// What other sessions of the demand's namespace may have of what its share still brings it.
fn claimed_by_replicas(books: &Books, demand: &Demand, share: u64, unit: u64) -> u64 {
    let own = demand.path();
    let waiting: BTreeMap<SessionId, u64> = (books.claims.of(demand.medium).waits())
        .filter(|(_, claim)| claim.path == own)
        .map(|(id, claim)| (id, claim.missing))
        .collect();
    let mut demands: BTreeMap<SessionId, u64> = BTreeMap::new();
    let key = (books.index).find_namespace(&demand.tenant, &demand.namespace);
    for (id, held) in key
        .into_iter()
        .flat_map(|key| books.claims.of(demand.medium).largest(key))
    {
        demands.insert(id, held);
    }
    for (id, missing) in &waiting {
        let held = books.claims.of(demand.medium).held(*id);
        demands.insert(*id, held + missing);
    }
    let demands = demands.into_values().map(|demand| (demand, 1));
    let level = max_min_level(demands.collect(), share);
    let others = waiting.iter().filter(|(id, _)| **id != demand.session);
    others
        .map(|(id, missing)| {
            let held = books.claims.of(demand.medium).held(*id);
            let room = Level::share(level, 1).saturating_sub(held) / unit;
            missing.div_ceil(unit).min(room) * unit
        })
        .sum()
}

/// The next slab to take for the asker, given what is on its way: of another user, else of another tenant of
/// its user, else of another namespace of its tenant, else of another session of its own namespace.
pub(super) fn slab_to_take(
    books: &mut Books,
    demand: &Demand,
    coming: &Coming,
) -> Option<LeaseKey> {
    let path = demand.path();
    let mut within = None;
    for (own, to_others) in path.iter().zip(coming.within) {
        let weight = books.claims.of(demand.medium).weight(own);
        let would_hold =
            books.claims.of(demand.medium).holders().bytes(own) + coming.to_asker + to_others;
        let mut next = books
            .claims
            .of(demand.medium)
            .holders()
            .next_wealthiest(within, None);
        while let Some((other, bytes)) = next {
            if other != *own {
                let theirs = books.claims.of(demand.medium).weight(&other);
                // What it can give and still hold as much for its weight as the asker's side then does.
                let ahead = u128::from(weight) * u128::from(bytes);
                let behind = u128::from(theirs) * u128::from(would_hold);
                let most = ahead.saturating_sub(behind) / u128::from(weight + theirs);
                let starves = if would_hold == 0 { bytes / 2 } else { 0 };
                let most = u64::try_from(most).unwrap_or(u64::MAX).max(starves);
                if let Some(lease) = take_within(books, demand, &other, most) {
                    return Some(lease);
                }
            }
            next = (books.claims.of(demand.medium).holders()).next_wealthiest(within, Some(&other));
        }
        within = Some(own);
    }
    let own_key = (books.index).find_namespace(&demand.tenant, &demand.namespace)?;
    let asker_would_hold = books.claims.of(demand.medium).held(demand.session) + coming.to_asker;
    take_from(books, demand, own_key, |held| {
        let ahead = held
            .checked_sub(asker_would_hold)
            .filter(|ahead| *ahead > 0);
        Some(ahead? / 2)
    })
}

/// A lease of a holder that has one of use to the asker and of no more than `most` bytes: of whoever within it holds the
/// most for its weight, if it has one.
fn take_within(books: &mut Books, demand: &Demand, holder: &Holder, most: u64) -> Option<LeaseKey> {
    if most == 0 {
        return None;
    }
    if let Holder::Namespace(tenant, name) = holder {
        let key = books.index.find_namespace(tenant, name)?;
        return take_from(books, demand, key, |_| Some(most));
    }
    let mut next = books
        .claims
        .of(demand.medium)
        .holders()
        .next_wealthiest(Some(holder), None);
    while let Some((inner, _)) = next {
        if let Some(lease) = take_within(books, demand, &inner, most) {
            return Some(lease);
        }
        next =
            (books.claims.of(demand.medium).holders()).next_wealthiest(Some(holder), Some(&inner));
    }
    None
}

/// A lease of the first session of a namespace, the largest holder first, that has one of use to the asker and no larger
/// than `most` allows, given what the session holds. None once that says that nobody further has to give.
fn take_from(
    books: &mut Books,
    demand: &Demand,
    namespace: NamespaceKey,
    most: impl Fn(u64) -> Option<u64>,
) -> Option<LeaseKey> {
    let mut next = books.claims.of(demand.medium).next_largest(namespace, None);
    while let Some((session, held)) = next {
        if session != demand.session {
            let most = most(held)?;
            if let Some(lease) = cheapest(books, demand, session, namespace, most) {
                return Some(lease);
            }
        }
        next = books
            .claims
            .of(demand.medium)
            .next_largest(namespace, Some(session));
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
    // Taking one of several leases of an allocation that tenants may not share would bring the asker nothing.
    let of_others = u32::from(*books.index.namespace(namespace).tenant() != demand.tenant);
    let wanted = |lease| {
        let region = region(lease);
        books.regions.is_listed(region)
            && demand.can_use(books, region)
            && books.regions.can_open_to(region, &demand.tenant, of_others)
    };
    let last_hit = |lease| books.leases.get(lease).last_hit();
    let its = claims.of_mut(demand.medium);
    let cheapest = its.cheapest(session, namespace, piles, wanted, last_hit);
    books.claims = claims;
    cheapest
}
