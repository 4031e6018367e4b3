//! Revocation: asking everyone to let go of a slab, and what follows when they have, or have not.

use swiftcache_proto::domain::{Generation, LeaseId, RevokeReason, SessionId};

use super::{
    arena::LeaseKey,
    books::Books,
    effect::{Note, Outgoing, Refusal},
    event::Caller,
    leases::Phase,
    record::Record,
    returning::return_region,
};

pub(super) fn acknowledge(
    books: &mut Books,
    caller: Caller,
    id: LeaseId,
    generation: Generation,
) -> Result<(), Refusal> {
    books.sessions.of(caller)?;
    let Some((key, lease)) = books.leases.find(id) else {
        return Ok(());
    };
    let stale = lease.terms().generation != generation || lease.is_active();
    if stale || !lease.parties().any(|party| party == caller.session) {
        return Ok(());
    }
    books.counters.acknowledgements += 1;
    let_go(books, key, caller.session);
    Ok(())
}

/// Starts a revocation: its blocks cannot be found from here on, and everyone who may touch the slab but
/// `untold` is asked to let go. Returns whether it was not being revoked before; if it was, a shorter window
/// counts from now on.
pub(super) fn revoke(
    books: &mut Books,
    key: LeaseKey,
    reason: RevokeReason,
    drain_ms: u32,
    untold: Option<SessionId>,
) -> bool {
    let deadline = books.now.saturating_add(drain_ms.into());
    match books.leases.get(key).phase() {
        Phase::Zombie(_) => return false,
        Phase::Draining(_) => {
            books.leases.close_by(key, deadline);
            return false;
        }
        Phase::Active => {}
    }
    books.begin_revocation(key, reason, deadline);
    let lease = books.leases.get(key);
    let (id, bytes) = (lease.terms().id, lease.terms().bytes);
    let generation = lease.terms().generation;
    let parties: Vec<_> = lease.parties().collect();
    books.counters.revocations += 1;
    // Of a lease that nobody holds, one record says that it is over.
    if !parties.is_empty() {
        books.record(Record::Revoked { lease: id, reason });
    }
    books.note(Note::Revoked {
        lease: id,
        reason,
        bytes,
    });
    let over = parties.is_empty();
    for party in parties {
        if Some(party) != untold {
            let message = Outgoing::Revoke {
                lease: id,
                generation,
                reason,
                drain_ms,
            };
            books.send(party, message);
        }
    }
    if over {
        forget_estate(books, key);
    }
    true
}

/// A lease that was kept for an heir is over: nobody touches its slab.
fn forget_estate(books: &mut Books, key: LeaseKey) {
    let terms = books.leases.get(key).terms();
    let (lease, session) = (terms.id, terms.lessee);
    books.record(Record::LetGo { lease, session });
    end_lease(books, key);
}

/// The lessee lets go; readers, if any, are asked to do the same.
pub(super) fn lessee_lets_go(books: &mut Books, key: LeaseKey, reason: RevokeReason) {
    let lease = books.leases.get(key);
    let lessee = lease.terms().lessee;
    if lease.is_active() && !lease.readers().is_empty() {
        let drain_ms = books.config.default_drain_ms;
        revoke(books, key, reason, drain_ms, Some(lessee));
    }
    let_go(books, key, lessee);
}

/// A lessee or reader can touch the slab no more. Once nobody can, the lease is over.
pub(super) fn let_go(books: &mut Books, key: LeaseKey, session: SessionId) {
    if !books.drop_party(key, session) {
        return;
    }
    let lease = books.leases.get(key).terms().id;
    books.record(Record::LetGo { lease, session });
    let its = books.leases.get(key);
    if its.parties().next().is_some() || its.estate().is_some() {
        return;
    }
    end_lease(books, key);
}

fn end_lease(books: &mut Books, key: LeaseKey) {
    let lease = books.leases.get(key);
    let revocation = lease.revocation();
    let after_ms = revocation.map(|revocation| books.now.saturating_sub(revocation.since));
    let (id, region) = (lease.terms().id, lease.terms().region);
    books.free_slab(key);
    books.note(Note::LeaseEnded {
        lease: id,
        after_ms,
    });
    let its = books.regions.get(region);
    if its.is_withdrawing() && its.leases() == 0 {
        return_region(books, region);
    }
}

/// Leases whose drain window has closed become zombies: still held, and never counted as free.
pub(super) fn close_drain_windows(books: &mut Books) {
    while let Some(key) = books.next_zombie() {
        books.counters.zombies += 1;
        let terms = books.leases.get(key).terms();
        let (lease, bytes) = (terms.id, terms.bytes);
        let pids = books.pids_of(key);
        books.note(Note::Zombie { lease, bytes, pids });
    }
}
