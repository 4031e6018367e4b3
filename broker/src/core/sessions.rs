//! Sessions: opening, resuming, attaching, and ending them.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use swiftcache_proto::domain::{Generation, LeaseId, PinId, RegionId, RevokeReason, SessionId};

use super::{
    Caller, Effect, Note, Outgoing, Process, Record, Refusal, Register, Reply, account::Place,
    state::State,
};

#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) process: Process,
    pub(super) name: String,
    pub(super) tenant: Arc<str>,
    /// Its stream is up.
    pub(super) attached: bool,
    /// It left or its process is gone; remembered only until its last region is returned.
    pub(super) over: bool,
    /// When it was opened, milliseconds.
    pub(super) since: u64,
    /// The regions it donates.
    pub(super) regions: BTreeSet<RegionId>,
    /// The leases it holds as lessee, revoked ones it has not let go of included.
    pub(super) leases: BTreeSet<LeaseId>,
    /// The leases it reads.
    pub(super) reads: BTreeSet<LeaseId>,
    /// The regions that it said it cannot map.
    pub(super) unmappable: BTreeSet<RegionId>,
    pub(super) pins: BTreeSet<PinId>,
    pub(super) pinned_extents: usize,
    pub(super) donated_bytes: u64,
    /// Bytes of `leases`.
    pub(super) held_bytes: u64,
    /// Bytes of those of `leases` that are not revoked.
    pub(super) active_bytes: u64,
    /// The last regions it got back, told again when it attaches.
    pub(super) returned: VecDeque<RegionId>,
}

impl Session {
    pub(super) fn new(process: Process, name: String, tenant: Arc<str>, since: u64) -> Self {
        Self {
            process,
            name,
            tenant,
            attached: false,
            over: false,
            since,
            regions: BTreeSet::new(),
            leases: BTreeSet::new(),
            reads: BTreeSet::new(),
            unmappable: BTreeSet::new(),
            pins: BTreeSet::new(),
            pinned_extents: 0,
            donated_bytes: 0,
            held_bytes: 0,
            active_bytes: 0,
            returned: VecDeque::new(),
        }
    }
}

impl State {
    /// The caller's session, if it is its process that speaks.
    pub(super) fn session_of(&self, caller: Caller) -> Result<&Session, Refusal> {
        let which = || caller.session.label();
        match self.sessions.get(&caller.session) {
            Some(session) if session.over => Err(Refusal::Unknown {
                what: "session",
                which: which(),
            }),
            None => Err(Refusal::Unknown {
                what: "session",
                which: which(),
            }),
            Some(session) if session.process != caller.process => Err(Refusal::NotYours {
                what: "session",
                which: which(),
            }),
            Some(session) => Ok(session),
        }
    }

    /// Sends on a session's stream, if it is up; what is outstanding is sent again when it attaches.
    pub(super) fn send(&mut self, session: SessionId, outgoing: Outgoing) {
        if self.sessions.get(&session).is_some_and(|to| to.attached) {
            self.out.push(Effect::Send(session, outgoing));
        }
    }

    pub(super) fn register(&mut self, register: Register) -> Result<Reply, Refusal> {
        match register.resume {
            Some(session) => self.resume(session, register),
            None => self.open(register),
        }
    }

    fn open(&mut self, register: Register) -> Result<Reply, Refusal> {
        let session = register.fresh_id;
        if self.sessions.len() >= self.config.max_sessions {
            return Err(Refusal::Limit {
                what: "sessions",
                limit: self.config.max_sessions as u64,
            });
        }
        if self.sessions.contains_key(&session) {
            return Err(Refusal::Stale(
                "the session id drawn is in use; register again".to_owned(),
            ));
        }
        self.out.push(Effect::Record(Record::Session {
            session,
            process: register.process,
            name: register.name.clone(),
            tenant: register.tenant.clone(),
        }));
        if !self.processes.contains_key(&register.process) {
            self.out.push(Effect::Watch(register.process));
        }
        self.note(Note::Registered {
            session,
            name: register.name.clone(),
            resumed: false,
        });
        self.enrol(
            session,
            register.process,
            register.name,
            register.tenant.into(),
        );
        Ok(Reply::Registered {
            session,
            refused: Vec::new(),
            regions: Vec::new(),
        })
    }

    pub(super) fn enrol(
        &mut self,
        id: SessionId,
        process: Process,
        name: String,
        tenant: Arc<str>,
    ) {
        let session = Session::new(process, name, tenant, self.now);
        self.sessions.insert(id, session);
        self.processes.entry(process).or_default().insert(id);
    }

    fn resume(&mut self, id: SessionId, register: Register) -> Result<Reply, Refusal> {
        let session = self.session_of(Caller {
            session: id,
            process: register.process,
        })?;
        if *session.tenant != *register.tenant {
            return Err(Refusal::Invalid {
                field: "tenant",
                problem: "is not the one the session was opened with".to_owned(),
            });
        }
        let held: BTreeSet<_> = register.held.into_iter().collect();
        let shared: BTreeSet<_> = register.shared.into_iter().collect();
        let refused = held
            .difference(&session.leases)
            .chain(shared.difference(&session.reads))
            .copied()
            .collect::<BTreeSet<_>>();
        let dropped: Vec<_> = session.leases.difference(&held).copied().collect();
        let unread: Vec<_> = session.reads.difference(&shared).copied().collect();
        let regions = session.regions.iter().copied().collect();
        let name = session.name.clone();
        for lease in unread {
            self.let_go(self.lease_ids[&lease], id);
        }
        for lease in dropped {
            self.lessee_lets_go(self.lease_ids[&lease], RevokeReason::Released);
        }
        self.note(Note::Registered {
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
    pub(super) fn attach(&mut self, caller: Caller) -> Result<(), Refusal> {
        self.session_of(caller)?;
        self.out.push(Effect::Reply(Reply::Done));
        let id = caller.session;
        if let Some(session) = self.sessions.get_mut(&id) {
            session.attached = true;
        }
        for message in self.outstanding(id) {
            self.send(id, message);
        }
        Ok(())
    }

    fn outstanding(&self, id: SessionId) -> Vec<Outgoing> {
        let session = &self.sessions[&id];
        let returned = session.returned.iter().map(|id| Outgoing::Returned(*id));
        let revoked = session
            .leases
            .iter()
            .chain(&session.reads)
            .filter_map(|id| {
                let lease = &self.leases[self.lease_ids[id]];
                lease.revocation().map(|revocation| Outgoing::Revoke {
                    lease: lease.id,
                    generation: Generation(lease.generation),
                    reason: revocation.reason,
                    drain_ms: revocation.left_ms(self.now),
                })
            });
        let scrubs = session.regions.iter().flat_map(|id| {
            let region = &self.regions[self.region_ids[id]];
            // Regions are many and scrubs few: the account says whether there is anything to look for.
            let scrubbing =
                (region.account.scrubbing > 0).then(|| region.in_place(Place::Scrubbing));
            scrubbing.into_iter().flatten().map(|slab| Outgoing::Scrub {
                region: region.id,
                slab,
                generation: Generation(region.slabs[slab as usize].generation),
            })
        });
        (self
            .lasting_holds()
            .chain(returned)
            .chain(revoked)
            .chain(scrubs))
        .collect()
    }

    pub(super) fn detach(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.attached = false;
        }
    }

    pub(super) fn leave(&mut self, caller: Caller) -> Result<Reply, Refusal> {
        self.session_of(caller)?;
        let id = caller.session;
        self.drop_holdings(id, RevokeReason::Released);
        self.close(id, RevokeReason::Withdrawn);
        self.note(Note::Left { session: id });
        if !self.processes.contains_key(&caller.process) {
            self.out.push(Effect::Unwatch(caller.process));
        }
        self.bury(id);
        Ok(Reply::Done)
    }

    /// The process can touch nothing any more: all its sessions are over.
    pub(super) fn process_gone(&mut self, process: Process) {
        let sessions = self.processes.get(&process).cloned().unwrap_or_default();
        for id in &sessions {
            self.detach(*id);
        }
        // What one of its sessions lent another is free before its regions are looked at.
        for id in &sessions {
            self.drop_holdings(*id, RevokeReason::LesseeGone);
        }
        for id in sessions {
            let name = self.sessions[&id].name.clone();
            self.close(id, RevokeReason::DonorGone);
            self.note(Note::Gone { session: id, name });
            self.bury(id);
        }
    }

    /// Lets go of everything the session holds of others.
    fn drop_holdings(&mut self, id: SessionId, reason: RevokeReason) {
        self.waits.remove(&id);
        self.drop_pins_of(id);
        self.close_borrowers_of(id);
        self.forget_unmappable(id);
        let session = &self.sessions[&id];
        let (leases, reads) = (session.leases.clone(), session.reads.clone());
        for lease in reads {
            self.let_go(self.lease_ids[&lease], id);
        }
        for lease in leases {
            self.lessee_lets_go(self.lease_ids[&lease], reason);
        }
    }

    /// Withdraws the session's regions and ends it.
    fn close(&mut self, id: SessionId, reason: RevokeReason) {
        for region in self.sessions[&id].regions.clone() {
            let drain_ms = self.config.default_drain_ms;
            self.withdraw_region(self.region_ids[&region], reason, drain_ms);
        }
        self.out
            .push(Effect::Record(Record::SessionOver { session: id }));
        self.end_session(id);
    }

    /// Marks a session over; it stays known until [`State::bury`] finds nothing of it left.
    pub(super) fn end_session(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.over = true;
        let process = session.process;
        if let Some(sessions) = self.processes.get_mut(&process) {
            sessions.remove(&id);
            if sessions.is_empty() {
                self.processes.remove(&process);
            }
        }
        let label = id.label();
        if self.drained_donors.contains(&label) && self.donors_labelled(&label).next().is_none() {
            self.drained_donors.remove(&label);
        }
    }

    /// The sessions with this label that are not over.
    pub(super) fn donors_labelled(&self, label: &str) -> impl Iterator<Item = SessionId> {
        self.sessions
            .iter()
            .filter(move |(id, session)| !session.over && id.label() == label)
            .map(|(id, _)| *id)
    }

    /// Forgets a session that is over and whose regions are all returned.
    pub(super) fn bury(&mut self, id: SessionId) {
        let done = |session: &Session| session.over && session.regions.is_empty();
        if self.sessions.get(&id).is_some_and(done) {
            self.sessions.remove(&id);
        }
    }
}
