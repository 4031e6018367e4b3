//! Revocation: asking everyone to let go of a slab, and what follows when they have, or have not.

use swiftcache_proto::domain::{Generation, LeaseId, RevokeReason, SessionId};

use super::{
    Caller, Effect, Note, Outgoing, Record, Refusal,
    account::Place,
    arena::Key,
    leases::{Lease, Phase},
    state::State,
};

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

impl State {
    pub(super) fn acknowledge(
        &mut self,
        caller: Caller,
        id: LeaseId,
        generation: Generation,
    ) -> Result<(), Refusal> {
        self.session_of(caller)?;
        let Some(key) = self.lease_ids.get(&id).copied() else {
            return Ok(());
        };
        let lease = &self.leases[key];
        let stale = lease.generation != generation.0 || lease.revocation().is_none();
        if stale || !lease.parties().any(|party| party == caller.session) {
            return Ok(());
        }
        self.counters.acknowledgements += 1;
        self.let_go(key, caller.session);
        Ok(())
    }

    /// Starts a revocation: its blocks cannot be found from here on, and everyone who may touch the slab but
    /// `untold` is asked to let go. Returns whether it was not being revoked before; if it was, a shorter window
    /// counts from now on.
    pub(super) fn revoke(
        &mut self,
        key: Key<Lease>,
        reason: RevokeReason,
        drain_ms: u32,
        untold: Option<SessionId>,
    ) -> bool {
        let deadline = self.now.saturating_add(drain_ms.into());
        let lease = &mut self.leases[key];
        let id = lease.id;
        match &mut lease.phase {
            Phase::Zombie(_) => return false,
            Phase::Draining(revocation) => {
                if deadline < revocation.deadline {
                    self.draining.remove(&(revocation.deadline, id));
                    self.draining.insert((deadline, id));
                    revocation.deadline = deadline;
                }
                return false;
            }
            Phase::Active => {}
        }
        let bytes = lease.bytes;
        self.begin_revocation(key, reason, deadline);
        self.counters.revocations += 1;
        self.out
            .push(Effect::Record(Record::Revoked { lease: id, reason }));
        self.note(Note::Revoked {
            lease: id,
            reason,
            bytes,
        });
        let lease = &self.leases[key];
        let generation = Generation(lease.generation);
        for party in lease.parties().collect::<Vec<_>>() {
            if Some(party) != untold {
                let message = Outgoing::Revoke {
                    lease: id,
                    generation,
                    reason,
                    drain_ms,
                };
                self.send(party, message);
            }
        }
        true
    }

    pub(super) fn begin_revocation(
        &mut self,
        key: Key<Lease>,
        reason: RevokeReason,
        deadline: u64,
    ) {
        self.forget_blocks(key);
        self.drop_pins_on(key);
        let lease = &mut self.leases[key];
        lease.phase = Phase::Draining(Revocation {
            reason,
            since: self.now,
            deadline,
        });
        self.draining.insert((deadline, lease.id));
        if lease.lessee_holds
            && let Some(lessee) = self.sessions.get_mut(&lease.lessee)
        {
            lessee.active_bytes -= lease.bytes;
            self.index.namespace_mut(lease.namespace).active_bytes -= lease.bytes;
        }
        let (region, slab) = (lease.region, lease.slab);
        self.edit_region(region, |region| region.put(slab, Place::Draining));
    }

    /// The lessee lets go; readers, if any, are asked to do the same.
    pub(super) fn lessee_lets_go(&mut self, key: Key<Lease>, reason: RevokeReason) {
        let (lessee, drain_ms) = (self.leases[key].lessee, self.config.default_drain_ms);
        let lease = &self.leases[key];
        if lease.phase == Phase::Active && !lease.readers.is_empty() {
            self.revoke(key, reason, drain_ms, Some(lessee));
        }
        self.let_go(key, lessee);
    }

    /// A lessee or reader can touch the slab no more. Once nobody can, the lease is over.
    pub(super) fn let_go(&mut self, key: Key<Lease>, session: SessionId) {
        if !self.drop_party(key, session) {
            return;
        }
        self.out.push(Effect::Record(Record::LetGo {
            lease: self.leases[key].id,
            session,
        }));
        if self.leases[key].parties().next().is_none() {
            self.end_lease(key);
        }
    }

    /// Strikes a session from those who may touch the slab; says whether it was one of them.
    pub(super) fn drop_party(&mut self, key: Key<Lease>, id: SessionId) -> bool {
        let lease = &mut self.leases[key];
        let session = self.sessions.get_mut(&id);
        if lease.lessee == id && lease.lessee_holds {
            lease.lessee_holds = false;
            if let Some(session) = session {
                session.leases.remove(&lease.id);
                session.held_bytes -= lease.bytes;
                if lease.phase == Phase::Active {
                    session.active_bytes -= lease.bytes;
                    self.index.namespace_mut(lease.namespace).active_bytes -= lease.bytes;
                }
            }
            true
        } else if lease.readers.remove(&id) {
            if let Some(session) = session {
                session.reads.remove(&lease.id);
            }
            true
        } else {
            false
        }
    }

    fn end_lease(&mut self, key: Key<Lease>) {
        let lease = &self.leases[key];
        let after_ms = lease
            .revocation()
            .map(|revocation| self.now - revocation.since);
        let (id, region) = (lease.id, lease.region);
        self.free_slab(key);
        self.note(Note::LeaseEnded {
            lease: id,
            after_ms,
        });
        let region_is_over = self.regions[region].withdrawing && self.regions[region].leases == 0;
        if region_is_over {
            self.return_region(region);
        }
    }

    /// Forgets a lease that nobody holds: its slab is free, and remembers whose bytes are in it.
    pub(super) fn free_slab(&mut self, key: Key<Lease>) {
        self.forget_blocks(key);
        self.drop_pins_on(key);
        let lease = self.leases.remove(key);
        self.lease_ids.remove(&lease.id);
        if let Some(revocation) = lease.revocation() {
            self.draining.remove(&(revocation.deadline, lease.id));
        }
        let tenant = self.index.namespace(lease.namespace).tenant.clone();
        self.index.discharge(lease.namespace, lease.bytes);
        self.edit_region(lease.region, |region| {
            let slab = &mut region.slabs[lease.slab as usize];
            slab.lease = None;
            slab.dirt = Some(tenant);
            region.leases -= 1;
            region.put(lease.slab, Place::Free);
        });
    }

    /// Leases whose drain window has closed become zombies: still held, and never counted as free.
    pub(super) fn close_drain_windows(&mut self) {
        while let Some((deadline, id)) = self.draining.first().copied() {
            if deadline > self.now {
                return;
            }
            self.draining.pop_first();
            let key = self.lease_ids[&id];
            let lease = &mut self.leases[key];
            let Phase::Draining(revocation) = lease.phase else {
                continue;
            };
            lease.phase = Phase::Zombie(revocation);
            let (bytes, region, slab) = (lease.bytes, lease.region, lease.slab);
            self.edit_region(region, |region| region.put(slab, Place::Zombie));
            self.counters.zombies += 1;
            let pids = self.pids_of(key);
            self.note(Note::Zombie {
                lease: id,
                bytes,
                pids,
            });
        }
    }
}
