//! The oracle on sessions and on letting go.

use super::oracle::{Answer, No, OSession, Oracle};
use crate::core::{Caller, Connection, Outgoing, Process, Register, Reply};
use swiftcache_proto::domain::{Generation, LeaseId, RegionId, RevokeReason, SessionId};

impl Oracle {
    pub(super) fn revoke(
        &mut self,
        id: LeaseId,
        reason: RevokeReason,
        drain_ms: u32,
        untold: Option<SessionId>,
    ) -> bool {
        let until = self.now + u64::from(drain_ms);
        let Some(lease) = self.leases.iter_mut().find(|lease| lease.id == id) else {
            return false;
        };
        if let Some((_, deadline)) = &mut lease.revoked {
            if !lease.zombie {
                *deadline = until.min(*deadline);
            }
            return false;
        }
        lease.revoked = Some((reason, until));
        lease.revoked_at = self.now;
        lease.blocks.clear();
        lease.estate = None;
        let (generation, holders) = (Generation(lease.generation), lease.holders.clone());
        self.pins.retain(|pin| pin.lease != id);
        if holders.is_empty() {
            self.forget(id);
            return true;
        }
        for holder in holders.into_iter().filter(|holder| Some(*holder) != untold) {
            let message = Outgoing::Revoke {
                lease: id,
                generation,
                reason,
                drain_ms,
            };
            self.say(holder, message);
        }
        true
    }

    pub(super) fn let_go(&mut self, id: LeaseId, session: SessionId) {
        let Some(lease) = self.leases.iter_mut().find(|lease| lease.id == id) else {
            return;
        };
        lease.holders.retain(|holder| *holder != session);
        if lease.holders.is_empty() && lease.estate.is_none() {
            self.forget(id);
        }
    }

    /// Nobody touches the slab of a lease any more, and it is kept for nobody.
    pub(super) fn forget(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.iter().find(|lease| lease.id == id).cloned() else {
            return;
        };
        self.leases.retain(|other| other.id != id);
        self.pins.retain(|pin| pin.lease != id);
        for region in &mut self.regions {
            if region.id == lease.region {
                region.slabs[lease.slab as usize].dirt = Some(lease.tenant.clone());
            }
        }
        self.return_if_over(lease.region);
    }

    pub(super) fn lessee_lets_go(&mut self, id: LeaseId, reason: RevokeReason) {
        let Some(lease) = self.leases.iter().find(|lease| lease.id == id).cloned() else {
            return;
        };
        let readers = lease.holders.iter().any(|holder| *holder != lease.lessee);
        if readers && lease.revoked.is_none() {
            self.revoke(id, reason, self.config.default_drain_ms, Some(lease.lessee));
        }
        self.let_go(id, lease.lessee);
    }

    pub(super) fn return_if_over(&mut self, id: RegionId) {
        let Some(region) = self.regions.iter().find(|region| region.id == id).cloned() else {
            return;
        };
        if !region.withdrawing || self.leases.iter().any(|lease| lease.region == id) {
            return;
        }
        self.say(region.donor, Outgoing::Returned(id));
        self.regions.retain(|region| region.id != id);
        self.unmappable.retain(|(_, region)| *region != id);
        for session in &mut self.sessions {
            if session.id == region.donor {
                session.returned.push(id);
            }
        }
        self.forget_the_dead();
    }

    pub(super) fn forget_the_dead(&mut self) {
        let regions = &self.regions;
        self.sessions
            .retain(|session| !session.over || regions.iter().any(|r| r.donor == session.id));
    }

    pub(super) fn withdraw_region(&mut self, id: RegionId, reason: RevokeReason, drain_ms: u32) {
        for region in &mut self.regions {
            if region.id == id {
                region.withdrawing = true;
                region
                    .slabs
                    .iter_mut()
                    .for_each(|slab| slab.scrubbing = false);
            }
        }
        for lease in self.leases.clone() {
            if lease.region == id {
                self.revoke(lease.id, reason, drain_ms, None);
            }
        }
        self.return_if_over(id);
    }

    pub(super) fn let_go_of_all(&mut self, id: SessionId, reason: RevokeReason) {
        self.pins.retain(|pin| pin.session != id);
        self.short.retain(|(session, _)| *session != id);
        self.borrowers.retain(|borrower| borrower.session != id);
        self.unmappable.retain(|(session, _)| *session != id);
        for lease in self.leases.clone() {
            if lease.lessee == id {
                let gone = reason == RevokeReason::LesseeGone;
                if !gone || !self.leave_to_heir(lease.id) {
                    self.lessee_lets_go(lease.id, reason);
                }
            } else if lease.holders.contains(&id) {
                self.let_go(lease.id, id);
            }
        }
    }

    pub(super) fn close(&mut self, id: SessionId, reason: RevokeReason) {
        for region in self.regions.clone() {
            if region.donor == id {
                self.withdraw_region(region.id, reason, self.config.default_drain_ms);
            }
        }
        for session in &mut self.sessions {
            session.over |= session.id == id;
        }
        let label = id.label();
        let live = |session: &OSession| !session.over && session.id.label() == label;
        if !self.sessions.iter().any(live) {
            self.drained_donors.retain(|drained| *drained != label);
        }
        self.forget_the_dead();
    }

    pub(super) fn process_gone(&mut self, process: Process) {
        let ids: Vec<_> = self
            .sessions
            .iter_mut()
            .filter(|session| session.process == process && !session.over)
            .map(|session| {
                session.attached = false;
                session.id
            })
            .collect();
        for id in &ids {
            self.let_go_of_all(*id, RevokeReason::LesseeGone);
        }
        for id in ids {
            self.close(id, RevokeReason::DonorGone);
        }
    }

    pub(super) fn register(&mut self, register: &Register) -> Answer {
        let Some(id) = register.resume else {
            self.sessions.push(OSession {
                id: register.fresh_id,
                process: register.process,
                tenant: register.tenant.clone(),
                attached: false,
                over: false,
                returned: Vec::new(),
            });
            return Ok(Some(Reply::Registered {
                session: register.fresh_id,
                refused: Vec::new(),
                regions: Vec::new(),
            }));
        };
        let process = register.process;
        self.session(Caller {
            session: id,
            process,
            connection: Connection::default(),
        })?;
        let of = |lessee: bool| {
            let held = self
                .leases
                .iter()
                .filter(move |lease| lease.holders.contains(&id) && (lease.lessee == id) == lessee);
            held.map(|lease| lease.id).collect::<Vec<_>>()
        };
        let (leases, reads) = (of(true), of(false));
        let no_leases = register.held.iter().filter(|id| !leases.contains(id));
        let no_reads = register.shared.iter().filter(|id| !reads.contains(id));
        let mut refused: Vec<_> = no_leases.chain(no_reads).copied().collect();
        refused.sort();
        refused.dedup();
        let mut regions: Vec<_> = self
            .regions
            .iter()
            .filter(|region| region.donor == id)
            .map(|region| region.id)
            .collect();
        regions.sort();
        for lease in reads {
            if !register.shared.contains(&lease) {
                self.let_go(lease, id);
            }
        }
        for lease in leases {
            if !register.held.contains(&lease) {
                self.lessee_lets_go(lease, RevokeReason::Released);
            }
        }
        Ok(Some(Reply::Registered {
            session: id,
            refused,
            regions,
        }))
    }

    pub(super) fn attach(&mut self, caller: Caller) -> Answer {
        let session = self.session(caller)?;
        let id = session.id;
        for session in &mut self.sessions {
            session.attached |= session.id == id;
        }
        for region in session.returned {
            self.say(id, Outgoing::Returned(region));
        }
        for lease in self.leases.clone() {
            if let (Some((reason, until)), true) = (lease.revoked, lease.holders.contains(&id)) {
                let message = Outgoing::Revoke {
                    lease: lease.id,
                    generation: Generation(lease.generation),
                    reason,
                    drain_ms: until.saturating_sub(self.now) as u32,
                };
                self.say(id, message);
            }
        }
        for region in self.regions.clone() {
            if region.donor == id {
                self.tell_of_unmappable(region.id);
            }
            for (number, slab) in (0..).zip(&region.slabs) {
                if slab.scrubbing && region.donor == id {
                    let message = Outgoing::Scrub {
                        region: region.id,
                        slab: number,
                        generation: Generation(slab.generation),
                    };
                    self.say(id, message);
                }
            }
        }
        Ok(Some(Reply::Done))
    }

    pub(super) fn scrubbed(
        &mut self,
        caller: Caller,
        region: RegionId,
        slab: u32,
        generation: Generation,
    ) -> Answer {
        self.session(caller)?;
        let Some(region) = self.regions.iter_mut().find(|known| known.id == region) else {
            return Ok(None);
        };
        if region.donor != caller.session {
            return Err(No::NotYours);
        }
        if let Some(slab) = region.slabs.get_mut(slab as usize)
            && slab.scrubbing
            && slab.generation == generation.0
        {
            slab.scrubbing = false;
            slab.dirt = None;
        }
        Ok(None)
    }
}
