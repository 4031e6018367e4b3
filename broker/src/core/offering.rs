//! Offering: a region comes in, or its donor says once more how it is mapped.

use swiftcache_proto::domain::{Handle, HandleKind, Medium};

use super::{
    arena::RegionKey,
    books::Books,
    effect::{Note, Refusal, Reply},
    event::Offer,
    record::Record,
    region::{Outline, Promises},
};

pub(super) fn offer(books: &mut Books, offer: Offer) -> Result<Reply, Refusal> {
    let donor = books.sessions.of(offer.caller)?;
    let promises = Promises {
        shared: offer.shared,
        elastic: offer.elastic,
    };
    let outline = Outline {
        id: offer.region,
        donor: offer.caller.session,
        device: books.devices.number(&offer.device)?,
        allocation: offer.allocation,
        offset: offer.offset,
        bytes: offer.bytes,
        slab_bytes: offer.slab_bytes,
    };
    if books.devices.medium(outline.device) == Medium::Host {
        host_memory_is_a_file(&offer)?;
    }
    if let Some(key) = books.regions.key(offer.region) {
        return offer_again(books, key, &outline, promises, offer.handle);
    }
    if donor.returned().contains(&outline.id) {
        return Err(Refusal::Stale(format!(
            "region {} was returned; zero its bytes and offer them under a new id",
            outline.id
        )));
    }
    let room = books.room();
    books.regions.admissible(&outline, &books.devices, room)?;
    fits_on_device(books, &outline, offer.caller.process.uid)?;
    if promises.elastic {
        be_the_only_follower(books, &outline)?;
    }
    let key = books.admit(outline, promises);
    books.set_handle(key, offer.handle);
    books.record(Record::Region {
        donor: offer.caller.session,
        region: offer.region,
        device: offer.device.clone(),
        allocation: offer.allocation,
        offset: offer.offset,
        bytes: offer.bytes,
        slab_bytes: offer.slab_bytes,
        shared: offer.shared,
        elastic: offer.elastic,
    });
    books.note(Note::Offered {
        region: offer.region,
        device: offer.device,
        bytes: offer.bytes,
    });
    Ok(Reply::Done)
}

/// Host memory is lent as a file that other processes map, and of it a fixed amount.
fn host_memory_is_a_file(offer: &Offer) -> Result<(), Refusal> {
    let invalid = |field, problem: &str| {
        Err(Refusal::Invalid {
            field,
            problem: problem.to_owned(),
        })
    };
    if offer.handle.kind() != HandleKind::PosixFd {
        return invalid("handle", "is no descriptor, as host memory needs");
    }
    if offer.elastic {
        return invalid(
            "elastic",
            "is set for host memory, of which a fixed amount is lent",
        );
    }
    Ok(())
}

/// Nobody has more of a device to offer than there is. Counted for each user, since only one of those who together offer
/// more than that can be believed, and the others must not be locked out by who lies.
fn fits_on_device(books: &Books, offer: &Outline, uid: u32) -> Result<(), Refusal> {
    let hbm_bytes = books.devices.get(offer.device).hbm_bytes;
    let offered = books.sessions.donated_by(uid, offer.device);
    // 0: unknown.
    if hbm_bytes == 0 || offered.saturating_add(offer.bytes) <= hbm_bytes {
        return Ok(());
    }
    Err(Refusal::Invalid {
        field: "bytes",
        problem: format!(
            "is {}; uid {uid} offers {offered} there already, and the device has {hbm_bytes}",
            offer.bytes
        ),
    })
}

/// Two donors that follow one device would take each other for neighbours, and both give back for one that grows.
fn be_the_only_follower(books: &Books, outline: &Outline) -> Result<(), Refusal> {
    let mut followers = books.regions.shelf(outline.device).followers();
    let Some(other) = followers.find(|donor| *donor != outline.donor) else {
        return Ok(());
    };
    let name = books
        .sessions
        .get(other)
        .map(|other| other.name().to_string());
    Err(Refusal::Followed {
        device: books.devices.uuid(outline.device).clone(),
        donor: other.label(),
        name: name.unwrap_or_default(),
    })
}

fn offer_again(
    books: &mut Books,
    key: RegionKey,
    outline: &Outline,
    promises: Promises,
    handle: Handle,
) -> Result<Reply, Refusal> {
    let region = books.regions.get(key);
    if region.outline() != outline {
        return Err(Refusal::Overlap {
            region: outline.id,
            with: region.id(),
        });
    }
    if region.is_withdrawing() {
        return Err(Refusal::Stale(format!(
            "region {} is on its way back; offer the bytes again under a new id once it is returned",
            region.id()
        )));
    }
    // A ledger of an earlier version lacks them.
    books.regions.promise(key, promises);
    books.set_handle(key, handle);
    Ok(Reply::Done)
}
