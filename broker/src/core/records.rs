//! From the books to a ledger.

use swiftcache_proto::domain::Generation;

use super::{
    account::Place, arena::LeaseKey, books::Books, event::DrainTarget, record::Record,
    region::Region,
};

/// The shortest ledger that restores these books.
pub(super) fn records(books: &Books) -> Vec<Record> {
    let mut records = vec![Record::NextLease {
        lease: books.leases.next_id(),
    }];
    let sessions = books.sessions.iter();
    records.extend(sessions.map(|(id, session)| Record::Session {
        session: id,
        process: session.process(),
        name: session.name().to_string(),
        tenant: session.tenant().to_string(),
    }));
    let shelves = books.regions.shelves().iter().enumerate();
    let drained = shelves.filter(|(_, shelf)| shelf.is_drained());
    let devices = drained.map(|(number, _)| books.devices.uuid(number).clone());
    let donors = books.regions.drained_donors().iter().cloned();
    let targets = (devices.map(DrainTarget::Device)).chain(donors.map(DrainTarget::Donor));
    records.extend(targets.map(|target| Record::Drained { target }));
    records.extend(books.quotas.iter().map(|(target, bytes)| Record::Quota {
        target: target.clone(),
        bytes: Some(bytes),
    }));
    for (_, region) in books.regions.iter() {
        record_region(books, region, &mut records);
    }
    for (key, _) in books.leases.iter() {
        record_lease(books, key, &mut records);
    }
    let over = books
        .sessions
        .iter()
        .filter(|(_, session)| session.is_over());
    records.extend(over.map(|(session, _)| Record::SessionOver { session }));
    records
}

fn record_region(books: &Books, region: &Region, records: &mut Vec<Record>) {
    let outline = region.outline();
    let id = outline.id;
    records.push(Record::Region {
        donor: outline.donor,
        region: id,
        device: books.devices.uuid(outline.device).clone(),
        allocation: outline.allocation,
        offset: outline.offset,
        bytes: outline.bytes,
        slab_bytes: outline.slab_bytes,
        shared: region.promises().shared,
        elastic: region.promises().elastic,
    });
    if region.is_withdrawing() {
        records.push(Record::RegionWithdrawn { region: id });
    }
    if region.is_drained() {
        records.push(Record::Drained {
            target: DrainTarget::Region(id),
        });
    }
    for (number, slab) in (0..).zip(region.slabs()) {
        if slab.lease().is_none() && slab.generation() > 0 {
            records.push(Record::Slab {
                region: id,
                slab: number,
                generation: Generation(slab.generation()),
                tenant: slab.dirt().as_ref().map(|tenant| tenant.to_string()),
            });
        }
        if slab.place() == Place::Scrubbing {
            records.push(Record::Scrubbing {
                region: id,
                slab: number,
            });
        }
    }
}

/// What a lease that is kept for an heir holds.
pub(super) fn estate_record(books: &Books, key: LeaseKey) -> Record {
    let blocks = books.index.blocks_in(key);
    let (slots, blocks): (Vec<u32>, Vec<String>) =
        blocks.map(|(slot, hash)| (slot, hash.to_string())).unzip();
    Record::Estate {
        lease: books.leases.get(key).terms().id,
        slots,
        blocks: blocks.concat(),
    }
}

fn record_lease(books: &Books, key: LeaseKey, records: &mut Vec<Record>) {
    let lease = books.leases.get(key);
    let terms = lease.terms();
    let id = terms.id;
    let namespace = books.index.namespace(terms.namespace);
    records.push(Record::Lease {
        lease: id,
        generation: terms.generation,
        lessee: terms.lessee,
        region: books.regions.get(terms.region).id(),
        slab: terms.slab,
        tenant: namespace.tenant().to_string(),
        namespace: namespace.name().to_string(),
        device: books.devices.uuid(terms.device).clone(),
        block_bytes: terms.block_bytes,
        class: terms.class,
    });
    records.extend(lease.readers().iter().map(|reader| Record::Share {
        lease: id,
        reader: *reader,
    }));
    if let Some(revocation) = lease.revocation() {
        records.push(Record::Revoked {
            lease: id,
            reason: revocation.reason,
        });
    }
    if lease.estate().is_some() {
        records.push(estate_record(books, key));
    } else if !lease.lessee_holds() {
        records.push(Record::LetGo {
            lease: id,
            session: terms.lessee,
        });
    }
}
