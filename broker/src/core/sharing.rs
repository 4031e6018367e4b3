//! Sharing: other sessions open a lease for reading; and leases and shares are given back.

use swiftcache_proto::domain::{DeviceUuid, LeaseId, LinkKind, RevokeReason, SessionId};

use super::{
    arena::{LeaseKey, RegionKey},
    bequest::leave_to_heir,
    books::Books,
    effect::{Grant, Note, Outgoing, Refusal, Reply},
    event::Caller,
    leases::Lease,
    record::Record,
    revocation::{lessee_lets_go, let_go},
};

/// Why a session cannot read another's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Its region has no handle since the broker restarted.
    NoHandle,
    /// It has as many readers as it may have.
    Readers,
    /// The session reads as many leases as it may read.
    Reads,
}

/// Whether another session may read a lease that is not being revoked.
pub(super) fn may_read(books: &Books, session: SessionId, lease: &Lease) -> Result<(), Unreadable> {
    let region = books.regions.get(lease.terms().region);
    if region.handle().is_none() {
        return Err(Unreadable::NoHandle);
    }
    if lease.readers().contains(&session) {
        return Ok(());
    }
    if lease.readers().len() >= books.config.max_readers {
        return Err(Unreadable::Readers);
    }
    let reads = books
        .sessions
        .get(session)
        .map_or(0, |its| its.reads().len());
    match reads >= books.config.max_leases_per_session {
        true => Err(Unreadable::Reads),
        false => Ok(()),
    }
}

/// The lease as its lessee or a reader on another device sees it; `None` while its region has no handle.
pub(super) fn grant_of(books: &Books, key: LeaseKey, link: LinkKind) -> Option<Grant> {
    let terms = books.leases.get(key).terms();
    let region = books.regions.get(terms.region);
    let outline = region.outline();
    Some(Grant {
        lease: terms.id,
        generation: terms.generation,
        region: outline.id,
        slab: terms.slab,
        slab_bytes: outline.slab_bytes,
        allocation: outline.allocation,
        offset: outline.offset + u64::from(terms.slab) * outline.slab_bytes,
        device: books.devices.uuid(outline.device).clone(),
        handle: region.handle()?.clone(),
        link,
        slots: books.index.slots(key),
        block_bytes: terms.block_bytes,
        map_bytes: outline.offset + outline.bytes,
    })
}

pub(super) fn share(
    books: &mut Books,
    caller: Caller,
    id: LeaseId,
    device: &DeviceUuid,
) -> Result<Reply, Refusal> {
    let session = books.sessions.of(caller)?;
    books.check_silence(caller.session)?;
    let (key, lease) = books.leases.known(id)?;
    let terms = lease.terms();
    if session.tenant() != books.index.namespace(terms.namespace).tenant() {
        return Err(Refusal::NotYours {
            what: "lease",
            which: id.to_string(),
        });
    }
    if terms.lessee == caller.session {
        return Err(Refusal::Invalid {
            field: "lease_id",
            problem: format!("{id} is this session's own lease"),
        });
    }
    let device = books.devices.number(device)?;
    let owner = books.regions.get(terms.region).device();
    let Some(path) = books.devices.path(device, owner) else {
        return Err(Refusal::Invalid {
            field: "device_uuid",
            problem: format!("has no peer access to {}", books.devices.uuid(owner)),
        });
    };
    if let Some(revocation) = lease.revocation() {
        let reason = revocation.reason;
        return Err(Refusal::Stale(format!(
            "lease {id} is being revoked: {reason}"
        )));
    }
    let limit = |what, limit: usize| {
        Err(Refusal::Limit {
            what,
            limit: limit as u64,
        })
    };
    let not_now = || {
        Refusal::Stale(format!(
            "lease {id} cannot be opened until its donor has offered the region again"
        ))
    };
    let config = &books.config;
    match may_read(books, caller.session, lease) {
        Ok(()) => {}
        Err(Unreadable::NoHandle) => return Err(not_now()),
        Err(Unreadable::Readers) => return limit("readers of one lease", config.max_readers),
        Err(Unreadable::Reads) => {
            return limit("leases read by one session", config.max_leases_per_session);
        }
    }
    let grant = grant_of(books, key, path.kind).ok_or_else(not_now)?;
    if lease.readers().contains(&caller.session) {
        return Ok(Reply::Shared(grant));
    }
    books.record(Record::Share {
        lease: id,
        reader: caller.session,
    });
    books.add_reader(key, caller.session);
    Ok(Reply::Shared(grant))
}

/// A session cannot map a region: its donor's owner is told, and operators.
fn cannot_map(books: &mut Books, session: SessionId, key: RegionKey) {
    let region = books.regions.get(key);
    let (id, donor, device) = (region.id(), region.donor(), region.device());
    if !books.unmappable.add(session, key, device) {
        return;
    }
    let name_of = |id| {
        let session = books.sessions.get(id);
        session.map_or_else(String::new, |session| session.name().to_string())
    };
    let note = Note::CannotMap {
        region: id,
        device: books.devices.uuid(device).clone(),
        session,
        name: name_of(session),
        donor: name_of(donor),
    };
    books.note(note);
    let sessions = books.unmappable.sessions(key);
    let message = Outgoing::CannotMap {
        region: id,
        sessions,
    };
    books.send(donor, message);
}

/// As what a lease is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Giving {
    Back,
    /// What is published there may be kept for an heir.
    ToHeir,
    /// The session cannot map it.
    Unmappable,
}

impl Giving {
    pub(super) fn of(unmappable: bool, bequeath: bool) -> Self {
        match (unmappable, bequeath) {
            (true, _) => Self::Unmappable,
            (false, true) => Self::ToHeir,
            (false, false) => Self::Back,
        }
    }
}

/// The lessee gives leases back, or a reader its shares; perhaps because it cannot map them. Leases that are over
/// already are skipped.
pub(super) fn release(
    books: &mut Books,
    caller: Caller,
    ids: &[LeaseId],
    giving: Giving,
) -> Result<Reply, Refusal> {
    books.sessions.of(caller)?;
    for id in ids {
        let Some((_, lease)) = books.leases.find(*id) else {
            continue;
        };
        if lease.terms().lessee != caller.session && !lease.readers().contains(&caller.session) {
            return Err(Refusal::NotYours {
                what: "lease",
                which: id.to_string(),
            });
        }
    }
    for id in ids {
        let Some((key, lease)) = books.leases.find(*id) else {
            continue;
        };
        let (lessee, region) = (lease.terms().lessee, lease.terms().region);
        if giving == Giving::Unmappable {
            cannot_map(books, caller.session, region);
        }
        if lessee != caller.session {
            let_go(books, key, caller.session);
        } else if giving != Giving::ToHeir || !leave_to_heir(books, key) {
            lessee_lets_go(books, key, RevokeReason::Released);
        }
    }
    Ok(Reply::Done)
}
