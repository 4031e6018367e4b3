//! Leases: from the grant until everyone has let go.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use swiftcache_proto::domain::{Generation, LeaseClass, LeaseId, RevokeReason, SessionId};

use super::{
    arena::{Arena, LeaseKey, NamespaceKey, OfLease, RegionKey},
    check::hold,
    effect::Refusal,
};

/// The lessee of what is kept for an heir: no session has this id.
pub(super) const NOBODY: SessionId = SessionId(0);

/// A revocation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Revocation {
    pub(super) reason: RevokeReason,
    /// When it began, milliseconds.
    pub(super) since: u64,
    /// When the drain window closes, milliseconds.
    pub(super) deadline: u64,
}

impl Revocation {
    pub(super) fn left_ms(&self, now: u64) -> u32 {
        u32::try_from(self.deadline.saturating_sub(now)).unwrap_or(u32::MAX)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Active,
    Draining(Revocation),
    Zombie(Revocation),
}

/// What is fixed for the life of a lease.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) id: LeaseId,
    pub(super) generation: Generation,
    pub(super) region: RegionKey,
    pub(super) slab: u32,
    pub(super) bytes: u64,
    pub(super) lessee: SessionId,
    pub(super) namespace: NamespaceKey,
    /// The device the lessee computes on.
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    pub(super) class: LeaseClass,
}

#[derive(Clone, Debug)]
pub(super) struct Lease {
    terms: Terms,
    phase: Phase,
    /// The lessee has not let go.
    lessee_holds: bool,
    /// The lessee is gone, and what it published is kept for an heir until then, milliseconds.
    estate: Option<u64>,
    /// The sessions that opened it for reading and have not let go.
    readers: BTreeSet<SessionId>,
    /// When it was granted, milliseconds.
    since: u64,
    /// When a lookup last found a block in it, milliseconds.
    last_hit: u64,
    /// Granted by a broker before this one, whose pins may still be read under.
    restored: bool,
}

impl Lease {
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn is_active(&self) -> bool {
        self.phase == Phase::Active
    }

    pub(super) fn revocation(&self) -> Option<&Revocation> {
        match &self.phase {
            Phase::Active => None,
            Phase::Draining(revocation) | Phase::Zombie(revocation) => Some(revocation),
        }
    }

    /// Whether the lessee has not let go.
    pub(super) fn lessee_holds(&self) -> bool {
        self.lessee_holds
    }

    /// Until when it is kept for an heir, milliseconds, if its lessee is gone.
    pub(super) fn estate(&self) -> Option<u64> {
        self.estate
    }

    pub(super) fn readers(&self) -> &BTreeSet<SessionId> {
        &self.readers
    }

    /// Everyone who may touch the slab.
    pub(super) fn parties(&self) -> impl Iterator<Item = SessionId> {
        let lessee = self.lessee_holds.then_some(self.terms.lessee);
        lessee.into_iter().chain(self.readers.iter().copied())
    }

    pub(super) fn since(&self) -> u64 {
        self.since
    }

    /// When a lookup last found a block in it, milliseconds.
    pub(super) fn last_hit(&self) -> u64 {
        self.last_hit
    }

    /// Whether a broker before this one granted it.
    pub(super) fn is_restored(&self) -> bool {
        self.restored
    }
}

/// As what somebody could touch a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Party {
    Lessee,
    Reader,
}

/// All leases.
#[derive(Clone, Debug)]
pub(super) struct Leases {
    known: Arena<OfLease, Lease>,
    ids: BTreeMap<LeaseId, LeaseKey>,
    /// The id of the next one: none is used twice.
    next: u64,
    /// Revoked leases by when their drain window closes, milliseconds.
    draining: BTreeSet<(u64, LeaseId)>,
    /// Leases kept for an heir, by until when, milliseconds.
    estates: BTreeSet<(u64, LeaseId)>,
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            known: Arena::default(),
            ids: BTreeMap::new(),
            next: 1,
            draining: BTreeSet::new(),
            estates: BTreeSet::new(),
        }
    }
}

impl Leases {
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// The id of the next lease.
    pub(super) fn next_id(&self) -> LeaseId {
        LeaseId(self.next)
    }

    /// No lease from now on has an id less than this.
    pub(super) fn start_from(&mut self, id: LeaseId) {
        self.next = self.next.max(id.0);
    }

    pub(super) fn key(&self, id: LeaseId) -> Option<LeaseKey> {
        self.ids.get(&id).copied()
    }

    /// The lease, if there is one.
    pub(super) fn find(&self, id: LeaseId) -> Option<(LeaseKey, &Lease)> {
        let key = self.key(id)?;
        Some((key, self.get(key)))
    }

    pub(super) fn known(&self, id: LeaseId) -> Result<(LeaseKey, &Lease), Refusal> {
        self.find(id).ok_or_else(|| Refusal::Unknown {
            what: "lease",
            which: id.to_string(),
        })
    }

    pub(super) fn get(&self, key: LeaseKey) -> &Lease {
        &self.known[key]
    }

    pub(super) fn try_get(&self, key: LeaseKey) -> Option<&Lease> {
        self.known.get(key)
    }

    /// By id, after one of them.
    pub(super) fn after(&self, after: Option<LeaseId>) -> impl Iterator<Item = (LeaseKey, &Lease)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let keys = self.ids.range((from, Bound::Unbounded));
        keys.map(|(_, key)| (*key, self.get(*key)))
    }

    /// By id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (LeaseKey, &Lease)> {
        self.after(None)
    }

    /// A lease is granted, to a lessee that holds it unless it is over.
    pub(super) fn insert(&mut self, terms: Terms, now: u64) -> LeaseKey {
        let id = terms.id;
        let key = self.known.insert(Lease {
            terms,
            phase: Phase::Active,
            lessee_holds: true,
            estate: None,
            readers: BTreeSet::new(),
            since: now,
            last_hit: now,
            restored: false,
        });
        self.ids.insert(id, key);
        self.start_from(LeaseId(id.0 + 1));
        key
    }

    /// Everyone has let go of the lease.
    pub(super) fn remove(&mut self, key: LeaseKey) -> Lease {
        let lease = self.known.remove(key);
        self.ids.remove(&lease.terms.id);
        if let Some(revocation) = lease.revocation() {
            self.draining.remove(&(revocation.deadline, lease.terms.id));
        }
        if let Some(until) = lease.estate {
            self.estates.remove(&(until, lease.terms.id));
        }
        lease
    }

    /// A broker before this one granted it.
    pub(super) fn mark_restored(&mut self, key: LeaseKey) {
        self.known[key].restored = true;
    }

    pub(super) fn add_reader(&mut self, key: LeaseKey, reader: SessionId) {
        self.known[key].readers.insert(reader);
    }

    /// Strikes a session from those who may touch the slab; says as what it could, if it could.
    pub(super) fn drop_party(&mut self, key: LeaseKey, session: SessionId) -> Option<Party> {
        let lease = &mut self.known[key];
        if lease.terms.lessee == session && lease.lessee_holds {
            lease.lessee_holds = false;
            return Some(Party::Lessee);
        }
        lease.readers.remove(&session).then_some(Party::Reader)
    }

    /// The lessee has let go. The lease is kept for an heir until then, milliseconds.
    pub(super) fn keep_for_heir(&mut self, key: LeaseKey, until: u64) {
        let lease = &mut self.known[key];
        // A session that gave it up and lives is a stranger to it.
        lease.terms.lessee = NOBODY;
        lease.estate = Some(until);
        self.estates.insert((until, lease.terms.id));
    }

    /// The lease is not kept for an heir any more.
    fn end_estate(&mut self, key: LeaseKey) {
        let lease = &mut self.known[key];
        if let Some(until) = lease.estate.take() {
            self.estates.remove(&(until, lease.terms.id));
        }
    }

    /// A lease that was kept for an heir has a lessee again, which computes on this device.
    pub(super) fn inherit(&mut self, key: LeaseKey, heir: SessionId, device: usize) {
        self.end_estate(key);
        let lease = &mut self.known[key];
        lease.terms.lessee = heir;
        lease.terms.device = device;
        lease.lessee_holds = true;
    }

    /// The leases that are kept for heirs, those first that are so no longer than others.
    pub(super) fn estates(&self) -> impl Iterator<Item = (LeaseKey, &Lease)> {
        let keys = self.estates.iter().map(|(_, id)| self.ids[id]);
        keys.map(|key| (key, self.get(key)))
    }

    /// A lease that has been kept for an heir long enough.
    pub(super) fn next_expired_estate(&self, now: u64) -> Option<LeaseKey> {
        let (until, id) = self.estates.first()?;
        (*until <= now).then(|| self.ids[id])
    }

    /// Begins the revocation of an active lease.
    pub(super) fn revoke(&mut self, key: LeaseKey, revocation: Revocation) {
        self.end_estate(key);
        let lease = &mut self.known[key];
        lease.phase = Phase::Draining(revocation);
        self.draining.insert((revocation.deadline, lease.terms.id));
    }

    /// Has the drain window of a draining lease close no later than this, milliseconds.
    pub(super) fn close_by(&mut self, key: LeaseKey, deadline: u64) {
        let lease = &mut self.known[key];
        let id = lease.terms.id;
        if let Phase::Draining(revocation) = &mut lease.phase
            && deadline < revocation.deadline
        {
            self.draining.remove(&(revocation.deadline, id));
            self.draining.insert((deadline, id));
            revocation.deadline = deadline;
        }
    }

    /// Makes the next lease whose drain window has closed a zombie: still held, and never counted as free.
    pub(super) fn next_zombie(&mut self, now: u64) -> Option<LeaseKey> {
        let (deadline, id) = self.draining.first().copied()?;
        if deadline > now {
            return None;
        }
        self.draining.pop_first();
        let key = self.ids[&id];
        let lease = &mut self.known[key];
        if let Phase::Draining(revocation) = lease.phase {
            lease.phase = Phase::Zombie(revocation);
        }
        Some(key)
    }

    /// A lookup has found a block in it.
    pub(super) fn hit(&mut self, key: LeaseKey, now: u64) {
        self.known[key].last_hit = now;
    }

    /// Windows are counted from here, as far as this clock can tell.
    pub(super) fn restart_clocks(&mut self, now: u64, deadline: u64, estates_until: u64) {
        self.draining.clear();
        self.estates.clear();
        for (id, key) in &self.ids {
            let lease = &mut self.known[*key];
            lease.since = now;
            lease.last_hit = now;
            if let Some(until) = &mut lease.estate {
                *until = estates_until;
                self.estates.insert((estates_until, *id));
            }
            if let Phase::Draining(revocation) = &mut lease.phase {
                revocation.since = now;
                revocation.deadline = deadline;
                self.draining.insert((deadline, *id));
            }
        }
    }

    /// Verifies that every lease is held by somebody or kept for an heir, an active one by its lessee, and that windows close in
    /// order.
    pub(super) fn check(&self) -> Result<(), String> {
        hold!(self.ids.len() == self.known.len(), "a lease has two ids");
        let mut draining = BTreeSet::new();
        let mut estates = BTreeSet::new();
        for (id, key) in &self.ids {
            let lease = &self.known[*key];
            hold!(
                lease.terms.id == *id,
                "lease {id} is filed under another id"
            );
            hold!(id.0 < self.next, "lease {id} will be granted again");
            let held = lease.parties().next().is_some();
            let kept = lease.estate.is_some();
            hold!(held || kept, "lease {id} is held by nobody");
            hold!(
                !lease.is_active() || lease.lessee_holds != kept,
                "lease {id} is active without its lessee, or kept for an heir besides"
            );
            hold!(
                lease.is_active() || !kept,
                "lease {id} is revoked and kept for an heir"
            );
            estates.extend(lease.estate.map(|until| (until, *id)));
            if let Phase::Draining(revocation) = lease.phase {
                draining.insert((revocation.deadline, *id));
            }
        }
        hold!(draining == self.draining, "drain windows are misfiled");
        hold!(estates == self.estates, "estates are misfiled");
        Ok(())
    }
}
