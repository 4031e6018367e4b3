//! Attendance: sessions are opened, resumed, attached and detached, and end.

use std::collections::BTreeSet;

use swiftcache_proto::domain::{Generation, RevokeReason, SessionId};

use super::{
    account::Place,
    bequest::leave_to_heir,
    books::{Books, keys_of},
    effect::{Effect, Note, Outgoing, Refusal, Reply},
    event::{Caller, Register},
    holding::lasting_holds,
    process::Process,
    record::Record,
    revocation::{lessee_lets_go, let_go},
    withdrawal::withdraw_region,
};

pub(super) fn register(books: &mut Books, register: Register) -> Result<Reply, Refusal> {
    match register.resume {
        Some(session) => resume(books, session, register),
        None => open(books, register),
    }
}

/// Sessions that no process gets if it has all the others.
const KEPT_FROM_ONE_PROCESS: usize = 16;

fn open(books: &mut Books, register: Register) -> Result<Reply, Refusal> {
    let session = register.fresh_id;
    if books.sessions.len() >= books.config.max_sessions {
        return Err(Refusal::Limit {
            what: "sessions",
            limit: books.config.max_sessions as u64,
        });
    }
    let user = register.process.uid;
    let most = books.config.max_sessions_per_user;
    if user != 0 && books.sessions.of_user(user).count() >= most {
        return Err(Refusal::Limit {
            what: "sessions of one user",
            limit: most as u64,
        });
    }
    // Root has no bound of its own: who is root can end the broker anyway. But no process alone takes the last ones.
    let most = books.config.max_sessions;
    let most = most - (most / 16).min(KEPT_FROM_ONE_PROCESS);
    if books.sessions.of_process(register.process).len() >= most {
        return Err(Refusal::Limit {
            what: "sessions of one process",
            limit: most as u64,
        });
    }
    if books.sessions.get(session).is_some() {
        return Err(Refusal::Stale(
            "the session id drawn is in use; register again".to_owned(),
        ));
    }
    books.record(Record::Session {
        session,
        process: register.process,
        name: register.name.clone(),
        tenant: register.tenant.clone(),
    });
    if !books.sessions.knows(register.process) {
        books.out.push(Effect::Watch(register.process));
    }
    books.enrol(session, register.process, &register.name, &register.tenant);
    books.sessions.registered(session, register.connection);
    books.note(Note::Registered {
        session,
        name: register.name,
        resumed: false,
    });
    Ok(Reply::Registered {
        session,
        refused: Vec::new(),
        regions: Vec::new(),
    })
}

fn resume(books: &mut Books, id: SessionId, register: Register) -> Result<Reply, Refusal> {
    let session = books.sessions.of(Caller {
        session: id,
        process: register.process,
        connection: register.connection,
    })?;
    if **session.tenant() != *register.tenant {
        return Err(Refusal::Invalid {
            field: "tenant",
            problem: "is not the one the session was opened with".to_owned(),
        });
    }
    let held: BTreeSet<_> = register.held.into_iter().collect();
    let shared: BTreeSet<_> = register.shared.into_iter().collect();
    let refused = held
        .difference(session.leases())
        .chain(shared.difference(session.reads()))
        .copied()
        .collect::<BTreeSet<_>>();
    let dropped: Vec<_> = session.leases().difference(&held).copied().collect();
    let unread: Vec<_> = session.reads().difference(&shared).copied().collect();
    let regions = session.regions().iter().copied().collect();
    let name = session.name().to_string();
    books.sessions.registered(id, register.connection);
    for lease in unread {
        if let Some(key) = books.leases.key(lease) {
            let_go(books, key, id);
        }
    }
    for lease in dropped {
        if let Some(key) = books.leases.key(lease) {
            lessee_lets_go(books, key, RevokeReason::Released);
        }
    }
    books.note(Note::Registered {
        session: id,
        name,
        resumed: true,
    });
    Ok(Reply::Registered {
        session: id,
        refused: refused.into_iter().collect(),
        regions,
    })
}

/// Replies, and then says again what the session may have missed.
pub(super) fn attach(books: &mut Books, caller: Caller) -> Result<(), Refusal> {
    books.sessions.of(caller)?;
    books.out.push(Effect::Reply(Reply::Done));
    let id = caller.session;
    books.sessions.set_attached(id, true);
    for message in outstanding(books, id) {
        books.send(id, message);
    }
    Ok(())
}

fn outstanding(books: &Books, id: SessionId) -> Vec<Outgoing> {
    let Some(session) = books.sessions.get(id) else {
        return Vec::new();
    };
    let returned = session.returned().iter().map(|id| Outgoing::Returned(*id));
    let held = session.leases().iter().chain(session.reads());
    let revoked = held.filter_map(|id| {
        let (_, lease) = books.leases.find(*id)?;
        lease.revocation().map(|revocation| Outgoing::Revoke {
            lease: *id,
            generation: lease.terms().generation,
            reason: revocation.reason,
            drain_ms: revocation.left_ms(books.now),
        })
    });
    let scrubs = keys_of(books, session.regions())
        .into_iter()
        .flat_map(|key| {
            let region = books.regions.get(key);
            // Regions are many and scrubs few: the account says whether there is anything to look for.
            let scrubbing =
                (region.account().scrubbing > 0).then(|| region.in_place(Place::Scrubbing));
            scrubbing.into_iter().flatten().map(|number| {
                let slab = region.slab(number);
                Outgoing::Scrub {
                    region: region.id(),
                    slab: number,
                    generation: Generation(slab.map_or(0, |slab| slab.generation())),
                }
            })
        });
    let unmappable = keys_of(books, session.regions()).into_iter();
    let unmappable = unmappable.filter_map(|key| {
        let sessions = books.unmappable.sessions(key);
        let region = books.regions.get(key).id();
        (sessions > 0).then_some(Outgoing::CannotMap { region, sessions })
    });
    let holds = lasting_holds(books).into_iter();
    let owed = returned.chain(revoked).chain(scrubs).chain(unmappable);
    holds.chain(owed).collect()
}

pub(super) fn detach(books: &mut Books, id: SessionId) {
    books.sessions.set_attached(id, false);
}

pub(super) fn leave(books: &mut Books, caller: Caller) -> Result<Reply, Refusal> {
    books.sessions.of(caller)?;
    let id = caller.session;
    drop_holdings(books, id, Departure::Leaves);
    close(books, id, RevokeReason::Withdrawn);
    books.note(Note::Left { session: id });
    if !books.sessions.knows(caller.process) {
        books.out.push(Effect::Unwatch(caller.process));
    }
    books.sessions.bury(id);
    Ok(Reply::Done)
}

/// The process can touch nothing any more: all its sessions are over.
pub(super) fn process_gone(books: &mut Books, process: Process) {
    let sessions = books.sessions.of_process(process);
    for id in &sessions {
        detach(books, *id);
    }
    // What one of its sessions lent another is free before its regions are looked at.
    for id in &sessions {
        drop_holdings(books, *id, Departure::Gone);
    }
    for id in sessions {
        let session = books.sessions.get(id);
        let name = session.map_or_else(String::new, |session| session.name().to_string());
        close(books, id, RevokeReason::DonorGone);
        books.note(Note::Gone { session: id, name });
        books.sessions.bury(id);
    }
}

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Departure {
    /// It says so.
    Leaves,
    /// Its process can touch nothing any more.
    Gone,
}

/// Lets go of everything the session holds of others, and of what it told of itself. What a process that is gone has published is
/// left to its heir.
fn drop_holdings(books: &mut Books, id: SessionId, departure: Departure) {
    books.claims.stop_waiting(id);
    books.pins.end_all_of(id);
    books.borrowers.close_all_of(id);
    books.disks.close(id);
    books.unmappable.forget_session(id);
    let Some(session) = books.sessions.get(id) else {
        return;
    };
    let (leases, reads) = (session.leases().clone(), session.reads().clone());
    for lease in reads {
        if let Some(key) = books.leases.key(lease) {
            let_go(books, key, id);
        }
    }
    for lease in leases {
        let Some(key) = books.leases.key(lease) else {
            continue;
        };
        match departure {
            Departure::Leaves => lessee_lets_go(books, key, RevokeReason::Released),
            Departure::Gone if leave_to_heir(books, key) => {}
            Departure::Gone => lessee_lets_go(books, key, RevokeReason::LesseeGone),
        }
    }
}

/// Withdraws the session's regions and ends it.
fn close(books: &mut Books, id: SessionId, reason: RevokeReason) {
    let session = books.sessions.get(id);
    let regions = keys_of(books, session.into_iter().flat_map(|its| its.regions()));
    for region in regions {
        let drain_ms = books.config.default_drain_ms;
        withdraw_region(books, region, reason, drain_ms);
    }
    books.record(Record::SessionOver { session: id });
    books.end_session(id);
}
