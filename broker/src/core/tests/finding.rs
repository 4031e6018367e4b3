//! The oracle on what is found: a block is there for whoever can read it, and for nobody else.

use super::{
    allowed::{known_device, link},
    fixture::SLAB,
    oracle::{Answer, No, OBorrower, OLease, OPin, Oracle},
};
use crate::core::{Effect, Keep, Lookup, Reply};
use swiftcache_proto::domain::{
    BlockHash, DeviceUuid, FoundRun, Hold, LeaseId, LinkKind, PinId, SessionId,
};

/// On whose behalf somebody looks.
pub(super) struct Asker {
    session: SessionId,
    tenant: String,
    namespace: String,
    /// `None`: it did not say.
    device: Option<DeviceUuid>,
    shares: bool,
    block_bytes: Option<u64>,
    kept: Vec<BlockHash>,
    /// Devices whose memory it cannot copy from now.
    down: Vec<DeviceUuid>,
}

/// Where a block was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Slot(LeaseId, u32),
    Kept,
}

impl OBorrower {
    fn asker(&self, tenant: &str) -> Asker {
        Asker {
            session: self.session,
            tenant: tenant.to_owned(),
            namespace: self.said.namespace.clone(),
            device: Some(self.said.device.clone()),
            shares: self.said.shares,
            block_bytes: Some(self.said.block_bytes),
            kept: match self.said.host_down {
                true => Vec::new(),
                false => self.kept.clone(),
            },
            down: self.said.down.clone(),
        }
    }
}

impl Oracle {
    pub(super) fn keep(&mut self, keep: &Keep) -> Answer {
        let session = self.session(keep.caller)?.id;
        let known = |borrower: &OBorrower| borrower.said.borrower == keep.borrower;
        let before = self
            .borrowers
            .iter()
            .find(|borrower| known(borrower))
            .cloned();
        if before
            .as_ref()
            .is_some_and(|before| before.session != session)
        {
            return Err(No::NotYours);
        }
        self.borrowers.retain(|borrower| !known(borrower));
        if keep.closed {
            return Ok(Some(Reply::Done));
        }
        let nature = |said: &Keep| {
            // Devices that the node lacks are all the same.
            let device = known_device(&said.device)
                .is_ok()
                .then(|| said.device.clone());
            (said.namespace.clone(), device, said.block_bytes)
        };
        let same = before.filter(|before| nature(&before.said) == nature(keep) && !keep.anew);
        let mut kept = same.map_or_else(Vec::new, |before| before.kept);
        kept.retain(|hash| !keep.dropped.contains(hash));
        kept.extend(&keep.kept);
        self.borrowers.push(OBorrower {
            session,
            said: keep.clone(),
            kept,
        });
        Ok(Some(Reply::Done))
    }

    /// On whose behalf the lessee of a lease publishes.
    pub(super) fn publisher(&self, lease: &OLease) -> Asker {
        let mut its: Vec<_> = (self.borrowers.iter())
            .filter(|borrower| {
                borrower.session == lease.lessee && borrower.said.namespace == lease.namespace
            })
            .collect();
        its.sort_by_key(|borrower| borrower.said.borrower);
        Asker {
            session: lease.lessee,
            tenant: lease.tenant.clone(),
            namespace: lease.namespace.clone(),
            device: Some(lease.device.clone()),
            shares: its.first().is_none_or(|borrower| borrower.said.shares),
            block_bytes: Some(SLAB / u64::from(lease.slots)),
            kept: Vec::new(),
            down: Vec::new(),
        }
    }

    /// Whose lease it is to the asker, and over which link it reads it, if it can.
    pub(super) fn tier(&self, asker: &Asker, lease: &OLease) -> Option<(Hold, LinkKind)> {
        let region = self
            .regions
            .iter()
            .find(|region| region.id == lease.region)?;
        if (&asker.tenant, &asker.namespace) != (&lease.tenant, &lease.namespace) {
            return None;
        }
        if asker.down.contains(&region.device) {
            return None;
        }
        let link = match &asker.device {
            None => LinkKind::Host,
            Some(device) => link(device, &region.device)?,
        };
        if asker
            .block_bytes
            .is_some_and(|bytes| bytes != SLAB / u64::from(lease.slots))
        {
            return None;
        }
        if lease.lessee == asker.session {
            return Some((Hold::Own, link));
        }
        let reads = lease.holders.contains(&asker.session);
        let maps = !self.unmappable.contains(&(asker.session, region.id));
        let opens = maps && region.handle && region.donor != asker.session;
        // Who says nothing is told everything but what it cannot map.
        let told = reads || opens || asker.device.is_none() && maps;
        (asker.shares && told).then_some((Hold::Shared, link))
    }

    fn asker(&self, lookup: &Lookup) -> Result<Option<Asker>, No> {
        let session = self.session(lookup.caller)?;
        if let Some(device) = &lookup.device {
            known_device(device)?;
        }
        let tenant = |id: SessionId| {
            let of = self.sessions.iter().find(|session| session.id == id);
            of.map(|session| session.tenant.clone())
        };
        let named = self.borrowers.iter().find(|borrower| {
            Some(borrower.said.borrower) == lookup.borrower
                && borrower.said.namespace == lookup.namespace
                && tenant(borrower.session).as_ref() == Some(&session.tenant)
        });
        if let Some(borrower) = named {
            return Ok(Some(borrower.asker(&session.tenant)));
        }
        let asks = lookup.borrower.is_none() || lookup.device.is_some();
        Ok(asks.then(|| Asker {
            session: session.id,
            tenant: session.tenant,
            namespace: lookup.namespace.clone(),
            device: lookup.device.clone(),
            shares: true,
            block_bytes: None,
            kept: Vec::new(),
            down: Vec::new(),
        }))
    }

    /// In which of the best places a block is found is the core's choice.
    pub(super) fn lookup(&mut self, lookup: &Lookup, effects: &[Effect]) -> Result<Answer, String> {
        let asker = match self.asker(lookup) {
            Ok(asker) => asker,
            Err(no) => return Ok(Err(no)),
        };
        let found = effects.iter().find_map(|effect| match effect {
            Effect::Reply(Reply::Found { runs, pin, .. }) => Some((runs.clone(), *pin)),
            _ => None,
        });
        let (runs, pin) = found.ok_or("a lookup was not answered")?;
        let found = self.places_of(&runs)?;
        let mut expected = 0;
        for (number, hash) in lookup.hashes.iter().enumerate() {
            let best = asker.as_ref().and_then(|asker| self.best(asker, hash));
            let Some(best) = best else { break };
            expected += 1;
            let Some((hold, at)) = found.get(number) else {
                return Err(format!("block {number} of {lookup:?} is not found"));
            };
            let asker = asker.as_ref().ok_or("found for nobody")?;
            let right = match at {
                At::Kept => *hold == Hold::Own && asker.kept.contains(hash),
                At::Slot(lease, slot) => self.leases.iter().any(|known| {
                    known.id == *lease
                        && known.blocks.contains(&(*hash, *slot))
                        && self.tier(asker, known).map(|(hold, _)| hold) == Some(*hold)
                }),
            };
            let rank = self.rank(asker, *at);
            if !right || rank != Some(best) {
                return Err(format!(
                    "{hash} is found in {at:?}, {hold:?}, which is not the best place"
                ));
            }
        }
        if found.len() != expected {
            return Err(format!(
                "{} blocks of {lookup:?} are found, not {expected}",
                found.len()
            ));
        }
        let pins = !found.is_empty() && !lookup.unpinned;
        if pins != pin.is_some() {
            return Err(format!("{lookup:?} has pin {pin:?}"));
        }
        let session = lookup.caller.session;
        let foreign = |at: &At| match at {
            At::Slot(lease, slot) => {
                let lease = self.leases.iter().find(|known| known.id == *lease)?;
                (lease.lessee != session).then_some((lease.id, *slot))
            }
            At::Kept => None,
        };
        let pinned: Vec<_> = found.iter().filter_map(|(_, at)| foreign(at)).collect();
        for (lease, slot) in pinned.into_iter().filter(|_| pins) {
            self.pins.push(OPin {
                id: pin.unwrap_or(PinId(0)),
                session,
                lease,
                slot,
                deadline: self.now + u64::from(self.config.pin_ms),
            });
        }
        Ok(Ok(Some(Reply::Found {
            runs,
            pin,
            coming: 0,
            coming_ms: 0,
        })))
    }

    /// Each found block's place, and whose it is said to be. No run could be longer.
    fn places_of(&self, runs: &[FoundRun]) -> Result<Vec<(Hold, At)>, String> {
        let mut places = Vec::new();
        for pair in runs.windows(2) {
            let continues = match pair {
                [
                    FoundRun::Leased { extent, .. },
                    FoundRun::Leased { extent: next, .. },
                ] => {
                    extent.lease == next.lease
                        && extent.first_slot + extent.count == next.first_slot
                }
                [FoundRun::Kept { .. }, FoundRun::Kept { .. }] => true,
                _ => false,
            };
            if continues {
                return Err(format!("{runs:?} are cut short"));
            }
        }
        for run in runs {
            match run {
                FoundRun::Kept { count } => {
                    places.extend((0..*count).map(|_| (Hold::Own, At::Kept)));
                }
                FoundRun::Leased { extent, hold, .. } => {
                    let lease = self.leases.iter().find(|lease| lease.id == extent.lease);
                    if lease.is_none_or(|lease| lease.generation != extent.generation.0) {
                        return Err(format!("found in {extent:?}, which is no lease"));
                    }
                    let slots = extent.first_slot..extent.first_slot + extent.count;
                    places.extend(slots.map(|slot| (*hold, At::Slot(extent.lease, slot))));
                }
            }
        }
        Ok(places)
    }

    /// Own leases first, then own host memory, then others' leases by their links.
    fn rank(&self, asker: &Asker, at: At) -> Option<(u8, LinkKind)> {
        match at {
            At::Kept => Some((1, LinkKind::Host)),
            At::Slot(lease, _) => {
                let lease = self.leases.iter().find(|known| known.id == lease)?;
                self.tier(asker, lease).map(|(hold, link)| match hold {
                    Hold::Own => (0, LinkKind::SameDevice),
                    Hold::Shared => (2, link),
                })
            }
        }
    }

    fn best(&self, asker: &Asker, hash: &BlockHash) -> Option<(u8, LinkKind)> {
        let kept = asker.kept.contains(hash).then_some(At::Kept);
        let leased = self.leases.iter().flat_map(|lease| {
            let here = lease.blocks.iter().filter(|(held, _)| held == hash);
            here.map(|(_, slot)| At::Slot(lease.id, *slot))
        });
        let places = kept.into_iter().chain(leased);
        places.filter_map(|at| self.rank(asker, at)).min()
    }
}
