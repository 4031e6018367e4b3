//! Pins: for a bounded time after a lookup, slots of other sessions' leases keep their bytes.
//!
//! Pins guard slots against being written again by their lessee. A slab that changes hands is guarded by the
//! lease's readers instead, so the pins on a lease end with its revocation.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::domain::{PinId, SessionId};

use super::{
    arena::{Beside, LeaseKey, OfLease},
    check::hold,
    config::CoreConfig,
    effect::Refusal,
};

/// Consecutive slots of one lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) lease: LeaseKey,
    pub(super) first: u32,
    pub(super) count: u32,
}

#[derive(Clone, Debug)]
struct Pin {
    session: SessionId,
    /// When it ends, milliseconds.
    deadline: u64,
    /// How many extents it counts for against the session's limit.
    weight: usize,
    spans: Vec<Span>,
}

/// What one session has pinned.
#[derive(Clone, Debug, Default)]
struct Pinned {
    pins: BTreeSet<PinId>,
    extents: usize,
}

/// All pins. Time never goes back and every pin lasts as long, so they end in the order of their ids.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    live: BTreeMap<PinId, Pin>,
    last: u64,
    by_session: BTreeMap<SessionId, Pinned>,
    by_lease: Beside<OfLease, BTreeSet<PinId>>,
}

impl Pins {
    pub(super) fn new(base: u64) -> Self {
        Self {
            live: BTreeMap::new(),
            last: base >> 1,
            by_session: BTreeMap::new(),
            by_lease: Beside::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    /// Pins what a lookup found in other sessions' leases. A lookup that found only its own leases gets an id too,
    /// which pins nothing.
    pub(super) fn add(
        &mut self,
        session: SessionId,
        spans: Vec<Span>,
        config: &CoreConfig,
        now: u64,
    ) -> Result<PinId, Refusal> {
        if !spans.is_empty() {
            self.may_pin(session, spans.len(), config)?;
        }
        // 0 is "no pin" on the wire.
        self.last = self.last.wrapping_add(1).max(1);
        let id = PinId(self.last);
        if spans.is_empty() {
            return Ok(id);
        }
        for span in &spans {
            if let Some(pins) = self.by_lease.get_mut(span.lease) {
                pins.insert(id);
            } else {
                self.by_lease.insert(span.lease, BTreeSet::from([id]));
            }
        }
        let its = self.by_session.entry(session).or_default();
        its.pins.insert(id);
        its.extents += spans.len();
        let pin = Pin {
            session,
            deadline: now.saturating_add(config.pin_ms.into()),
            weight: spans.len(),
            spans,
        };
        self.live.insert(id, pin);
        Ok(id)
    }

    /// Ending an older pin in favour of a new one would let its slots be written under a reader: the new one is
    /// refused instead.
    fn may_pin(
        &self,
        session: SessionId,
        extents: usize,
        config: &CoreConfig,
    ) -> Result<(), Refusal> {
        let Some(its) = self.by_session.get(&session) else {
            return Ok(());
        };
        let limit = |what, limit: usize| Refusal::Limit {
            what,
            limit: limit as u64,
        };
        if its.pins.len() >= config.max_pins_per_session {
            return Err(limit("pins", config.max_pins_per_session));
        }
        if its.extents + extents > config.max_pinned_extents_per_session {
            let most = config.max_pinned_extents_per_session;
            return Err(limit("pinned extents", most));
        }
        Ok(())
    }

    /// Ends those of these pins that are the session's.
    pub(super) fn end(&mut self, session: SessionId, pins: &[PinId]) {
        for id in pins {
            let pin = self.live.get(id);
            if pin.is_some_and(|pin| pin.session == session) {
                self.drop_pin(*id);
            }
        }
    }

    fn drop_pin(&mut self, id: PinId) {
        let Some(pin) = self.live.remove(&id) else {
            return;
        };
        for span in &pin.spans {
            if let Some(pins) = self.by_lease.get_mut(span.lease) {
                pins.remove(&id);
            }
        }
        if let Some(its) = self.by_session.get_mut(&pin.session) {
            its.pins.remove(&id);
            its.extents -= pin.weight;
            if its.pins.is_empty() {
                self.by_session.remove(&pin.session);
            }
        }
    }

    /// Ends the pins whose time is over.
    pub(super) fn expire(&mut self, now: u64) {
        while let Some((id, pin)) = self.live.first_key_value() {
            if pin.deadline > now {
                return;
            }
            self.drop_pin(*id);
        }
    }

    pub(super) fn end_all_of(&mut self, session: SessionId) {
        let its = self.by_session.get(&session);
        for id in its.map(|its| its.pins.clone()).unwrap_or_default() {
            self.drop_pin(id);
        }
    }

    /// Ends what pins hold of one lease.
    pub(super) fn end_all_on(&mut self, lease: LeaseKey) {
        for id in self.by_lease.remove(lease).unwrap_or_default() {
            let Some(pin) = self.live.get_mut(&id) else {
                continue;
            };
            pin.spans.retain(|span| span.lease != lease);
            if pin.spans.is_empty() {
                self.drop_pin(id);
            }
        }
    }

    /// When the last pin on a lease ends, milliseconds; 0 when there is none.
    pub(super) fn last_on(&self, lease: LeaseKey) -> u64 {
        let pins = self.by_lease.get(lease).into_iter().flatten();
        pins.map(|id| self.live[id].deadline).max().unwrap_or(0)
    }

    /// Ends what a session's pins hold of one lease.
    pub(super) fn end_of_on(&mut self, session: SessionId, lease: LeaseKey) {
        let on = self.by_lease.get(lease).cloned().unwrap_or_default();
        for id in on {
            let Some(pin) = (self.live.get_mut(&id)).filter(|pin| pin.session == session) else {
                continue;
            };
            pin.spans.retain(|span| span.lease != lease);
            let empty = pin.spans.is_empty();
            if let Some(pins) = self.by_lease.get_mut(lease) {
                pins.remove(&id);
            }
            if empty {
                self.drop_pin(id);
            }
        }
    }

    /// Which of these slots of a lease are pinned, and until when the last of them is.
    pub(super) fn among(&self, lease: LeaseKey, slots: &BTreeSet<u32>) -> (BTreeSet<u32>, u64) {
        let mut pinned = BTreeSet::new();
        let mut until = 0;
        for id in self.by_lease.get(lease).into_iter().flatten() {
            let pin = &self.live[id];
            for span in pin.spans.iter().filter(|span| span.lease == lease) {
                for slot in slots.range(span.first..span.first + span.count) {
                    pinned.insert(*slot);
                    until = until.max(pin.deadline);
                }
            }
        }
        (pinned, until)
    }

    /// Verifies that sessions and leases know the same pins, and that `may` a session have a pin on a lease.
    pub(super) fn check(&self, may: impl Fn(SessionId, LeaseKey) -> bool) -> Result<(), String> {
        let mut on_leases = BTreeSet::new();
        let mut by_session: BTreeMap<_, (BTreeSet<PinId>, usize)> = BTreeMap::new();
        for (id, pin) in &self.live {
            hold!(!pin.spans.is_empty(), "{id:?} pins nothing");
            for span in &pin.spans {
                let lease = span.lease;
                let session = pin.session;
                hold!(may(session, lease), "{id:?} pins {lease:?} for {session:?}");
                on_leases.insert((lease, *id));
            }
            let its = by_session.entry(pin.session).or_default();
            its.0.insert(*id);
            its.1 += pin.weight;
        }
        let known = self.by_lease.iter();
        let known = known.flat_map(|(lease, pins)| pins.iter().map(move |pin| (lease, *pin)));
        hold!(known.eq(on_leases), "leases are mistaken about their pins");
        let known = self.by_session.iter();
        let known = known.map(|(id, its)| (*id, (its.pins.clone(), its.extents)));
        hold!(
            known.collect::<BTreeMap<_, _>>() == by_session,
            "sessions are mistaken about their pins"
        );
        Ok(())
    }
}
