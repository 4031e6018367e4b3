//! The oracle's verdict on offers, leases and what the core chose.

use std::collections::BTreeMap;

use swiftcache_proto::domain::{
    DeviceUuid, Generation, LeaseClass, LeaseId, LinkKind, RegionId, RevokeReason, SessionId,
    Shortfall,
};

use super::{
    fixture::{SLAB, node},
    oracle::{Answer, No, OLease, ORegion, OSession, OSlab, Oracle},
};
use crate::core::{
    Caller, Effect, Grant, LeaseDemand, Note, Offer, Outgoing, Record, Reply, Withdraw,
    quotas::user_of,
};

pub(super) fn link(from: &DeviceUuid, to: &DeviceUuid) -> Option<LinkKind> {
    if from == to {
        return Some(LinkKind::SameDevice);
    }
    let links = node().links;
    let link = links
        .iter()
        .find(|link| link.from == *from && link.to == *to);
    // Without peer access there is no reach.
    link.map(|link| link.kind)
        .filter(|kind| *kind != LinkKind::Host)
}

pub(super) fn known_device(uuid: &DeviceUuid) -> Result<(), No> {
    match node().devices.iter().any(|device| device.uuid == *uuid) {
        true => Ok(()),
        false => Err(No::Unknown),
    }
}

impl Oracle {
    pub(super) fn offer(&mut self, offer: &Offer) -> Answer {
        self.session(offer.caller)?;
        known_device(&offer.device)?;
        let donor = offer.caller.session;
        if let Some(known) = self
            .regions
            .iter_mut()
            .find(|known| known.id == offer.region)
        {
            let same = known.donor == donor
                && known.device == offer.device
                && known.allocation == offer.allocation
                && known.offset == offer.offset
                && known.slabs.len() as u64 * SLAB == offer.bytes;
            if !same {
                return Err(No::Overlap);
            }
            if known.withdrawing {
                return Err(No::Stale);
            }
            known.handle = true;
            self.unmappable
                .retain(|(_, region)| *region != offer.region);
            return Ok(Some(Reply::Done));
        }
        if self.session(offer.caller)?.returned.contains(&offer.region) {
            return Err(No::Stale);
        }
        if offer.bytes == 0 {
            return Err(No::Invalid);
        }
        for known in &self.regions {
            if known.allocation == offer.allocation && known.donor != donor {
                return Err(No::NotYours);
            }
            if known.allocation == offer.allocation && known.device != offer.device {
                return Err(No::Invalid);
            }
        }
        for known in &self.regions {
            let end = known.offset + known.slabs.len() as u64 * SLAB;
            let apart = end <= offer.offset || offer.offset + offer.bytes <= known.offset;
            if known.allocation == offer.allocation && !apart {
                return Err(No::Overlap);
            }
        }
        let followed = |known: &ORegion| {
            known.elastic
                && !known.withdrawing
                && known.device == offer.device
                && known.donor != donor
        };
        if offer.elastic && self.regions.iter().any(followed) {
            return Err(No::Followed);
        }
        for session in &mut self.sessions {
            session
                .returned
                .retain(|returned| *returned != offer.region);
        }
        let slab = OSlab {
            generation: 0,
            dirt: None,
            scrubbing: false,
        };
        self.regions.push(ORegion {
            id: offer.region,
            donor,
            device: offer.device.clone(),
            allocation: offer.allocation,
            offset: offer.offset,
            shared: offer.shared,
            elastic: offer.elastic,
            handle: true,
            withdrawing: false,
            drained: false,
            slabs: vec![slab; (offer.bytes / SLAB) as usize],
        });
        Ok(Some(Reply::Done))
    }

    pub(super) fn withdraw(&mut self, caller: Caller, ids: &[RegionId], drain_ms: u32) -> Answer {
        let session = self.session(caller)?;
        let mut chosen = Vec::new();
        for id in ids {
            match self.regions.iter().find(|region| region.id == *id) {
                Some(region) if region.donor == session.id => chosen.push(region.clone()),
                Some(_) => return Err(No::NotYours),
                None if session.returned.contains(id) => {}
                None => return Err(No::Unknown),
            }
        }
        let regions = chosen.iter().map(|region| region.id).collect();
        let bytes = chosen
            .iter()
            .map(|region| region.slabs.len() as u64 * SLAB)
            .sum();
        for region in chosen {
            self.withdraw_region(region.id, RevokeReason::Withdrawn, drain_ms);
        }
        Ok(Some(Reply::Withdrawing { regions, bytes }))
    }

    /// Which regions go is the core's choice: unlent ones before others, and no more than needed.
    pub(super) fn withdraw_bytes(
        &mut self,
        withdraw: &Withdraw,
        device: &DeviceUuid,
        bytes: u64,
        effects: &[Effect],
    ) -> Result<Answer, String> {
        let session = match self.session(withdraw.caller) {
            Ok(session) => session.id,
            Err(no) => return Ok(Err(no)),
        };
        if let Err(no) = known_device(device) {
            return Ok(Err(no));
        }
        if bytes == 0 {
            return Ok(Err(No::Invalid));
        }
        let chosen = effects.iter().find_map(|effect| match effect {
            Effect::Reply(Reply::Withdrawing { regions, .. }) => Some(regions.clone()),
            _ => None,
        });
        let chosen = chosen.unwrap_or_default();
        let lent = |region: &ORegion| {
            let of = |lease: &OLease| lease.region == region.id && lease.estate.is_none();
            self.leases.iter().any(of)
        };
        let kept = |region: &ORegion| self.leases.iter().any(|lease| lease.region == region.id);
        let able: Vec<_> = self
            .regions
            .iter()
            .filter(|region| region.donor == session && region.device == *device)
            .filter(|region| !region.withdrawing)
            .collect();
        let taken: Vec<_> = chosen
            .iter()
            .map(|id| able.iter().find(|region| region.id == *id))
            .collect::<Option<_>>()
            .ok_or_else(|| format!("withdrew {chosen:?}, not all of which it can"))?;
        let size = |region: &&&ORegion| region.slabs.len() as u64 * SLAB;
        let sum: u64 = taken.iter().map(size).sum();
        let all = taken.len() == able.len();
        let enough = sum >= bytes && taken.last().is_some_and(|last| sum - size(last) < bytes);
        let working = |region: &ORegion| {
            let active = |lease: &&OLease| lease.region == region.id && lease.revoked.is_none();
            let sets = |lease: &OLease| lease.class == LeaseClass::WorkingSet;
            self.leases.iter().filter(active).any(sets)
        };
        // None of a dearer kind goes while one of a cheaper kind stays.
        let dearer = |dear: &dyn Fn(&ORegion) -> bool| {
            let kept = (able.iter()).any(|region| !dear(region) && !chosen.contains(&region.id));
            kept && taken.iter().any(|region| dear(region))
        };
        if !(all && sum <= bytes || enough) || dearer(&lent) || dearer(&working) || dearer(&kept) {
            return Err(format!("withdrew {chosen:?} for {bytes} bytes"));
        }
        Ok(self.withdraw(withdraw.caller, &chosen, withdraw.drain_ms))
    }

    pub(super) fn lendable(&self, region: &ORegion) -> bool {
        let donor = self
            .sessions
            .iter()
            .find(|session| session.id == region.donor);
        region.handle
            && !region.withdrawing
            && !region.drained
            && !self.drained_devices.contains(&region.device)
            && !self.drained_donors.contains(&region.donor.label())
            && donor.is_some_and(|donor| !donor.over)
    }

    /// A session that reads what was revoked gets nothing more, once its window is over or no pin can last any more.
    pub(super) fn not_silent(&self, id: SessionId) -> Result<(), No> {
        let overdue = |lease: &OLease| {
            let pinned_until = lease.revoked_at + u64::from(self.config.pin_ms);
            let ends = lease.revoked.map(|(_, until)| until.min(pinned_until));
            lease.lessee != id
                && lease.holders.contains(&id)
                && ends.is_some_and(|ends| self.now >= ends)
        };
        match self.leases.iter().any(overdue) {
            true => Err(No::Stale),
            false => Ok(()),
        }
    }

    /// Whether nobody of another tenant has, or has left anything in, a slab of the same allocation; or may.
    fn open_to(&self, region: &ORegion, tenant: &str) -> bool {
        let same = |other: &&ORegion| other.allocation == region.allocation;
        let of = |id: RegionId, number: u32, slab: &OSlab| {
            let here = |lease: &&OLease| lease.region == id && lease.slab == number;
            let lease = self.leases.iter().find(here);
            lease.map_or(slab.dirt.clone(), |lease| Some(lease.tenant.clone()))
        };
        self.regions.iter().filter(same).all(|other| {
            let mut slabs = (0..).zip(&other.slabs);
            other.shared
                || slabs
                    .all(|(number, slab)| of(other.id, number, slab).is_none_or(|of| of == tenant))
        })
    }

    /// The slabs that this demand could be granted as they are, with the links they are reached by.
    pub(super) fn usable(
        &self,
        demand: &LeaseDemand,
        tenant: &str,
    ) -> Vec<(RegionId, u32, LinkKind)> {
        let mut usable = Vec::new();
        let asker = demand.caller.session;
        let others = |region: &&ORegion| {
            region.donor != asker
                && !self.unmappable.contains(&(asker, region.id))
                && self.open_to(region, tenant)
        };
        for region in (self.regions.iter()).filter(|region| others(region) && self.lendable(region))
        {
            let Some(link) = link(&demand.device, &region.device) else {
                continue;
            };
            for (number, slab) in (0..).zip(&region.slabs) {
                let here = |lease: &OLease| lease.region == region.id && lease.slab == number;
                let clean = slab.dirt.as_ref().is_none_or(|dirt| dirt == tenant);
                let free = !slab.scrubbing && !self.leases.iter().any(here);
                if free && clean && SLAB >= demand.block_bytes {
                    usable.push((region.id, number, link));
                }
            }
        }
        usable
    }

    /// Which slabs are granted, scrubbed or asked back is the core's choice.
    pub(super) fn lease(
        &mut self,
        demand: &LeaseDemand,
        effects: &[Effect],
    ) -> Result<Answer, String> {
        let session = match self.session(demand.caller) {
            Ok(session) => session,
            Err(no) => return Ok(Err(no)),
        };
        if let Err(no) = self
            .not_silent(session.id)
            .and(known_device(&demand.device))
        {
            return Ok(Err(no));
        }
        if demand.bytes == 0 {
            return Ok(Err(No::Invalid));
        }
        let reply = effects.iter().find_map(|effect| match effect {
            Effect::Reply(Reply::Leased { grants, shortfall }) => {
                Some((grants.clone(), *shortfall))
            }
            _ => None,
        });
        let (grants, shortfall) = reply.ok_or("a lease demand was not answered")?;
        // Slabs are granted, and estates given up, in turn.
        for effect in effects {
            match effect {
                Effect::Record(Record::Lease { lease, .. }) => {
                    let grant = grants.iter().find(|grant| grant.lease == *lease);
                    let grant = grant.ok_or("a lease is recorded and not granted")?;
                    self.granted(demand, &session.tenant, grant)?;
                }
                Effect::Note(Note::Revoked { lease, reason, .. })
                    if *reason == RevokeReason::LesseeGone =>
                {
                    self.given_up(*lease, demand, &session.tenant)?;
                }
                _ => {}
            }
        }
        let given_up = self.leases.iter().filter(|lease| lease.estate.is_some());
        let others_first = given_up.cloned().collect::<Vec<_>>();
        let granted = grants.len() as u64 * SLAB;
        if granted >= demand.bytes + SLAB {
            return Err(format!("granted {granted} bytes for {}", demand.bytes));
        }
        let left = self.usable(demand, &session.tenant);
        let waiting = self.short.iter().any(|(other, _)| *other != session.id);
        let told_right = match shortfall {
            Shortfall::None => granted >= demand.bytes,
            Shortfall::Fairness => !left.is_empty() && waiting,
            Shortfall::BlockTooLarge => demand.block_bytes > SLAB,
            Shortfall::NoFreeSlab | Shortfall::Scrubbing => left.is_empty(),
            Shortfall::Quota => false,
        };
        if !told_right || (shortfall == Shortfall::None) != (granted >= demand.bytes) {
            return Err(format!("{shortfall:?} with {left:?} left of {demand:?}"));
        }
        self.short.retain(|(other, _)| *other != session.id);
        if !matches!(shortfall, Shortfall::None | Shortfall::BlockTooLarge) {
            let until = self.now + u64::from(self.config.wait_ms);
            self.short.push((session.id, until));
        }
        let mut scrubs = 0;
        for effect in effects {
            match effect {
                Effect::Record(Record::Scrubbing { region, slab }) => {
                    scrubs += 1;
                    self.scrubbing(*region, *slab, &session.tenant)?;
                }
                Effect::Note(Note::Revoked { lease, reason, .. })
                    if *reason != RevokeReason::LesseeGone =>
                {
                    let mut stays = others_first.iter();
                    if let Some(estate) = stays.find(|it| self.could_go(it, demand, &session)) {
                        return Err(format!("{estate:?} stays and {lease} is asked back"));
                    }
                    let revoked = grants.len() + scrubs;
                    self.asked_back(*lease, *reason, (&session, &demand.namespace), revoked)?;
                }
                _ => {}
            }
        }
        Ok(Ok(Some(Reply::Leased { grants, shortfall })))
    }

    fn granted(&mut self, demand: &LeaseDemand, tenant: &str, grant: &Grant) -> Result<(), String> {
        let usable = self.usable(demand, tenant);
        let at = (grant.region, grant.slab, grant.link);
        if !usable.contains(&at) || usable.iter().any(|(.., link)| *link < grant.link) {
            return Err(format!("granted {at:?} of {usable:?}"));
        }
        let region = self
            .regions
            .iter_mut()
            .find(|region| region.id == grant.region);
        let region = region.ok_or("granted of no region")?;
        let slab = &mut region.slabs[grant.slab as usize];
        slab.generation += 1;
        let right = grant.generation == Generation(slab.generation)
            && grant.lease.0 > self.last_lease
            && grant.offset == region.offset + u64::from(grant.slab) * SLAB
            && grant.allocation == region.allocation
            && grant.device == region.device
            && u64::from(grant.slots) == SLAB / demand.block_bytes;
        if !right {
            return Err(format!("{grant:?} of {region:?}"));
        }
        self.last_lease = grant.lease.0;
        self.leases.push(OLease {
            id: grant.lease,
            region: grant.region,
            slab: grant.slab,
            generation: grant.generation.0,
            lessee: demand.caller.session,
            tenant: tenant.to_owned(),
            namespace: demand.namespace.clone(),
            device: demand.device.clone(),
            class: demand.class,
            slots: grant.slots,
            holders: vec![demand.caller.session],
            revoked: None,
            revoked_at: 0,
            zombie: false,
            blocks: Vec::new(),
            restored: false,
            estate: None,
        });
        Ok(())
    }

    /// A free slab that another tenant used is zeroed, by a donor that can be told.
    fn scrubbing(&mut self, id: RegionId, slab: u32, tenant: &str) -> Result<(), String> {
        let region = self.regions.iter().find(|region| region.id == id).cloned();
        let region = region.ok_or("zeroes no region")?;
        let leased = |lease: &OLease| lease.region == id && lease.slab == slab;
        let state = &region.slabs[slab as usize];
        let donor = self
            .sessions
            .iter()
            .find(|session| session.id == region.donor);
        let right = self.lendable(&region)
            && !self.leases.iter().any(leased)
            && !state.scrubbing
            && state.dirt.as_ref().is_some_and(|dirt| dirt != tenant)
            && donor.is_some_and(|donor| donor.attached);
        if !right {
            return Err(format!("zeroes slab {slab} of {region:?}"));
        }
        let generation = Generation(state.generation);
        for known in self.regions.iter_mut().filter(|region| region.id == id) {
            known.slabs[slab as usize].scrubbing = true;
        }
        self.say(
            region.donor,
            Outgoing::Scrub {
                region: id,
                slab,
                generation,
            },
        );
        Ok(())
    }

    /// A slab is asked back for `asker`: within a namespace the giver then still holds no less, and above it no less
    /// for its weight, or the asker's side has nothing at all.
    fn asked_back(
        &mut self,
        id: LeaseId,
        reason: RevokeReason,
        (asker, namespace): (&OSession, &str),
        others: usize,
    ) -> Result<(), String> {
        let lease = self.leases.iter().find(|lease| lease.id == id).cloned();
        let lease = lease.ok_or("revokes no lease")?;
        let active = |counts: &dyn Fn(&OLease) -> bool| {
            let held = |lease: &&OLease| {
                lease.revoked.is_none() && lease.holders.contains(&lease.lessee) && counts(lease)
            };
            self.leases.iter().filter(held).count() as u64
        };
        let weight = |of: &BTreeMap<String, u32>, name: &str| {
            of.get(name).map_or(1, |weight| u64::from(*weight))
        };
        // Two sides share at the level where they part: by user, by tenant of one user, by namespace of one tenant.
        let tenants = (lease.tenant.as_str(), asker.tenant.as_str());
        let users = (user_of(tenants.0), user_of(tenants.1));
        let fair_between = |of: &dyn Fn(&OLease, &str, &str) -> bool, weights: (u64, u64)| {
            let theirs = active(&|held| of(held, tenants.0, &lease.namespace));
            let ours = active(&|held| of(held, tenants.1, namespace));
            let ahead = (theirs - 1) * weights.1;
            ahead >= (ours + 1) * weights.0 || ours == 0 && theirs > 1
        };
        let config = &self.config;
        let fair = if users.0 != users.1 {
            let by = &config.tenant_weights;
            fair_between(
                &|held, tenant, _| user_of(&held.tenant) == user_of(tenant),
                (weight(by, users.0), weight(by, users.1)),
            )
        } else if tenants.0 != tenants.1 {
            // A user's own tenant, without a label, has the user's weight among users only.
            let of = |tenant: &str| match tenant.contains('/') {
                true => weight(&config.tenant_weights, tenant),
                false => 1,
            };
            fair_between(
                &|held, tenant, _| held.tenant == tenant,
                (of(tenants.0), of(tenants.1)),
            )
        } else if lease.namespace != namespace {
            let by = &config.namespace_weights;
            fair_between(
                &|held, tenant, name| held.tenant == tenant && held.namespace == name,
                (weight(by, &lease.namespace), weight(by, namespace)),
            )
        } else {
            let of = |session| active(&|lease: &OLease| lease.lessee == session);
            of(lease.lessee) > of(asker.id)
        };
        let stays = lease.class == LeaseClass::WorkingSet;
        if reason != RevokeReason::Fairness || lease.lessee == asker.id || !fair || stays {
            return Err(format!(
                "revokes {lease:?} for {asker:?} after {others} others"
            ));
        }
        let drain_ms = self.config.default_drain_ms;
        self.revoke(id, reason, drain_ms, None);
        Ok(())
    }
}
