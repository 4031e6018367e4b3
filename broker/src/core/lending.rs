//! Which slabs a demand is granted.
//!
//! Best link first, then most bandwidth; among equals the device with the most free bytes, so that transfers spread;
//! on a device, regions in use before whole ones, so that whole ones stay cheap to give back.
//!
//! Whoever maps a slab can reach all of its allocation. So slabs of one allocation go to one tenant at a time, and what
//! others left in any of them is zeroed first, unless its donor says that tenants may share it.
//!
//! Host memory stands in for HBM that is not to be had: a demand that accepts it is granted some only when HBM falls short, and
//! not while HBM is being zeroed for it.

use swiftcache_proto::domain::{Generation, LinkKind, Medium, RevokeReason, Shortfall};

use super::{
    arena::RegionKey,
    bequest::{Whose, end_coldest},
    books::{Books, NewLease},
    effect::{Grant, Note, Refusal, Reply},
    estates::{free_own_estate, give_up_estate},
    event::LeaseDemand,
    fairness::{Demand, fair, on_its_way, slab_to_take, wait},
    record::Record,
    region::{Dirt, Rank},
    revocation::revoke,
    scrubs::scrub,
    sharing::grant_of,
};

/// The most slabs taken from others on account of one demand: a session that lacks more asks again.
const TAKEN_AT_ONCE: usize = 64;

/// Why no further slab is granted.
enum Stop {
    Quota,
    Fairness,
    NoSlab,
}

/// A free slab, and the link over which the demand's device reaches it.
struct Found {
    region: RegionKey,
    slab: u32,
    link: LinkKind,
}

pub(super) fn lease(books: &mut Books, demand: LeaseDemand) -> Result<Reply, Refusal> {
    let session = books.sessions.of(demand.caller)?;
    let (name, tenant) = (session.name().to_string(), session.tenant().clone());
    books.check_silence(demand.caller.session)?;
    let device = books.devices.number(&demand.device)?;
    let all_bytes = demand.bytes.saturating_add(demand.host_bytes);
    for (field, value) in [("bytes", all_bytes), ("block_bytes", demand.block_bytes)] {
        if value == 0 {
            return Err(Refusal::Invalid {
                field,
                problem: "is 0".to_owned(),
            });
        }
    }
    let least = books.config.min_block_bytes;
    if demand.block_bytes < least {
        return Err(Refusal::Invalid {
            field: "block_bytes",
            problem: format!("is {}; takes at least {least}", demand.block_bytes),
        });
    }
    if demand.host_bytes > 0 && !demand.class.is_cache() {
        return Err(Refusal::Invalid {
            field: "host_bytes",
            problem: "is above 0 for a working set, which lies in HBM only".to_owned(),
        });
    }
    let (asked_bytes, host_bytes) = (demand.bytes, demand.host_bytes);
    let mut demand = Demand {
        session: demand.caller.session,
        tenant,
        namespace: demand.namespace.into(),
        device,
        block_bytes: demand.block_bytes,
        class: demand.class,
        medium: Medium::Hbm,
        tiers: books.devices.tiers(device, Medium::Hbm),
        missing: asked_bytes,
    };
    books.claims.expire_waits(books.now);
    books.claims.stop_waiting(demand.session);
    let (mut grants, stop) = grant_slabs(books, &mut demand, books.config.max_grants);
    let mut shortfall = shortfall_of(books, &demand, stop);
    let short = demand.missing > 0 || asked_bytes == 0;
    if host_bytes > 0 && short && shortfall != Shortfall::Scrubbing && offers_host_memory(books) {
        let mut in_host = demand.of_host_memory(books, host_bytes);
        let room = books.config.max_grants.saturating_sub(grants.len());
        let (more, stop) = grant_slabs(books, &mut in_host, room);
        grants.extend(more);
        let host_shortfall = shortfall_of(books, &in_host, stop);
        if asked_bytes == 0 {
            shortfall = host_shortfall;
        }
    } else if asked_bytes == 0 {
        shortfall = Shortfall::NoFreeSlab;
    }
    books.counters.leases_granted += grants.len() as u64;
    if shortfall != Shortfall::None {
        books.counters.leases_refused += u64::from(grants.is_empty());
        books.note(Note::LeaseShort {
            session: demand.session,
            name,
            tenant: demand.tenant.to_string(),
            namespace: demand.namespace.to_string(),
            device: books.devices.uuid(device).clone(),
            asked_bytes,
            granted_bytes: asked_bytes.saturating_sub(demand.missing),
            shortfall,
        });
    }
    Ok(Reply::Leased { grants, shortfall })
}

/// Whether any host memory is on offer. Without any, nobody waits for it either.
fn offers_host_memory(books: &Books) -> bool {
    let shelves = books.regions.shelves().iter().enumerate();
    shelves
        .filter(|(device, _)| books.devices.medium(*device) == Medium::Host)
        .any(|(_, shelf)| shelf.account().offered > 0)
}

/// Grants as much as is free and fair, in at most `room` slabs.
fn grant_slabs(books: &mut Books, demand: &mut Demand, room: usize) -> (Vec<Grant>, Option<Stop>) {
    let mut grants: Vec<Grant> = Vec::new();
    while demand.missing > 0 {
        let Some(found) = best_slab(books, demand) else {
            if free_own_estate(books, demand) {
                continue;
            }
            return (grants, Some(Stop::NoSlab));
        };
        let bytes = books.regions.get(found.region).slab_bytes();
        if grants.len() >= room {
            return (grants, Some(Stop::Quota));
        }
        if let Some(bound) = bound_reached(books, demand, bytes) {
            // What is kept for heirs counts as held, and goes first.
            let (tenant, name) = (demand.tenant.clone(), demand.namespace.clone());
            let ended = match &bound {
                Bound::Session => false,
                Bound::Namespace => end_coldest(books, Whose::Namespace(&tenant, &name)),
                Bound::Tenant(of) => end_coldest(books, Whose::Tenant(of)),
                Bound::Leases => end_coldest(books, Whose::Anybody),
            };
            if ended {
                continue;
            }
            return (grants, Some(Stop::Quota));
        }
        if !fair(books, demand, found.region) {
            return (grants, Some(Stop::Fairness));
        }
        grants.extend(grant(books, demand, &found));
        demand.missing = demand.missing.saturating_sub(bytes);
    }
    (grants, None)
}

/// What keeps a demand from a slab more.
enum Bound {
    /// Of its session.
    Session,
    /// The quota of its namespace.
    Namespace,
    /// The quota of this tenant.
    Tenant(String),
    /// Of all leases together.
    Leases,
}

/// The quota or bound that a slab more of so many bytes would be beyond, if there is one.
fn bound_reached(books: &Books, demand: &Demand, bytes: u64) -> Option<Bound> {
    let Some(session) = books.sessions.get(demand.session) else {
        return Some(Bound::Session);
    };
    let beyond = |held: u64, quota: Option<u64>| quota.is_some_and(|most| held + bytes > most);
    let namespace = books
        .index
        .find_namespace(&demand.tenant, &demand.namespace);
    let held = namespace.map_or(0, |key| books.index.namespace(key).leased_bytes());
    // Only who has such a quota pays for the sum.
    let mut of_tenant = books.quotas.of_tenant(&demand.tenant);
    if beyond(session.held_bytes(), books.config.session_quota_bytes)
        || session.leases().len() >= books.config.max_leases_per_session
    {
        return Some(Bound::Session);
    }
    if beyond(held, books.quotas.of_namespace(&demand.namespace)) {
        return Some(Bound::Namespace);
    }
    if let Some((of, _)) =
        of_tenant.find(|(of, quota)| beyond(books.index.held_by(of), Some(*quota)))
    {
        return Some(Bound::Tenant(of.to_owned()));
    }
    (books.leases.len() >= books.config.max_leases).then_some(Bound::Leases)
}

/// The best free slab that the demand's tenant may have as it is.
fn best_slab(books: &Books, demand: &Demand) -> Option<Found> {
    let own = Some(demand.tenant.clone());
    demand.tiers.iter().find_map(|(link, devices)| {
        let candidates = devices.iter().filter_map(|number| {
            let usable = [&own, &None]
                .into_iter()
                .filter_map(|dirt| Some((first_fitting(books, *number, dirt, demand)?, dirt)));
            // Whole regions last; then the tenant's own leavings, which cost nobody a scrub.
            let best = usable.min_by_key(|(rank, dirt)| (rank.0, dirt.is_none(), *rank))?;
            Some((*number, best))
        });
        let most_free = |(number, _): &(usize, _)| {
            let free = books.regions.shelf(*number).lendable().free;
            (free, std::cmp::Reverse(*number))
        };
        let (_, ((.., region), dirt)) = candidates.max_by_key(most_free)?;
        Some(Found {
            region,
            slab: books.regions.get(region).first_free(dirt)?,
            link: *link,
        })
    })
}

fn first_fitting(books: &Books, device: usize, dirt: &Dirt, demand: &Demand) -> Option<Rank> {
    let mut ranks = books.regions.shelf(device).with_free(dirt);
    ranks.find(|(.., key)| {
        demand.can_use(books, *key) && books.regions.is_open_to(*key, &demand.tenant)
    })
}

fn grant(books: &mut Books, demand: &Demand, found: &Found) -> Option<Grant> {
    let id = books.leases.next_id();
    let region = books.regions.get(found.region);
    let (region_id, device) = (region.id(), region.device());
    let bytes = region.slab_bytes();
    let generation = region.slab(found.slab)?.generation() + 1;
    let key = books.take_slab(NewLease {
        id,
        lessee: demand.session,
        tenant: demand.tenant.clone(),
        namespace: demand.namespace.clone(),
        device: demand.device,
        block_bytes: demand.block_bytes,
        class: demand.class,
        region: found.region,
        slab: found.slab,
        generation,
    });
    books.record(Record::Lease {
        lease: id,
        generation: Generation(generation),
        lessee: demand.session,
        region: region_id,
        slab: found.slab,
        tenant: demand.tenant.to_string(),
        namespace: demand.namespace.to_string(),
        device: books.devices.uuid(demand.device).clone(),
        block_bytes: demand.block_bytes,
        class: demand.class,
    });
    books.note(Note::Leased {
        lease: id,
        region: region_id,
        device: books.devices.uuid(device).clone(),
        bytes,
        link: found.link,
    });
    grant_of(books, key, found.link)
}

/// Says why the demand was not met in full, and does what can be done about it: has slabs zeroed, and asks
/// borrowers above their share to let go.
fn shortfall_of(books: &mut Books, demand: &Demand, stop: Option<Stop>) -> Shortfall {
    match stop {
        None => Shortfall::None,
        Some(Stop::Quota) => Shortfall::Quota,
        Some(Stop::Fairness) => {
            wait(books, demand);
            Shortfall::Fairness
        }
        Some(Stop::NoSlab) if block_too_large(books, demand) => Shortfall::BlockTooLarge,
        Some(Stop::NoSlab) => {
            wait(books, demand);
            let mut scrubbing = scrub_for(books, demand);
            if reclaim_for(books, demand) {
                scrubbing |= scrub_for(books, demand);
            }
            match scrubbing {
                true => Shortfall::Scrubbing,
                false => Shortfall::NoFreeSlab,
            }
        }
    }
}

fn block_too_large(books: &Books, demand: &Demand) -> bool {
    let devices = demand.tiers.iter().flat_map(|(_, devices)| devices);
    let largest = devices
        .filter_map(|number| books.regions.shelf(*number).slab_sizes().next_back())
        .max();
    largest.is_some_and(|bytes| bytes < demand.block_bytes)
}

/// Has free slabs that other tenants used zeroed, as many as the demand misses; says whether any are under way.
fn scrub_for(books: &mut Books, demand: &Demand) -> bool {
    let devices: Vec<_> = demand
        .tiers
        .iter()
        .flat_map(|(_, devices)| devices.iter().copied())
        .collect();
    let lendable = devices.iter().map(|number| books.regions.shelf(*number));
    let mut scrubbing: u64 = lendable.map(|shelf| shelf.lendable().scrubbing).sum();
    for number in &devices {
        while scrubbing < demand.missing {
            let Some((region, slab)) = dirty_slab(books, *number, demand) else {
                break;
            };
            if !fair(books, demand, region) {
                break;
            }
            scrub(books, region, slab);
            scrubbing += books.regions.get(region).slab_bytes();
            // All of the allocation must be clean of others' bytes before the demand can have any of it.
            for (region, slab) in books.regions.in_the_way(region, &demand.tenant) {
                scrub(books, region, slab);
                scrubbing += books.regions.get(region).slab_bytes();
            }
        }
    }
    scrubbing > 0
}

/// A free slab that only lacks zeroing, in a region whose donor can be told.
fn dirty_slab(books: &Books, device: usize, demand: &Demand) -> Option<(RegionKey, u32)> {
    let mut dirty = books.regions.shelf(device).with_dirty(&demand.tenant);
    dirty.find_map(|(dirt, (.., key))| {
        let region = books.regions.get(key);
        let donor = books.sessions.get(region.donor())?;
        let fits = donor.is_attached()
            && demand.can_use(books, key)
            && books.regions.can_open_to(key, &demand.tenant, 0);
        let slab = region.first_free(dirt)?;
        fits.then_some((key, slab))
    })
}

/// Gives up estates, and then asks the largest holders to let go of what the demand lacks and may have. Says whether an estate was
/// given up.
fn reclaim_for(books: &mut Books, demand: &Demand) -> bool {
    let mut gave_up = false;
    let mut coming = on_its_way(books, demand);
    let mut lacking = demand.missing.saturating_sub(coming.to_asker);
    for _ in 0..TAKEN_AT_ONCE {
        if lacking == 0 {
            break;
        }
        if let Some(bytes) = give_up_estate(books, demand) {
            gave_up = true;
            coming.to_asker += bytes;
            lacking = lacking.saturating_sub(bytes);
            continue;
        }
        let Some(lease) = slab_to_take(books, demand, &coming) else {
            break;
        };
        let bytes = books.leases.get(lease).terms().bytes;
        let drain_ms = books.config.default_drain_ms;
        revoke(books, lease, RevokeReason::Fairness, drain_ms, None);
        coming.to_asker += bytes;
        lacking = lacking.saturating_sub(bytes);
    }
    gave_up
}
