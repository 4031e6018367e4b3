//! Publishing: lessees say which blocks lie in which slots of their leases, and which do so no more.

use std::collections::BTreeSet;

use swiftcache_proto::domain::{BlockHash, Generation, LeaseId, SessionId};

use super::{
    arena::LeaseKey,
    bequest::{Whose, end_coldest},
    books::Books,
    disking::offer,
    effect::{Note, Refusal, Reply},
    event::{Caller, Publish},
    index::Location,
    lookup::Asker,
    quotas::user_of,
};

/// The lease, if the caller is its lessee, the generation is its own and it is not being revoked.
fn active_lease_of(
    books: &Books,
    caller: Caller,
    id: LeaseId,
    generation: Generation,
) -> Result<LeaseKey, Refusal> {
    books.sessions.of(caller)?;
    let (key, lease) = books.leases.known(id)?;
    if lease.terms().lessee != caller.session {
        return Err(Refusal::NotYours {
            what: "lease",
            which: id.to_string(),
        });
    }
    let held = lease.terms().generation;
    if held != generation {
        return Err(Refusal::Stale(format!(
            "lease {id} is generation {}, not {}",
            held.0, generation.0
        )));
    }
    if let Some(revocation) = lease.revocation() {
        return Err(Refusal::Stale(format!(
            "lease {id} is being revoked: {}",
            revocation.reason
        )));
    }
    Ok(key)
}

pub(super) fn publish(books: &mut Books, publish: Publish) -> Result<Reply, Refusal> {
    let lease = active_lease_of(books, publish.caller, publish.lease, publish.generation)?;
    make_room_in_index(books, publish.caller.session, publish.blocks.len());
    publishable(books, lease, &publish.blocks)?;
    let terms = books.leases.get(lease).terms();
    if !terms.class.is_cache() {
        return Err(Refusal::Invalid {
            field: "lease_id",
            problem: format!(
                "names {}, which holds a working set: nothing is published there",
                terms.id
            ),
        });
    }
    let (namespace, region) = (terms.namespace, terms.region);
    let publisher = Asker::publisher(books, lease);
    let mut duplicates = Vec::new();
    let mut fresh = Vec::new();
    for (number, (hash, slot)) in (0..).zip(publish.blocks) {
        let at = Location { lease, slot };
        // Said again.
        if books.index.block(at) == Some(&hash) {
            continue;
        }
        let mut places = books.index.find(namespace, &hash);
        if places.any(|other| publisher.rank(books, other.lease).is_some()) {
            duplicates.push(number);
            continue;
        }
        drop(places);
        books.index.insert(&mut books.journal, hash, at);
        fresh.push(hash);
    }
    let published = fresh.len() as u32;
    offer(books, lease, &fresh);
    books.regions.published_more(region, u64::from(published));
    books.claims.set_blocks(lease, books.index.published(lease));
    books.counters.published_blocks += u64::from(published);
    books.note(Note::Published { blocks: published });
    Ok(Reply::Published { duplicates })
}

/// Whether every block has an empty slot of its own, or lies there already.
fn publishable(books: &Books, lease: LeaseKey, blocks: &[(BlockHash, u32)]) -> Result<(), Refusal> {
    let invalid = |problem| {
        Err(Refusal::Invalid {
            field: "slots",
            problem,
        })
    };
    let most = books.index.slots(lease);
    for (hash, slot) in blocks {
        if *slot >= most {
            return invalid(format!("names slot {slot} of {most}"));
        }
        let at = Location { lease, slot: *slot };
        if books.index.block(at).is_some_and(|held| held != hash) {
            return invalid(format!(
                "names slot {slot}, which holds another block; unpublish it first"
            ));
        }
    }
    let mut named: Vec<_> = blocks.iter().map(|(_, slot)| *slot).collect();
    named.sort_unstable();
    if let Some(twice) = named.windows(2).find(|pair| pair[0] == pair[1]) {
        return invalid(format!("names slot {} twice", twice[0]));
    }
    may_index(books, books.leases.get(lease).terms().lessee, blocks.len())
}

/// Ends estates until so many blocks more of a session may be known.
fn make_room_in_index(books: &mut Books, session: SessionId, more: usize) {
    while may_index(books, session, more).is_err() {
        let full = books.index.blocks() + books.borrowers.kept() + more as u64;
        let its = books.sessions.get(session).map(|its| its.tenant().clone());
        let whose = match &its {
            _ if full > books.config.max_blocks => Whose::Anybody,
            Some(tenant) => Whose::Tenant(user_of(tenant)),
            None => return,
        };
        if !end_coldest(books, whose) {
            return;
        }
    }
}

/// Checks that so many blocks more of a session may be known.
pub(super) fn may_index(books: &Books, session: SessionId, more: usize) -> Result<(), Refusal> {
    let known = books.index.blocks() + books.borrowers.kept();
    let after = |known: u64| known + more as u64;
    let limit = books.config.max_blocks;
    if after(known) > limit {
        return Err(Refusal::Limit {
            what: "indexed blocks",
            limit,
        });
    }
    let limit = books.config.max_blocks_per_user;
    // Nobody has more than all have together: only a full index costs the sum.
    if after(known) > limit && after(known_of_user(books, session)) > limit {
        return Err(Refusal::Limit {
            what: "indexed blocks of one user, or of one process of root",
            limit,
        });
    }
    Ok(())
}

/// The blocks that a session has published and keeps.
fn known_of(books: &Books, id: SessionId) -> u64 {
    let leases = books.sessions.get(id).into_iter();
    let leases = leases.flat_map(|session| session.leases());
    let keys = leases.filter_map(|lease| books.leases.find(*lease));
    let published: u64 = keys
        .map(|(key, _)| u64::from(books.index.published(key)))
        .sum();
    published + books.borrowers.kept_by(id)
}

/// The blocks that the session's user has published and keeps; of root, those of the session's process.
fn known_of_user(books: &Books, session: SessionId) -> u64 {
    let Some(session) = books.sessions.get(session) else {
        return 0;
    };
    let process = session.process();
    if process.uid == 0 {
        let sessions = books.sessions.of_process(process);
        return sessions.into_iter().map(|id| known_of(books, id)).sum();
    }
    let sessions = books.sessions.of_user(process.uid);
    let kept: u64 = sessions.map(|id| books.borrowers.kept_by(id)).sum();
    books.index.blocks_of(user_of(session.tenant())) + kept
}

pub(super) fn unpublish(
    books: &mut Books,
    caller: Caller,
    id: LeaseId,
    generation: Generation,
    slots: &[u32],
) -> Result<Reply, Refusal> {
    let lease = active_lease_of(books, caller, id, generation)?;
    let most = books.index.slots(lease);
    if let Some(slot) = slots.iter().find(|slot| **slot >= most) {
        return Err(Refusal::Invalid {
            field: "slots",
            problem: format!("names slot {slot} of {most}"),
        });
    }
    let mut blocks = 0;
    for slot in slots {
        let at = Location { lease, slot: *slot };
        blocks += u32::from(books.index.remove(&mut books.journal, at));
    }
    let region = books.leases.get(lease).terms().region;
    books.regions.published_less(region, u64::from(blocks));
    books.claims.set_blocks(lease, books.index.published(lease));
    let (pinned, retry_ms) = pinned_among(books, lease, slots);
    books.note(Note::Unpublished { blocks });
    Ok(Reply::Unpublished { pinned, retry_ms })
}

/// Which of these slots must not be written yet, and for how long, milliseconds.
fn pinned_among(books: &Books, lease: LeaseKey, slots: &[u32]) -> (Vec<u32>, u32) {
    let asked: BTreeSet<_> = slots.iter().copied().collect();
    let (mut pinned, mut until) = books.pins.among(lease, &asked);
    // Pins of the broker before this one are unknown, and may all still be read under.
    if books.leases.get(lease).is_restored() && books.now < books.grace_until {
        pinned = asked;
        until = until.max(books.grace_until);
    }
    let left = u32::try_from(until.saturating_sub(books.now)).unwrap_or(u32::MAX);
    (pinned.into_iter().collect(), left)
}
