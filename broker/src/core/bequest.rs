//! Bequests: what a borrower that is gone has published is kept for its heir, and is an estate from then on.
//!
//! Only published blocks count: the copies that wrote them had completed, and whoever wants to write over one has the broker
//! forget it first. So whatever its lessee was doing when it died, the bytes of a block that can be found are its own.

use swiftcache_proto::domain::RevokeReason;

use super::{
    arena::LeaseKey, books::Books, effect::Note, quotas::is_of, records::estate_record,
    revocation::revoke,
};

/// Keeps a lease for an heir whose lessee can touch it no more. False when there is nothing to keep: then it is the caller's to end.
pub(super) fn leave_to_heir(books: &mut Books, key: LeaseKey) -> bool {
    let lease = books.leases.get(key);
    let blocks = books.index.published(key);
    let keeps = lease.is_active()
        && lease.lessee_holds()
        && lease.terms().class.is_cache()
        && blocks > 0
        && books.config.estate_ttl_ms > 0;
    if !keeps {
        return false;
    }
    let terms = lease.terms();
    let namespace = books.index.namespace(terms.namespace);
    let note = Note::LeftEstate {
        lease: terms.id,
        tenant: namespace.tenant().to_string(),
        namespace: namespace.name().to_string(),
        bytes: terms.bytes,
        blocks,
    };
    books.record(estate_record(books, key));
    let until = books.now.saturating_add(books.config.estate_ttl_ms.into());
    books.keep_for_heir(key, until);
    books.counters.estate_leases += 1;
    books.note(note);
    true
}

/// Gives up a lease that is kept for an heir, now or when its readers have let go. Says how many blocks were in it.
pub(super) fn end_estate(books: &mut Books, key: LeaseKey) -> u64 {
    let blocks = books.index.published(key);
    let drain_ms = books.config.default_drain_ms;
    revoke(books, key, RevokeReason::LesseeGone, drain_ms, None);
    blocks.into()
}

/// Which estates may go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Whose<'a> {
    Anybody,
    /// All tenants of this user, or one tenant.
    Tenant(&'a str),
    /// This tenant's namespace.
    Namespace(&'a str, &'a str),
}

/// Ends the estate that was found longest ago, of those that nobody reads. False when there is none.
pub(super) fn end_coldest(books: &mut Books, whose: Whose<'_>) -> bool {
    let able = books.leases.estates().filter(|(_, lease)| {
        let namespace = books.index.namespace(lease.terms().namespace);
        let fits = match whose {
            Whose::Anybody => true,
            Whose::Tenant(tenant) => is_of(namespace.tenant(), tenant),
            Whose::Namespace(tenant, name) => {
                &**namespace.tenant() == tenant && &**namespace.name() == name
            }
        };
        fits && lease.readers().is_empty()
    });
    let coldest = able.min_by_key(|(_, lease)| (lease.last_hit(), lease.terms().id));
    let Some((key, _)) = coldest else {
        return false;
    };
    end_estate(books, key);
    true
}
