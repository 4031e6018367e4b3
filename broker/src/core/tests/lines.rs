//! What travels between sessions and the broker: calls and what is said on streams one way, answers and what is said on
//! streams the other. Each lane of a session's line keeps its order; lanes, and sessions, overtake each other. A line that
//! is lost loses what was on it, and a line that is cut holds it.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use swiftcache_proto::domain::SessionId;

use super::history::{History, Outcome};
use crate::core::{Event, Outgoing, Reply};

/// What a session does with an answer.
type Then = Box<dyn FnOnce(&mut History, Option<Reply>) -> Outcome>;

/// A session's connection.
#[derive(Default)]
pub(super) struct Line {
    calls: VecDeque<(Event, Then)>,
    answers: VecDeque<(Option<Reply>, Then)>,
    said: VecDeque<Outgoing>,
    cut: bool,
}

/// All of them.
pub(super) type Lines = BTreeMap<SessionId, Line>;

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let calls: Vec<_> = self.calls.iter().map(|(event, _)| event).collect();
        write!(f, "{calls:?} {:?}", self.said)
    }
}

/// Whose connection an event comes by.
fn sender(event: &Event) -> Option<SessionId> {
    match event {
        Event::Register(register) => register.resume,
        Event::Attach(caller)
        | Event::Leave(caller)
        | Event::Release { caller, .. }
        | Event::Share { caller, .. }
        | Event::Unpublish { caller, .. }
        | Event::Acknowledge { caller, .. }
        | Event::Scrubbed { caller, .. }
        | Event::Unpin { caller, .. } => Some(caller.session),
        Event::Offer(offer) => Some(offer.caller.session),
        Event::Withdraw(withdraw) => Some(withdraw.caller.session),
        Event::Lease(demand) => Some(demand.caller.session),
        Event::Inherit(demand) => Some(demand.caller.session),
        Event::Publish(publish) => Some(publish.caller.session),
        Event::Lookup(lookup) => Some(lookup.caller.session),
        Event::Keep(keep) => Some(keep.caller.session),
        _ => None,
    }
}

impl History {
    pub(super) fn is_queued(&self) -> bool {
        self.queued
    }

    /// A session asks, and does something about the answer: now, or when both have travelled.
    pub(super) fn call(
        &mut self,
        event: Event,
        then: impl FnOnce(&mut Self, Option<Reply>) -> Outcome + 'static,
    ) -> Outcome {
        match sender(&event).filter(|_| self.queued) {
            Some(session) => {
                let line = self.lines.entry(session).or_default();
                line.calls.push_back((event, Box::new(then)));
                Ok(())
            }
            None => {
                let reply = self.apply(event)?;
                then(self, reply)
            }
        }
    }

    /// A session says something whose answer it does not need.
    pub(super) fn tell(&mut self, event: Event) -> Outcome {
        self.call(event, |_, _| Ok(()))
    }

    /// The broker says something.
    pub(super) fn say(&mut self, session: SessionId, message: Outgoing) {
        if self.queued {
            let line = self.lines.entry(session).or_default();
            line.said.push_back(message);
        } else {
            self.world.hear(session, &message);
        }
    }

    /// The next thing of some lane of some line arrives.
    pub(super) fn carry(&mut self, a: u8, b: u8) -> Outcome {
        let lanes: Vec<(SessionId, u8)> = self
            .lines
            .iter()
            .flat_map(|(id, line)| lanes(*id, line))
            .collect();
        let number = (usize::from(a) << 8 | usize::from(b)) % lanes.len().max(1);
        match lanes.get(number) {
            Some((session, lane)) => self.carry_one(*session, *lane),
            None => Ok(()),
        }
    }

    /// Everything on its way arrives, and what comes of it.
    pub(super) fn carry_all(&mut self) -> Outcome {
        loop {
            let mut lanes = self.lines.iter().flat_map(|(id, line)| lanes(*id, line));
            let Some((session, lane)) = lanes.next() else {
                return Ok(());
            };
            drop(lanes);
            self.carry_one(session, lane)?;
        }
    }

    fn carry_one(&mut self, session: SessionId, lane: u8) -> Outcome {
        let Some(line) = self.lines.get_mut(&session) else {
            return Ok(());
        };
        match lane {
            0 => {
                let Some((event, then)) = line.calls.pop_front() else {
                    return Ok(());
                };
                let reply = self.apply(event)?;
                // A broker that crashed meanwhile answers nobody.
                if let (Some(line), true) = (self.lines.get_mut(&session), reply.is_some()) {
                    line.answers.push_back((reply, then));
                }
                Ok(())
            }
            1 => match line.answers.pop_front() {
                Some((reply, then)) => then(self, reply),
                None => Ok(()),
            },
            _ => {
                if let Some(message) = line.said.pop_front() {
                    self.world.hear(session, &message);
                }
                Ok(())
            }
        }
    }

    /// A connection is lost, with what was on it: the broker has heard a call or not, the session its answer or not.
    pub(super) fn lose_connection(&mut self, session: SessionId) -> Outcome {
        self.lines.remove(&session);
        if let Some(client) = self.world.client(session) {
            client.behind = true;
            client.opening.clear();
        }
        self.apply(Event::Detach(session)).map(drop)
    }

    /// All who have lost their connections connect again.
    pub(super) fn come_back(&mut self) -> Outcome {
        let behind = self.world.clients.iter().filter(|client| client.behind);
        for client in behind.cloned().collect::<Vec<_>>() {
            self.resume(&client, 1)?;
        }
        Ok(())
    }

    /// Nothing gets through to or from a session for a while; with every third, all are healed.
    pub(super) fn partition(&mut self, a: u8, b: u8) {
        if b.is_multiple_of(3) {
            self.lines.values_mut().for_each(|line| line.cut = false);
            return;
        }
        let number = usize::from(a) % self.lines.len().max(1);
        if let Some(line) = self.lines.values_mut().nth(number) {
            line.cut = true;
        }
    }
}

/// The lanes of a line on which something waits.
fn lanes(id: SessionId, line: &Line) -> impl Iterator<Item = (SessionId, u8)> {
    let waits = [
        !line.calls.is_empty(),
        !line.answers.is_empty(),
        !line.said.is_empty(),
    ];
    let cut = line.cut;
    (0..)
        .zip(waits)
        .filter(move |(_, waits)| *waits && !cut)
        .map(move |(lane, _)| (id, lane))
}
