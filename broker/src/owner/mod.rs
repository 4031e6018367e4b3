//! The single owner of [`State`]. Every event goes through [`Owner::apply`], which carries out the effects in order
//! under one lock. The lock is never held across an await. It is held for microseconds, because the core only computes,
//! an append to the ledger is a write to the page cache, and nobody waits for a stream.

mod attach;
mod reports;

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::{domain::SessionId, v1};
use tokio::sync::mpsc;

use crate::{
    core::{Caller, Effect, Event, Note, Now, Outgoing, Process, Record, Register, Reply, State},
    death::DeathWatch,
    descriptors::Descriptors,
    error::Refused,
    events::{EventLog, Wanted, describe, detail, unix_ms},
    ledger::Ledger,
    metrics::Metrics,
    peer::Peer,
    streams::{Streams, wire},
};

pub(crate) use attach::Attached;
pub(crate) use reports::{Reported, Reports};

/// The owner of the broker's state.
pub struct Owner {
    inner: Mutex<Inner>,
    descriptors: Descriptors,
    metrics: Arc<Metrics>,
    started: Instant,
    started_unix_ms: u64,
    boot_id: u64,
}

struct Inner {
    state: State,
    ledger: Ledger,
    streams: Streams,
    deaths: DeathWatch,
    events: EventLog,
    reports: Reports,
    /// Sessions that must attach again once the ledger is whole. A message was withheld from them, because they must
    /// not act on it before it is recorded.
    withheld: HashSet<SessionId>,
    closing: bool,
}

/// The parts of an owner.
pub struct Parts {
    /// The core, restored from the ledger.
    pub state: State,
    /// The ledger.
    pub ledger: Ledger,
    /// The channel that receives processes that have died.
    pub deaths: mpsc::UnboundedSender<Process>,
    /// The most descriptors that are kept for donors.
    pub max_descriptors: usize,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Owner {
    /// An owner of the state. Draws the broker's boot id.
    pub fn new(parts: Parts) -> Self {
        Self {
            inner: Mutex::new(Inner {
                state: parts.state,
                ledger: parts.ledger,
                streams: Streams::default(),
                deaths: DeathWatch::new(parts.deaths),
                events: EventLog::default(),
                reports: Reports::default(),
                withheld: HashSet::new(),
                closing: false,
            }),
            descriptors: Descriptors::new(parts.max_descriptors),
            metrics: parts.metrics,
            started: Instant::now(),
            started_unix_ms: unix_ms(),
            boot_id: rand::random(),
        }
    }

    /// The boot id, which was drawn at random when the broker started.
    pub fn boot_id(&self) -> u64 {
        self.boot_id
    }

    /// The time since the broker started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// The time at which the core's clock was 0, in milliseconds since 1970.
    pub fn started_unix_ms(&self) -> u64 {
        self.started_unix_ms
    }

    /// The present time on the core's clock.
    pub fn now(&self) -> Now {
        Now(u64::try_from(self.uptime().as_millis()).unwrap_or(u64::MAX))
    }

    /// The descriptors of donors.
    pub fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Watches every process that the restored state names. Called once, before the sockets open. When a process has
    /// died already, its death arrives on the channel like any other.
    pub fn watch_restored(&self) {
        let mut inner = self.inner.lock();
        let processes: Vec<Process> = inner.state.processes().collect();
        for process in processes {
            inner.deaths.watch_known(process);
        }
    }

    /// Applies an event and returns the answer to its caller. When this returns, the ledger has everything that the
    /// answer depends on.
    ///
    /// # Errors
    /// When the core refuses, or when a grant could not be recorded and was taken back.
    pub fn apply(&self, event: Event) -> Result<Reply, Refused> {
        let mut inner = self.inner.lock();
        let caller = match &event {
            Event::Lease(demand) => Some(demand.caller),
            Event::Share { caller, .. } => Some(*caller),
            _ => None,
        };
        let Some(caller) = caller else {
            return answer(inner.apply(self, event).0);
        };
        // The event may be answered with a grant, which must be recorded before it leaves.
        if inner.ledger.behind().is_some() && !inner.rewrite(self) {
            return Err(inner.unrecorded());
        }
        let (reply, recorded) = inner.apply(self, event);
        if !recorded {
            inner.take_back(self, caller, reply);
            return Err(inner.unrecorded());
        }
        answer(reply)
    }

    /// Opens or resumes a session for the peer's process.
    ///
    /// # Errors
    /// When the core refuses, or when the process's death cannot be watched.
    pub fn register(&self, peer: &Peer, register: Register) -> Result<Reply, Refused> {
        let mut inner = self.inner.lock();
        if inner.closing {
            return Err(Refused::ShuttingDown);
        }
        // A process that cannot be watched gets no session, so the watch comes first.
        inner.deaths.watch_peer(peer).map_err(|error| {
            Refused::Unwatchable(format!(
                "process {}: its death cannot be watched: {error}",
                peer.process.pid
            ))
        })?;
        let (reply, _) = inner.apply(self, Event::Register(register));
        if !inner.state.processes().any(|known| known == peer.process) {
            inner.deaths.unwatch(peer.process);
        }
        answer(reply)
    }

    /// Tells the core that time has passed.
    pub fn tick(&self) {
        self.descriptors.expire(Instant::now());
        let mut inner = self.inner.lock();
        inner.apply(self, Event::Tick);
        if inner.ledger.wants_rewrite() {
            inner.rewrite(self);
        }
    }

    /// Tells the core that a process has died.
    pub fn process_gone(&self, process: Process) {
        let mut inner = self.inner.lock();
        inner.apply(self, Event::ProcessGone(process));
        inner.deaths.unwatch(process);
    }

    /// Whether the session belongs to this process.
    pub fn is_session_of(&self, session: SessionId, process: Process) -> bool {
        self.read(|state| {
            state
                .session(session)
                .is_some_and(|view| view.process == process)
        })
    }

    /// Calls `look` with the state.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.inner.lock().state)
    }

    /// The newest of the wanted events. The oldest of them comes first.
    pub fn events(&self, wanted: &Wanted) -> Vec<v1::EventRecord> {
        self.inner.lock().events.list(wanted)
    }

    /// The number of attached streams, and the number of watched processes.
    pub fn connections(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        (inner.streams.count(), inner.deaths.count())
    }

    /// Ends all streams, and lets no new one begin, because the broker is shutting down.
    pub fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closing = true;
        inner.streams.close_all();
    }
}

fn answer(reply: Option<Reply>) -> Result<Reply, Refused> {
    match reply {
        Some(Reply::Refused(refusal)) => Err(refusal.into()),
        Some(reply) => Ok(reply),
        None => Ok(Reply::Done),
    }
}

impl Inner {
    /// Applies an event. Returns the reply, and whether all records are in the ledger.
    fn apply(&mut self, owner: &Owner, event: Event) -> (Option<Reply>, bool) {
        let effects = self.state.apply(event, owner.now());
        self.carry_out(owner, effects, &mut |_, message| Some(message))
    }

    /// Carries out effects in order, but records first, so that no message leaves before its facts are recorded.
    /// `divert` may keep a message from the session's queue.
    fn carry_out(
        &mut self,
        owner: &Owner,
        effects: Vec<Effect>,
        divert: &mut dyn FnMut(SessionId, v1::SessionResponse) -> Option<v1::SessionResponse>,
    ) -> (Option<Reply>, bool) {
        let records: Vec<Record> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Record(record) => Some(record.clone()),
                _ => None,
            })
            .collect();
        let recorded = records.is_empty() || self.ledger.append(&records);
        let mut reply = None;
        let mut fallen = Vec::new();
        for effect in effects {
            match effect {
                Effect::Reply(given) => reply = Some(given),
                Effect::Record(_) => {}
                // Without a record of this scrub, a restarted broker could lend the slab while it is being zeroed.
                Effect::Send(session, Outgoing::Scrub { .. }) if self.ledger.behind().is_some() => {
                    self.withheld.insert(session);
                }
                Effect::Send(session, outgoing) => {
                    if let Some(message) = divert(session, wire(outgoing))
                        && !self.streams.send(session, message)
                    {
                        tracing::warn!(
                            ?session,
                            "a stream that its client reads too slowly was closed; the client gets the outstanding \
                             messages when it attaches again"
                        );
                        fallen.push(session);
                    }
                }
                Effect::Watch(process) => self.deaths.watch_known(process),
                Effect::Unwatch(process) => self.deaths.unwatch(process),
                Effect::DropHandle(allocation) => owner.descriptors.discard(allocation),
                Effect::Note(note) => self.note(owner, &note),
            }
        }
        for session in fallen {
            self.apply(owner, Event::Detach(session));
        }
        (reply, recorded)
    }

    fn note(&mut self, owner: &Owner, note: &Note) {
        owner.metrics.note(note);
        match note {
            Note::Left { session } | Note::Gone { session, .. } => {
                self.streams.close(*session);
                self.withheld.remove(session);
                self.reports.forget(*session);
                owner.descriptors.forget(*session);
            }
            Note::Refused { refusal } => tracing::debug!(%refusal, "refused"),
            _ => {}
        }
        if let Some((kind, text)) = describe(note) {
            match note {
                Note::Zombie { .. } | Note::Gone { .. } => tracing::warn!(kind, "{text}"),
                _ => tracing::info!(kind, "{text}"),
            }
            self.events.push(kind, text, detail(note));
        }
    }

    /// Rewrites the ledger from the state. Returns whether it is whole. Then it closes the streams from which a message
    /// was withheld, so that their sessions attach again.
    fn rewrite(&mut self, owner: &Owner) -> bool {
        let records = self.state.records();
        let whole = self.ledger.rewrite(&records);
        if whole {
            for session in std::mem::take(&mut self.withheld) {
                if self.streams.close(session) {
                    self.apply(owner, Event::Detach(session));
                }
            }
        }
        whole
    }

    /// Undoes a grant that was not sent.
    fn take_back(&mut self, owner: &Owner, caller: Caller, reply: Option<Reply>) {
        let leases = match reply {
            Some(Reply::Leased { grants, .. }) => grants.iter().map(|grant| grant.lease).collect(),
            Some(Reply::Shared(grant)) => vec![grant.lease],
            _ => return,
        };
        let unmappable = false;
        self.apply(
            owner,
            Event::Release {
                caller,
                leases,
                unmappable,
            },
        );
    }

    fn unrecorded(&self) -> Refused {
        Refused::Unrecorded {
            path: self.ledger.path().to_owned(),
            problem: self
                .ledger
                .behind()
                .unwrap_or("it is incomplete")
                .to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
