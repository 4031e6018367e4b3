//! The oracle on leases that are held and the blocks in them.

use super::{
    allowed::link,
    fixture::SLAB,
    oracle::{Answer, No, OLease, Oracle},
};
use crate::core::{Caller, Grant, Outgoing, Publish, Reply};
use swiftcache_proto::domain::{DeviceUuid, Generation, Handle, LeaseId, RegionId, RevokeReason};

impl Oracle {
    pub(super) fn release(
        &mut self,
        caller: Caller,
        ids: &[LeaseId],
        unmappable: bool,
        bequeath: bool,
    ) -> Answer {
        let session = self.session(caller)?.id;
        for id in ids {
            let lease = self.leases.iter().find(|lease| lease.id == *id);
            let mine = |lease: &OLease| lease.lessee == session || lease.holders.contains(&session);
            if lease.is_some_and(|lease| !mine(lease)) {
                return Err(No::NotYours);
            }
        }
        for id in ids {
            let known = self.leases.iter().find(|lease| lease.id == *id);
            let region = known.map(|lease| lease.region).filter(|_| unmappable);
            if let Some(region) = region.filter(|id| !self.unmappable.contains(&(session, *id))) {
                self.unmappable.push((session, region));
                self.tell_of_unmappable(region);
            }
            match self.leases.iter().find(|lease| lease.id == *id) {
                Some(lease) if lease.lessee == session => {
                    let left = bequeath && !unmappable && self.leave_to_heir(*id);
                    self.end_unless(left, *id);
                }
                Some(_) => self.let_go(*id, session),
                None => {}
            }
        }
        Ok(Some(Reply::Done))
    }

    fn end_unless(&mut self, left: bool, id: LeaseId) {
        if !left {
            self.lessee_lets_go(id, RevokeReason::Released);
        }
    }

    /// The donor hears how many cannot map its region.
    pub(super) fn tell_of_unmappable(&mut self, region: RegionId) {
        let mappers = self.unmappable.iter().filter(|(_, of)| *of == region);
        let sessions = mappers.count() as u32;
        let known = self.regions.iter().find(|known| known.id == region);
        if let (Some(donor), 1..) = (known.map(|known| known.donor), sessions) {
            self.say(donor, Outgoing::CannotMap { region, sessions });
        }
    }

    pub(super) fn share(&mut self, caller: Caller, id: LeaseId, device: &DeviceUuid) -> Answer {
        let session = self.session(caller)?;
        self.not_silent(session.id)?;
        let lease = self.leases.iter_mut().find(|lease| lease.id == id);
        let lease = lease.ok_or(No::Unknown)?;
        if lease.tenant != session.tenant {
            return Err(No::NotYours);
        }
        if lease.lessee == session.id {
            return Err(No::Invalid);
        }
        let region = self.regions.iter().find(|region| region.id == lease.region);
        let region = region.ok_or(No::Unknown)?;
        let link = link(device, &region.device).ok_or(No::Invalid)?;
        if lease.revoked.is_some() || !region.handle {
            return Err(No::Stale);
        }
        if !lease.holders.contains(&session.id) {
            lease.holders.push(session.id);
        }
        Ok(Some(Reply::Shared(Grant {
            lease: id,
            generation: Generation(lease.generation),
            region: region.id,
            slab: lease.slab,
            slab_bytes: SLAB,
            allocation: region.allocation,
            offset: region.offset + u64::from(lease.slab) * SLAB,
            device: region.device.clone(),
            handle: Handle::PosixFd,
            link,
            slots: lease.slots,
            block_bytes: SLAB / u64::from(lease.slots),
            map_bytes: region.offset + region.slabs.len() as u64 * SLAB,
        })))
    }

    /// The caller's own lease, of this generation and not revoked.
    pub(super) fn active(
        &self,
        caller: Caller,
        id: LeaseId,
        generation: Generation,
    ) -> Result<OLease, No> {
        self.session(caller)?;
        let lease = self.leases.iter().find(|lease| lease.id == id);
        let lease = lease.ok_or(No::Unknown)?;
        if lease.lessee != caller.session {
            return Err(No::NotYours);
        }
        if lease.generation != generation.0 || lease.revoked.is_some() {
            return Err(No::Stale);
        }
        Ok(lease.clone())
    }

    pub(super) fn publish(&mut self, publish: &Publish) -> Answer {
        let lease = self.active(publish.caller, publish.lease, publish.generation)?;
        if !lease.class.is_cache() {
            return Err(No::Invalid);
        }
        for (number, (hash, slot)) in publish.blocks.iter().enumerate() {
            let other = |(held, at): &(_, u32)| at == slot && held != hash;
            let again = publish.blocks[..number].iter().any(|(_, at)| at == slot);
            if *slot >= lease.slots || lease.blocks.iter().any(other) || again {
                return Err(No::Invalid);
            }
        }
        let mut duplicates = Vec::new();
        let publisher = self.publisher(&lease);
        for (number, (hash, slot)) in (0..).zip(&publish.blocks) {
            let holds = |other: &&OLease| other.blocks.iter().any(|(held, _)| held == hash);
            let again =
                |other: &&OLease| other.id == lease.id && other.blocks.contains(&(*hash, *slot));
            if self.leases.iter().any(|other| again(&other)) {
                continue;
            }
            let mut holders = self.leases.iter().filter(holds);
            if holders.any(|other| self.tier(&publisher, other).is_some()) {
                duplicates.push(number);
                continue;
            }
            for known in self.leases.iter_mut().filter(|known| known.id == lease.id) {
                known.blocks.push((*hash, *slot));
            }
        }
        Ok(Some(Reply::Published { duplicates }))
    }

    pub(super) fn unpublish(
        &mut self,
        caller: Caller,
        lease: LeaseId,
        generation: Generation,
        slots: &[u32],
    ) -> Answer {
        let lease = self.active(caller, lease, generation)?;
        if slots.iter().any(|slot| *slot >= lease.slots) {
            return Err(No::Invalid);
        }
        for known in &mut self.leases {
            if known.id == lease.id {
                known.blocks.retain(|(_, slot)| !slots.contains(slot));
            }
        }
        let mut pinned = Vec::new();
        let mut until = self.now;
        for slot in slots {
            let pins = self.pins.iter();
            let here = pins.filter(|pin| pin.lease == lease.id && pin.slot == *slot);
            let mut deadlines: Vec<_> = here.map(|pin| pin.deadline).collect();
            if lease.restored && self.now < self.grace_until {
                deadlines.push(self.grace_until);
            }
            if let Some(latest) = deadlines.into_iter().max() {
                until = until.max(latest);
                pinned.push(*slot);
            }
        }
        pinned.sort();
        pinned.dedup();
        let retry_ms = (until - self.now) as u32;
        Ok(Some(Reply::Unpublished { pinned, retry_ms }))
    }
}
