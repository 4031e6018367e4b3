//! From a ledger to the books that wrote it.

use swiftcache_proto::domain::{BlockHash, DeviceUuid, LeaseId, RegionId, SessionId};

use super::{
    account::Place,
    arena::{LeaseKey, RegionKey},
    books::{Books, NewLease},
    index::Location,
    operator::set_drained,
    record::Record,
    region::{Outline, Promises},
    returning::return_region,
};

/// Hexadecimal digits of a block's hash.
const DIGITS: usize = 32;

/// A ledger that contradicts itself or the node: nothing may be lent on its word.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ledger record {number}: {problem}")]
pub struct LedgerError {
    /// Which record, counted from 1.
    pub number: usize,
    /// What it contradicts.
    pub problem: String,
}

/// Does to the books what was done to those that wrote the record. An error says what it contradicts.
pub(super) fn replay(books: &mut Books, record: Record) -> Result<(), String> {
    match record {
        Record::Session {
            session,
            process,
            name,
            tenant,
        } => {
            if books.sessions.get(session).is_some() {
                return Err(format!("{session:?} was opened before"));
            }
            books.enrol(session, process, &name, &tenant);
        }
        Record::SessionOver { session } => session_over(books, session)?,
        Record::Region {
            donor,
            region,
            device,
            allocation,
            offset,
            bytes,
            slab_bytes,
            shared,
            elastic,
        } => {
            let outline = Outline {
                id: region,
                donor,
                device: device_of(books, &device)?,
                allocation,
                offset,
                bytes,
                slab_bytes,
            };
            admit(books, outline, Promises { shared, elastic })?;
        }
        Record::RegionWithdrawn { region } => {
            let key = region_of(books, region)?;
            books.regions.withdraw(key);
        }
        Record::RegionReturned { region } => {
            let key = region_of(books, region)?;
            let its = books.regions.get(key);
            if its.leases() > 0 {
                return Err(format!("region {region} has leases"));
            }
            let donor = its.donor();
            books.remove_region(key);
            books.sessions.bury(donor);
        }
        Record::Lease {
            lease,
            generation,
            lessee,
            region,
            slab,
            tenant,
            namespace,
            device,
            block_bytes,
            class,
        } => {
            let key = free_slab_of(books, region, slab)?;
            let new = NewLease {
                id: lease,
                lessee,
                tenant: tenant.into(),
                namespace: namespace.into(),
                device: device_of(books, &device)?,
                block_bytes,
                class,
                region: key,
                slab,
                generation: generation.0,
            };
            grant(books, new)?;
        }
        Record::Estate {
            lease,
            slots,
            blocks,
        } => {
            let key = lease_of(books, lease)?;
            estate(books, key, &slots, &blocks)?;
        }
        Record::Inherited {
            lease,
            heir,
            device,
        } => {
            let key = lease_of(books, lease)?;
            let device = device_of(books, &device)?;
            if books.leases.get(key).estate().is_none() {
                return Err(format!("lease {lease} was not kept for an heir"));
            }
            if books.sessions.get(heir).is_none() {
                return Err(format!("no {heir:?}"));
            }
            books.inherit(key, heir, device);
            // Its heir publishes it again, as every lessee does.
            books.forget_blocks(key);
            books.leases.mark_restored(key);
        }
        Record::Share { lease, reader } => {
            let key = lease_of(books, lease)?;
            if books.sessions.get(reader).is_none() {
                return Err(format!("no {reader:?}"));
            }
            books.add_reader(key, reader);
        }
        Record::Revoked { lease, reason } => {
            let key = lease_of(books, lease)?;
            if books.leases.get(key).is_active() {
                books.begin_revocation(key, reason, 0);
            }
        }
        Record::LetGo { lease, session } => {
            let key = lease_of(books, lease)?;
            books.drop_party(key, session);
            let its = books.leases.get(key);
            let ended = its.estate().is_none() || its.terms().lessee == session;
            if ended && its.parties().next().is_none() {
                books.free_slab(key);
            }
        }
        Record::Scrubbing { region, slab } => {
            let key = free_slab_of(books, region, slab)?;
            books.regions.put(key, slab, Place::Scrubbing);
        }
        Record::Scrubbed { region, slab } => {
            let key = region_of(books, region)?;
            if place_of(books, key, slab) != Some(Place::Scrubbing) {
                return Err(format!(
                    "slab {slab} of region {region} is not being zeroed"
                ));
            }
            books.regions.clean(key, slab);
        }
        Record::Drained { target } => {
            set_drained(books, &target, true);
        }
        Record::Undrained { target } => {
            set_drained(books, &target, false);
        }
        Record::Quota { target, bytes } => {
            books.quotas.set(target, bytes);
        }
        Record::Slab {
            region,
            slab,
            generation,
            tenant,
        } => {
            let key = free_slab_of(books, region, slab)?;
            let dirt = tenant.map(Into::into);
            books.regions.set_history(key, slab, generation.0, dirt);
        }
        Record::NextLease { lease } => books.leases.start_from(lease),
    }
    Ok(())
}

fn estate(books: &mut Books, key: LeaseKey, slots: &[u32], blocks: &str) -> Result<(), String> {
    let lease = books.leases.get(key);
    let id = lease.terms().id;
    let region = lease.terms().region;
    if !lease.is_active() || lease.estate().is_some() {
        return Err(format!("lease {id} cannot be kept for an heir"));
    }
    if slots.is_empty() || blocks.len() != slots.len() * DIGITS || !blocks.is_ascii() {
        return Err(format!("lease {id} names other slots than blocks"));
    }
    for (number, slot) in slots.iter().enumerate() {
        let digits = &blocks[number * DIGITS..][..DIGITS];
        // A block's hash is written like a region's id.
        let RegionId(hash) = digits.parse()?;
        let at = Location {
            lease: key,
            slot: *slot,
        };
        if *slot >= books.index.slots(key) || books.index.block(at).is_some() {
            return Err(format!("lease {id} has no empty slot {slot}"));
        }
        (books.index).insert(&mut books.journal, BlockHash(hash), at);
    }
    books.regions.published_more(region, slots.len() as u64);
    books.keep_for_heir(key, 0);
    Ok(())
}

fn session_over(books: &mut Books, id: SessionId) -> Result<(), String> {
    let session = books.sessions.get(id).ok_or_else(|| format!("no {id:?}"))?;
    if !session.leases().is_empty() || !session.reads().is_empty() {
        return Err(format!("{id:?} has not let go of its leases"));
    }
    let withdrawn = |region: &RegionId| {
        let key = books.regions.key(*region);
        key.is_some_and(|key| books.regions.get(key).is_withdrawing())
    };
    if !session.regions().iter().all(withdrawn) {
        return Err(format!("{id:?} has not withdrawn its regions"));
    }
    books.end_session(id);
    books.sessions.bury(id);
    Ok(())
}

fn admit(books: &mut Books, outline: Outline, promises: Promises) -> Result<(), String> {
    if books.sessions.get(outline.donor).is_none() {
        return Err(format!("no {:?}", outline.donor));
    }
    if books.regions.key(outline.id).is_some() {
        return Err(format!("region {} was offered before", outline.id));
    }
    let room = books.room();
    let admissible = books.regions.admissible(&outline, &books.devices, room);
    admissible.map_err(|refusal| refusal.to_string())?;
    books.admit(outline, promises);
    Ok(())
}

fn grant(books: &mut Books, new: NewLease) -> Result<(), String> {
    if books.leases.key(new.id).is_some() {
        return Err(format!("lease {} was granted before", new.id));
    }
    if new.block_bytes == 0 {
        return Err("block_bytes is 0".to_owned());
    }
    let key = books.take_slab(new);
    books.leases.mark_restored(key);
    Ok(())
}

fn device_of(books: &Books, uuid: &DeviceUuid) -> Result<usize, String> {
    let number = books.devices.number(uuid);
    number.map_err(|_| format!("names device {uuid}, which this node lacks"))
}

fn region_of(books: &Books, id: RegionId) -> Result<RegionKey, String> {
    let key = books.regions.key(id);
    key.ok_or_else(|| format!("no region {id}"))
}

fn lease_of(books: &Books, id: LeaseId) -> Result<LeaseKey, String> {
    let key = books.leases.key(id);
    key.ok_or_else(|| format!("no lease {id}"))
}

fn place_of(books: &Books, region: RegionKey, slab: u32) -> Option<Place> {
    let slab = books.regions.get(region).slab(slab);
    slab.map(|slab| slab.place())
}

fn free_slab_of(books: &Books, region: RegionId, slab: u32) -> Result<RegionKey, String> {
    let key = region_of(books, region)?;
    match place_of(books, key, slab) {
        Some(Place::Free) => Ok(key),
        _ => Err(format!("slab {slab} of region {region} is not free")),
    }
}

/// The first event after a restore tells the time: windows are counted from here, and what the last broker had
/// begun is finished.
pub(super) fn settle(books: &mut Books) {
    let now = books.now;
    books.grace_until = now.saturating_add(books.config.pin_ms.into());
    books.sessions.restart_clocks(now);
    let deadline = now.saturating_add(books.config.default_drain_ms.into());
    let estates_until = now.saturating_add(books.config.estate_ttl_ms.into());
    books.leases.restart_clocks(now, deadline, estates_until);
    let over = books.regions.iter();
    let over = over.filter(|(_, region)| region.is_withdrawing() && region.leases() == 0);
    for key in over.map(|(key, _)| key).collect::<Vec<_>>() {
        return_region(books, key);
    }
}
