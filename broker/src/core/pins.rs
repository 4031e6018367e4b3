//! Pins: for a bounded time after a lookup, slots of other sessions' leases keep their bytes.
//!
//! Pins guard slots against being written again by their lessee. A slab that changes hands is guarded by the
//! lease's readers instead, so the pins on a lease end with its revocation.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::domain::{PinId, SessionId};

use super::{Caller, Refusal, arena::Key, leases::Lease, state::State};

/// Consecutive slots of one lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) lease: Key<Lease>,
    pub(super) first: u32,
    pub(super) count: u32,
}

#[derive(Clone, Debug)]
pub(super) struct Pin {
    pub(super) session: SessionId,
    /// When it ends, milliseconds.
    pub(super) deadline: u64,
    /// How many extents it counts for against the session's limit.
    pub(super) weight: usize,
    pub(super) spans: Vec<Span>,
}

/// All pins. Time never goes back and every pin lasts as long, so they end in the order of their ids.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    pub(super) live: BTreeMap<PinId, Pin>,
    last: u64,
}

impl Pins {
    pub(super) fn new(base: u64) -> Self {
        Self {
            live: BTreeMap::new(),
            last: base >> 1,
        }
    }
}

impl State {
    /// Pins what a lookup found in other sessions' leases. A lookup that found only its own leases gets an id too,
    /// which pins nothing.
    pub(super) fn pin(&mut self, session: SessionId, spans: Vec<Span>) -> Result<PinId, Refusal> {
        if !spans.is_empty() {
            self.may_pin(session, spans.len())?;
        }
        // 0 is "no pin" on the wire.
        self.pins.last = self.pins.last.wrapping_add(1).max(1);
        let id = PinId(self.pins.last);
        if spans.is_empty() {
            return Ok(id);
        }
        for span in &spans {
            self.leases[span.lease].pins.insert(id);
        }
        if let Some(session) = self.sessions.get_mut(&session) {
            session.pins.insert(id);
            session.pinned_extents += spans.len();
        }
        let pin = Pin {
            session,
            deadline: self.now.saturating_add(self.config.pin_ms.into()),
            weight: spans.len(),
            spans,
        };
        self.pins.live.insert(id, pin);
        Ok(id)
    }

    /// Ending an older pin in favour of a new one would let its slots be written under a reader: the new one is
    /// refused instead.
    fn may_pin(&self, session: SessionId, extents: usize) -> Result<(), Refusal> {
        let session = &self.sessions[&session];
        let limit = |what, limit: usize| Refusal::Limit {
            what,
            limit: limit as u64,
        };
        if session.pins.len() >= self.config.max_pins_per_session {
            return Err(limit("pins", self.config.max_pins_per_session));
        }
        if session.pinned_extents + extents > self.config.max_pinned_extents_per_session {
            let most = self.config.max_pinned_extents_per_session;
            return Err(limit("pinned extents", most));
        }
        Ok(())
    }

    pub(super) fn unpin(&mut self, caller: Caller, pins: &[PinId]) -> Result<(), Refusal> {
        self.session_of(caller)?;
        for id in pins {
            let pin = self.pins.live.get(id);
            if pin.is_some_and(|pin| pin.session == caller.session) {
                self.drop_pin(*id);
            }
        }
        Ok(())
    }

    fn drop_pin(&mut self, id: PinId) {
        let Some(pin) = self.pins.live.remove(&id) else {
            return;
        };
        for span in &pin.spans {
            self.leases[span.lease].pins.remove(&id);
        }
        if let Some(session) = self.sessions.get_mut(&pin.session) {
            session.pins.remove(&id);
            session.pinned_extents -= pin.weight;
        }
    }

    pub(super) fn expire_pins(&mut self) {
        while let Some((id, pin)) = self.pins.live.first_key_value() {
            if pin.deadline > self.now {
                return;
            }
            self.drop_pin(*id);
        }
    }

    pub(super) fn drop_pins_of(&mut self, session: SessionId) {
        let pins = self
            .sessions
            .get(&session)
            .map(|session| session.pins.clone());
        for id in pins.unwrap_or_default() {
            self.drop_pin(id);
        }
    }

    /// Ends what pins hold of one lease.
    pub(super) fn drop_pins_on(&mut self, key: Key<Lease>) {
        for id in std::mem::take(&mut self.leases[key].pins) {
            let Some(pin) = self.pins.live.get_mut(&id) else {
                continue;
            };
            pin.spans.retain(|span| span.lease != key);
            if pin.spans.is_empty() {
                self.drop_pin(id);
            }
        }
    }

    /// Which of these slots must not be written yet, and for how long, milliseconds.
    pub(super) fn pinned_among(&self, key: Key<Lease>, slots: &[u32]) -> (Vec<u32>, u32) {
        let lease = &self.leases[key];
        let asked: BTreeSet<_> = slots.iter().copied().collect();
        let mut pinned = BTreeSet::new();
        let mut until = self.now;
        for pin in lease.pins.iter().map(|id| &self.pins.live[id]) {
            for span in pin.spans.iter().filter(|span| span.lease == key) {
                for slot in asked.range(span.first..span.first + span.count) {
                    pinned.insert(*slot);
                    until = until.max(pin.deadline);
                }
            }
        }
        // Pins of the broker before this one are unknown, and may all still be read under.
        if lease.restored && self.now < self.grace_until {
            pinned = asked;
            until = until.max(self.grace_until);
        }
        let left = u32::try_from(until - self.now).unwrap_or(u32::MAX);
        (pinned.into_iter().collect(), left)
    }
}
