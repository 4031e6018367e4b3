//! The owner's desk: the ledger, the streams and the watch for deaths. The effects of events are carried out here.

use std::collections::HashSet;

use swiftcache_proto::{domain::SessionId, v1};
use tokio::task::block_in_place;

use super::{Owner, answer};
use crate::{
    core::{Caller, Effect, Event, Note, Outgoing, Process, Record, Recorded, Reply, State},
    death::DeathWatch,
    error::Refused,
    ledger::Ledger,
    logging::Sparse,
    streams::{Streams, wire},
};

/// Everything that effects are carried out with. One event at a time is at the desk.
pub(super) struct Desk {
    pub(super) ledger: Ledger,
    /// What a restarted broker would know, so that the ledger is rewritten without the state's lock. `None` after a
    /// record that contradicted it.
    recorded: Option<Recorded>,
    pub(super) streams: Streams,
    pub(super) deaths: DeathWatch,
    /// Sessions that must attach again once the ledger is whole. A message was withheld from them, because they must
    /// not act on it before it is recorded.
    withheld: HashSet<SessionId>,
    pub(super) closing: bool,
    /// Who does what is done now, if it is an operator.
    pub(super) by: Option<String>,
}

/// What became of an event.
pub(super) struct Done {
    pub(super) reply: Option<Reply>,
    /// All its records are in the ledger.
    pub(super) recorded: bool,
}

/// Says that the copy is given up. From now on the ledger is rewritten from the state, for which lookups wait.
fn lost(problem: &str) {
    tracing::error!(
        problem,
        "a bug in swiftcache: the copy of the ledger in memory is given up"
    );
}

/// Rate-limit warnings that any member can cause.
static SLOW: Sparse = Sparse::new();
static BECAME: Sparse = Sparse::new();

/// Keeps a message from a session's queue, or passes it on.
type Divert<'a> = dyn FnMut(SessionId, v1::SessionResponse) -> Option<v1::SessionResponse> + 'a;

impl Desk {
    pub(super) fn new(state: &State, ledger: Ledger, deaths: DeathWatch) -> Self {
        let recorded = Recorded::of(state).map_err(|problem| lost(&problem));
        Self {
            ledger,
            recorded: recorded.ok(),
            streams: Streams::default(),
            deaths,
            withheld: HashSet::new(),
            closing: false,
            by: None,
        }
    }

    /// A process runs another program than the one that opened its sessions: they end as with its death.
    pub(super) fn has_become_another(&mut self, owner: &Owner, process: Process) {
        let (pid, uid) = (process.pid, process.uid);
        if let Some(withheld) = BECAME.turn() {
            tracing::warn!(
                pid,
                uid,
                withheld,
                "a process has become another program: its sessions end"
            );
        }
        self.apply(owner, Event::ProcessGone(process));
        self.deaths.unwatch(process);
    }

    /// Applies an event for a caller. A grant never leaves unrecorded.
    pub(super) fn handle(&mut self, owner: &Owner, event: Event) -> Result<Reply, Refused> {
        let caller = match &event {
            Event::Lease(demand) => Some(demand.caller),
            Event::Inherit(demand) => Some(demand.caller),
            Event::Share { caller, .. } => Some(*caller),
            _ => None,
        };
        answer(match caller {
            Some(caller) => self.grant(owner, caller, event)?,
            None => self.apply(owner, event).reply,
        })
    }

    /// Applies an event and carries out its effects.
    pub(super) fn apply(&mut self, owner: &Owner, event: Event) -> Done {
        self.apply_diverting(owner, event, &mut |_, message| Some(message))
    }

    /// Like [`Self::apply`]. The state's lock is held while the core computes, and no longer.
    pub(super) fn apply_diverting(
        &mut self,
        owner: &Owner,
        event: Event,
        divert: &mut Divert<'_>,
    ) -> Done {
        let effects = owner.decide(event);
        self.carry_out(owner, effects, divert)
    }

    /// Carries out effects in order, but records first, so that no message leaves before its facts are recorded.
    fn carry_out(&mut self, owner: &Owner, effects: Vec<Effect>, divert: &mut Divert<'_>) -> Done {
        let recorded = self.write(&effects);
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
                        if let Some(withheld) = SLOW.turn() {
                            tracing::warn!(
                                ?session,
                                withheld,
                                "a stream that its client reads too slowly was closed; the client gets the outstanding \
                             messages when it attaches again"
                            );
                        }
                        fallen.push(session);
                    }
                }
                Effect::Watch(process) => self.deaths.watch_known(process),
                Effect::Unwatch(process) => self.deaths.unwatch(process),
                Effect::DropHandle(allocation) => owner.descriptors.discard(allocation),
                Effect::Note(note) => {
                    if let Note::Left { session } | Note::Gone { session, .. } = &note {
                        self.streams.close(*session);
                        self.withheld.remove(session);
                        owner.descriptors.forget(*session);
                    }
                    if let Note::LeaseEnded { lease, .. } = &note {
                        owner.descriptors.lease_over(*lease);
                    }
                    owner.tell(&note, self.by.as_deref());
                }
            }
        }
        for session in fallen {
            self.apply(owner, Event::Detach(session));
        }
        Done { reply, recorded }
    }

    /// Appends an event's records to the ledger. Returns false if they are not all there.
    fn write(&mut self, effects: &[Effect]) -> bool {
        let records: Vec<Record> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Record(record) => Some(record.clone()),
                _ => None,
            })
            .collect();
        if records.is_empty() {
            return true;
        }
        let was_whole = self.ledger.behind().is_none();
        let written = self.ledger.append(&records);
        if let Some(recorded) = &mut self.recorded
            && let Some(problem) = records.into_iter().find_map(|it| recorded.add(it).err())
        {
            lost(&problem);
            self.recorded = None;
        }
        if written || !was_whole {
            return written;
        }
        // Somebody may have deleted the file: then a new one takes everything.
        let all = self.recorded.as_ref().map(Recorded::records);
        all.is_some_and(|all| self.ledger.rewrite(&all))
    }

    /// Rewrites the ledger. Returns whether it is whole. Then it closes the streams from which a message was withheld,
    /// so that their sessions attach again.
    pub(super) fn rewrite(&mut self, owner: &Owner) -> bool {
        let records = match &self.recorded {
            Some(recorded) => recorded.records(),
            None => owner.state.lock().records(),
        };
        // Also where it goes to memory: all of it takes long.
        let whole = block_in_place(|| self.ledger.rewrite(&records));
        if whole {
            for session in std::mem::take(&mut self.withheld) {
                if self.streams.close(session) {
                    self.apply(owner, Event::Detach(session));
                }
            }
        }
        whole
    }

    /// Grants a lease or a share, or takes it back if it cannot be recorded.
    fn grant(
        &mut self,
        owner: &Owner,
        caller: Caller,
        event: Event,
    ) -> Result<Option<Reply>, Refused> {
        if self.ledger.behind().is_some() && !self.rewrite(owner) {
            return Err(self.unrecorded());
        }
        let done = self.apply(owner, event);
        if done.recorded {
            return Ok(done.reply);
        }
        let leases = match done.reply {
            Some(Reply::Leased { grants, .. }) => grants.iter().map(|grant| grant.lease).collect(),
            Some(Reply::Shared(grant)) => vec![grant.lease],
            Some(Reply::Inherited { leases, .. }) => {
                leases.iter().map(|its| its.grant.lease).collect()
            }
            _ => Vec::new(),
        };
        self.apply(
            owner,
            Event::Release {
                caller,
                leases,
                unmappable: false,
                // What was inherited goes back to where it was.
                bequeath: true,
            },
        );
        Err(self.unrecorded())
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
