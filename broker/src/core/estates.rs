//! Estates: what borrowers that are gone have published, waiting for an heir.
//!
//! Lookups find it as they find what others of the tenant hold. The next session of the tenant that asks for the namespace gets
//! the leases, and what lies in them. Until then an estate is the first thing that goes: when somebody lacks a slab or a place in
//! the index, when a quota is reached, and when its time is over.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use swiftcache_proto::{
    convert::MAX_BLOCKS,
    domain::{AllocationId, Medium},
};

use super::{
    arena::LeaseKey,
    bequest::end_estate,
    books::Books,
    effect::{Inherited, Note, Refusal, Reply},
    event::{Forget, InheritDemand},
    fairness::{Demand, on_its_way},
    leases::Lease,
    quotas::is_of,
    record::Record,
    sharing::grant_of,
};

pub(super) fn inherit(books: &mut Books, demand: &InheritDemand) -> Result<Reply, Refusal> {
    let heir = demand.caller.session;
    let session = books.sessions.of(demand.caller)?;
    let (name, tenant) = (session.name().to_string(), session.tenant().clone());
    books.check_silence(heir)?;
    let device = books.devices.number(&demand.device)?;
    let (mine, later) = inheritable(books, demand, &tenant, device);
    let mut more = later;
    let mut leases: Vec<Inherited> = Vec::new();
    let (mut blocks, mut bytes, mut host_bytes) = (0, 0, 0);
    for key in mine {
        let terms = books.leases.get(key).terms();
        let (id, size) = (terms.id, terms.bytes);
        let published = books.index.published(key);
        let region = books.regions.get(terms.region).device();
        let (taken, most) = match books.devices.medium(region) {
            Medium::Hbm => (&mut bytes, demand.bytes),
            Medium::Host => (&mut host_bytes, demand.host_bytes),
        };
        if *taken + size > most || !may_hold(books, demand, size) {
            continue;
        }
        let full =
            leases.len() >= books.config.max_inherited || blocks + published as usize > MAX_BLOCKS;
        if full {
            more = true;
            break;
        }
        let Some(path) = books.devices.path(device, region) else {
            continue;
        };
        let Some(grant) = grant_of(books, key, path.kind) else {
            continue;
        };
        blocks += published as usize;
        *taken += size;
        let retry_ms = pinned_for(books, key);
        books.record(Record::Inherited {
            lease: id,
            heir,
            device: demand.device.clone(),
        });
        books.inherit(key, heir, device);
        books.counters.inherited_leases += 1;
        books.note(Note::Inherited {
            lease: id,
            heir,
            name: name.clone(),
            bytes: size,
            blocks: published,
        });
        let its = books.index.blocks_in(key);
        leases.push(Inherited {
            grant,
            blocks: its.map(|(slot, hash)| (*hash, slot)).collect(),
            retry_ms,
        });
    }
    Ok(Reply::Inherited { leases, more })
}

/// How long slots of a lease may still be read that hold no published block any more, milliseconds.
fn pinned_for(books: &Books, key: LeaseKey) -> u32 {
    let restored = books.leases.get(key).is_restored();
    let grace = if restored { books.grace_until } else { 0 };
    let until = books.pins.last_on(key).max(grace);
    u32::try_from(until.saturating_sub(books.now)).unwrap_or(u32::MAX)
}

/// What a session may inherit, what was found last first; and whether there may be more soon. It gets nothing that it reads: copies
/// of its own may rely on that nobody writes there.
fn inheritable(
    books: &Books,
    demand: &InheritDemand,
    tenant: &str,
    device: usize,
) -> (Vec<LeaseKey>, bool) {
    let heir = demand.caller.session;
    let namespace = books.index.find_namespace(tenant, &demand.namespace);
    let leases = namespace.into_iter();
    let leases = leases.flat_map(|key| books.index.namespace(key).leases());
    let mut later = false;
    let mut mine = Vec::new();
    for key in leases.copied() {
        let lease = books.leases.get(key);
        let terms = lease.terms();
        let region = books.regions.get(terms.region);
        let able = lease.estate().is_some()
            && terms.block_bytes == demand.block_bytes
            && !lease.readers().contains(&heir)
            && region.donor() != heir
            && !books.unmappable.contains(heir, terms.region)
            && books.devices.path(device, region.device()).is_some();
        match region.handle() {
            _ if !able => {}
            Some(_) => mine.push(key),
            // Its donor has not come back since the broker restarted.
            None => later = true,
        }
    }
    mine.sort_by_key(|key| {
        let lease = books.leases.get(*key);
        (Reverse(lease.last_hit()), lease.terms().id)
    });
    (mine, later)
}

/// Whether the bounds of a session leave room for a lease more. Quotas count what is kept for heirs already.
fn may_hold(books: &Books, demand: &InheritDemand, bytes: u64) -> bool {
    let session = books.sessions.get(demand.caller.session);
    session.is_some_and(|its| {
        let quota = books.config.session_quota_bytes.unwrap_or(u64::MAX);
        its.held_bytes().saturating_add(bytes) <= quota
            && its.leases().len() < books.config.max_leases_per_session
    })
}

/// Ends the estates whose time is over.
pub(super) fn expire_estates(books: &mut Books) {
    while let Some(key) = books.leases.next_expired_estate(books.now) {
        end_estate(books, key);
    }
}

pub(super) fn forget(books: &mut Books, which: &Forget) -> Result<Reply, Refusal> {
    let named = books.leases.estates().filter(|(_, lease)| {
        let namespace = books.index.namespace(lease.terms().namespace);
        let tenant = which.tenant.as_deref();
        let name = which.namespace.as_deref();
        tenant.is_none_or(|tenant| is_of(namespace.tenant(), tenant))
            && name.is_none_or(|name| **namespace.name() == *name)
    });
    let keys: Vec<LeaseKey> = named.map(|(key, _)| key).collect();
    let (mut bytes, mut blocks) = (0, 0);
    let leases = keys.len() as u32;
    for key in keys {
        bytes += books.leases.get(key).terms().bytes;
        blocks += end_estate(books, key);
    }
    Ok(Reply::Forgotten {
        leases,
        bytes,
        blocks,
    })
}

// What goes when somebody lacks a slab.

/// Whether a demand could use the slab of an estate, were it free.
fn is_of_use(books: &Books, demand: &Demand, lease: &Lease) -> bool {
    let region = lease.terms().region;
    let device = books.regions.get(region).device();
    books.devices.medium(device) == demand.medium
        && books.regions.is_listed(region)
        && demand.can_use(books, region)
        && books.devices.path(demand.device, device).is_some()
}

/// Those go last that the demand itself would find, and those later that were found later.
fn worth(books: &Books, demand: &Demand, lease: &Lease) -> impl Ord + use<> {
    let namespace = books.index.namespace(lease.terms().namespace);
    let own = *namespace.tenant() == demand.tenant && *namespace.name() == demand.namespace;
    (own, lease.last_hit(), lease.terms().id)
}

/// Whether the slab can be granted to the demand as soon as the estate is ended.
fn is_at_hand(books: &Books, demand: &Demand, lease: &Lease) -> bool {
    let terms = lease.terms();
    *books.index.namespace(terms.namespace).tenant() == demand.tenant
        && lease.readers().is_empty()
        && books.regions.is_open_to(terms.region, &demand.tenant)
}

/// Ends an estate of the demand's own tenant whose slab can be granted at once, unless enough is on its way to the demand. False
/// when there is none.
pub(super) fn free_own_estate(books: &mut Books, demand: &Demand) -> bool {
    let able = books
        .leases
        .estates()
        .filter(|(_, lease)| is_at_hand(books, demand, lease) && is_of_use(books, demand, lease));
    let Some((key, _)) = able.min_by_key(|(_, lease)| worth(books, demand, lease)) else {
        return false;
    };
    if on_its_way(books, demand).to_asker >= demand.missing {
        return false;
    }
    end_estate(books, key);
    true
}

/// Ends an estate whose slab the demand gets once it is zeroed, or once its readers have let go; of an allocation that tenants may
/// not share, all that are in the way. Says how many bytes that brings; `None` when there is no such estate.
pub(super) fn give_up_estate(books: &mut Books, demand: &Demand) -> Option<u64> {
    let allocation_of = |lease: &Lease| {
        let region = books.regions.get(lease.terms().region);
        region.outline().allocation
    };
    let is_own =
        |lease: &Lease| *books.index.namespace(lease.terms().namespace).tenant() == demand.tenant;
    let mut of_others: BTreeMap<AllocationId, u32> = BTreeMap::new();
    for (_, lease) in books.leases.estates() {
        if !is_own(lease) {
            *of_others.entry(allocation_of(lease)).or_default() += 1;
        }
    }
    let able = books.leases.estates().filter(|(_, lease)| {
        let region = lease.terms().region;
        let ending = of_others.get(&allocation_of(lease)).copied().unwrap_or(0);
        let donor = books.sessions.get(books.regions.get(region).donor());
        // Nobody else can zero what another tenant has left.
        let zeroes = is_own(lease) || donor.is_some_and(|donor| donor.is_attached());
        zeroes
            && is_of_use(books, demand, lease)
            && !is_at_hand(books, demand, lease)
            && books.regions.can_open_to(region, &demand.tenant, ending)
    });
    let (first, lease) = able.min_by_key(|(_, lease)| worth(books, demand, lease))?;
    let mut ending = BTreeSet::from([first]);
    if !books
        .regions
        .can_open_to(lease.terms().region, &demand.tenant, 0)
    {
        let allocation = allocation_of(lease);
        let beside = (books.leases.estates())
            .filter(|(_, other)| !is_own(other) && allocation_of(other) == allocation);
        ending.extend(beside.map(|(key, _)| key));
    }
    let mut bytes = 0;
    for key in ending {
        bytes += books.leases.get(key).terms().bytes;
        end_estate(books, key);
    }
    Some(bytes)
}
