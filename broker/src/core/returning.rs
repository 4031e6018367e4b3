//! A region's last step: it is its donor's own again.

use super::{
    arena::RegionKey,
    books::Books,
    effect::{Effect, Note, Outgoing},
    record::Record,
};

/// Nobody can touch the region any more: it is its donor's own.
pub(super) fn return_region(books: &mut Books, key: RegionKey) {
    let outline = *books.regions.get(key).outline();
    books.record(Record::RegionReturned { region: outline.id });
    books.note(Note::Returned {
        region: outline.id,
        bytes: outline.bytes,
    });
    // The broker's own hold on the memory goes before its donor hears that nobody has any.
    if let Some(allocation) = books.remove_region(key) {
        books.out.push(Effect::DropHandle(allocation));
    }
    books.send(outline.donor, Outgoing::Returned(outline.id));
    books.sessions.bury(outline.donor);
}
