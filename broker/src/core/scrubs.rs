//! Scrubs: a slab is zeroed by its donor before another tenant gets it.

use swiftcache_proto::domain::{Generation, RegionId};

use super::{
    account::Place,
    arena::RegionKey,
    books::Books,
    effect::{Outgoing, Refusal},
    event::Caller,
    record::Record,
};

/// Has the donor zero a free slab.
pub(super) fn scrub(books: &mut Books, key: RegionKey, slab: u32) {
    books.regions.put(key, slab, Place::Scrubbing);
    let region = books.regions.get(key);
    let (id, donor) = (region.id(), region.donor());
    let generation = region.slab(slab).map_or(0, |slab| slab.generation());
    books.record(Record::Scrubbing { region: id, slab });
    let scrub = Outgoing::Scrub {
        region: id,
        slab,
        generation: Generation(generation),
    };
    books.send(donor, scrub);
}

pub(super) fn scrubbed(
    books: &mut Books,
    caller: Caller,
    region: RegionId,
    slab: u32,
    generation: Generation,
) -> Result<(), Refusal> {
    books.sessions.of(caller)?;
    let Some(key) = books.regions.key(region) else {
        return Ok(());
    };
    let its = books.regions.get(key);
    if its.donor() != caller.session {
        return Err(Refusal::NotYours {
            what: "region",
            which: region.to_string(),
        });
    }
    let being_scrubbed = its
        .slab(slab)
        .is_some_and(|slab| slab.place() == Place::Scrubbing && slab.generation() == generation.0);
    if being_scrubbed {
        books.record(Record::Scrubbed { region, slab });
        books.regions.clean(key, slab);
    }
    Ok(())
}
