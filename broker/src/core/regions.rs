//! Regions: offering, withdrawing, giving back, and zeroing slabs between tenants.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::{
    convert::SLAB_BYTES,
    domain::{AllocationId, Handle, RegionId, SessionId},
};

use super::{
    Effect, Note, Offer, Record, Refusal, Reply,
    account::{Account, Place},
    arena::Key,
    devices::{Dirt, Rank},
    leases::Lease,
    state::State,
};

#[derive(Clone, Debug)]
pub(super) struct Slab {
    pub(super) lease: Option<Key<Lease>>,
    pub(super) place: Place,
    /// How many times it has been leased.
    pub(super) generation: u64,
    pub(super) dirt: Dirt,
}

#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) id: RegionId,
    /// The session that offered it; kept in `State::sessions` until the region is returned.
    pub(super) donor: SessionId,
    pub(super) device: usize,
    pub(super) allocation: AllocationId,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) slab_bytes: u64,
    /// `None` after a broker restart, until its donor offers it again.
    pub(super) handle: Option<Handle>,
    /// On its way back to its donor.
    pub(super) withdrawing: bool,
    /// An operator took it out of service.
    pub(super) drained: bool,
    pub(super) slabs: Vec<Slab>,
    /// The free slabs, by what they may still hold.
    pub(super) free: BTreeMap<Dirt, BTreeSet<u32>>,
    pub(super) account: Account,
    /// How many slabs have a lease.
    pub(super) leases: u32,
    /// Published blocks in all its slabs.
    pub(super) published: u64,
    /// When a lookup last found a block in it, milliseconds.
    pub(super) last_hit: u64,
    /// Its entry in the device's lending order, while it can be lent from.
    pub(super) listed: Option<Rank>,
    /// The sessions that said that they cannot map it.
    pub(super) unmappable_by: BTreeSet<SessionId>,
}

/// What is fixed for the life of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outline {
    pub(super) id: RegionId,
    pub(super) donor: SessionId,
    pub(super) device: usize,
    pub(super) allocation: AllocationId,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) slab_bytes: u64,
}

impl Region {
    /// A region of free slabs that were never leased, without its handle.
    pub(super) fn new(outline: Outline) -> Self {
        let count = (outline.bytes / outline.slab_bytes) as u32;
        let slab = Slab {
            lease: None,
            place: Place::Free,
            generation: 0,
            dirt: None,
        };
        Self {
            id: outline.id,
            donor: outline.donor,
            device: outline.device,
            allocation: outline.allocation,
            offset: outline.offset,
            bytes: outline.bytes,
            slab_bytes: outline.slab_bytes,
            handle: None,
            withdrawing: false,
            drained: false,
            slabs: vec![slab; count as usize],
            free: BTreeMap::from([(None, (0..count).collect())]),
            account: Account {
                offered: outline.bytes,
                free: outline.bytes,
                ..Account::default()
            },
            leases: 0,
            published: 0,
            last_hit: 0,
            listed: None,
            unmappable_by: BTreeSet::new(),
        }
    }

    pub(super) fn outline(&self) -> Outline {
        Outline {
            id: self.id,
            donor: self.donor,
            device: self.device,
            allocation: self.allocation,
            offset: self.offset,
            bytes: self.bytes,
            slab_bytes: self.slab_bytes,
        }
    }

    pub(super) fn rank(&self, key: Key<Region>) -> Rank {
        let whole = self.account.free == self.bytes;
        (whole, self.account.free / self.slab_bytes, self.id, key)
    }

    /// Moves a slab's bytes to another column of the account.
    pub(super) fn put(&mut self, number: u32, place: Place) {
        let slab = &mut self.slabs[number as usize];
        if slab.place == Place::Free
            && let Some(slabs) = self.free.get_mut(&slab.dirt)
        {
            slabs.remove(&number);
            if slabs.is_empty() {
                self.free.remove(&slab.dirt);
            }
        }
        *self.account.column(slab.place) -= self.slab_bytes;
        *self.account.column(place) += self.slab_bytes;
        slab.place = place;
        if place == Place::Free {
            self.free
                .entry(slab.dirt.clone())
                .or_default()
                .insert(number);
        }
    }

    /// Replaces what a slab may still hold, and its generation.
    pub(super) fn set_history(&mut self, number: u32, generation: u64, dirt: Dirt) {
        let place = self.slabs[number as usize].place;
        // Out of the free set under the old dirt and back under the new one.
        self.put(number, Place::Scrubbing);
        let slab = &mut self.slabs[number as usize];
        slab.generation = generation;
        slab.dirt = dirt;
        self.put(number, place);
    }

    pub(super) fn in_place(&self, place: Place) -> impl Iterator<Item = u32> {
        (0..)
            .zip(&self.slabs)
            .filter(move |(_, slab)| slab.place == place)
            .map(|(number, _)| number)
    }

    pub(super) fn leased(&self) -> Vec<Key<Lease>> {
        self.slabs.iter().filter_map(|slab| slab.lease).collect()
    }
}

impl State {
    pub(super) fn offer(&mut self, offer: Offer) -> Result<Reply, Refusal> {
        self.session_of(offer.caller)?;
        let outline = Outline {
            id: offer.region,
            donor: offer.caller.session,
            device: self.devices.number(&offer.device)?,
            allocation: offer.allocation,
            offset: offer.offset,
            bytes: offer.bytes,
            slab_bytes: offer.slab_bytes,
        };
        if let Some(key) = self.region_ids.get(&offer.region).copied() {
            return self.offer_again(key, outline, offer.handle);
        }
        if self.sessions[&outline.donor].returned.contains(&outline.id) {
            return Err(Refusal::Stale(format!(
                "region {} was returned; zero its bytes and offer them under a new id",
                outline.id
            )));
        }
        self.admissible(outline)?;
        let key = self.admit(outline);
        self.edit_region(key, |region| region.handle = Some(offer.handle));
        self.out.push(Effect::Record(Record::Region {
            donor: offer.caller.session,
            region: offer.region,
            device: offer.device.clone(),
            allocation: offer.allocation,
            offset: offer.offset,
            bytes: offer.bytes,
            slab_bytes: offer.slab_bytes,
        }));
        self.note(Note::Offered {
            region: offer.region,
            device: offer.device,
            bytes: offer.bytes,
        });
        Ok(Reply::Done)
    }

    fn offer_again(
        &mut self,
        key: Key<Region>,
        outline: Outline,
        handle: Handle,
    ) -> Result<Reply, Refusal> {
        let region = &self.regions[key];
        if region.outline() != outline {
            return Err(Refusal::Overlap {
                region: outline.id,
                with: region.id,
            });
        }
        if region.withdrawing {
            return Err(Refusal::Stale(format!(
                "region {} is on its way back; offer the bytes again under a new id once it is returned",
                region.id
            )));
        }
        for session in std::mem::take(&mut self.regions[key].unmappable_by) {
            if let Some(session) = self.sessions.get_mut(&session) {
                session.unmappable.remove(&outline.id);
            }
        }
        self.edit_region(key, |region| region.handle = Some(handle));
        Ok(Reply::Done)
    }

    /// The session cannot map the region, so it is of no use to it.
    pub(super) fn cannot_map(&mut self, session: SessionId, key: Key<Region>) {
        let region = &mut self.regions[key];
        if let Some(known) = self.sessions.get_mut(&session) {
            known.unmappable.insert(region.id);
            region.unmappable_by.insert(session);
        }
    }

    /// What a session that is over cannot map matters no more.
    pub(super) fn forget_unmappable(&mut self, session: SessionId) {
        let Some(known) = self.sessions.get_mut(&session) else {
            return;
        };
        for region in std::mem::take(&mut known.unmappable) {
            self.regions[self.region_ids[&region]]
                .unmappable_by
                .remove(&session);
        }
    }

    /// Whether a region that is not known yet may be admitted.
    pub(super) fn admissible(&self, offer: Outline) -> Result<(), Refusal> {
        let invalid = |field, problem| Err(Refusal::Invalid { field, problem });
        if !SLAB_BYTES.contains(&offer.slab_bytes) {
            let (least, most) = (SLAB_BYTES.start(), SLAB_BYTES.end());
            let problem = format!("is {}; takes {least} to {most}", offer.slab_bytes);
            return invalid("slab_bytes", problem);
        }
        if offer.bytes == 0 || !offer.bytes.is_multiple_of(offer.slab_bytes) {
            let problem = format!(
                "is {}; takes a multiple of slab_bytes ({}) above 0",
                offer.bytes, offer.slab_bytes
            );
            return invalid("bytes", problem);
        }
        let hbm_bytes = self.devices.list[offer.device].device.hbm_bytes;
        // 0: unknown.
        if hbm_bytes > 0 && offer.bytes > hbm_bytes {
            let problem = format!("is {}; the device has {hbm_bytes}", offer.bytes);
            return invalid("bytes", problem);
        }
        let Some(end) = offer.offset.checked_add(offer.bytes) else {
            return invalid("offset", format!("is {}: no such offset", offer.offset));
        };
        let limit = |what, limit: usize| Refusal::Limit {
            what,
            limit: limit as u64,
        };
        if self.regions.len() >= self.config.max_regions {
            return Err(limit("regions", self.config.max_regions));
        }
        let slabs = offer.bytes / offer.slab_bytes;
        if slabs > self.config.max_slabs.saturating_sub(self.slabs) as u64 {
            return Err(limit("slabs", self.config.max_slabs));
        }
        let Some(neighbours) = self.allocations.get(&offer.allocation) else {
            return Ok(());
        };
        for key in neighbours.values().take(1) {
            let region = &self.regions[*key];
            if region.donor != offer.donor {
                return Err(Refusal::NotYours {
                    what: "allocation",
                    which: offer.allocation.to_string(),
                });
            }
            if region.device != offer.device {
                let problem = format!(
                    "allocation {} lies on {}",
                    offer.allocation,
                    self.devices.uuid(region.device)
                );
                return invalid("device_uuid", problem);
            }
        }
        // Regions of one allocation never overlap, so only the last one that starts before our end can.
        match neighbours.range(..end).next_back() {
            Some((start, key)) if start + self.regions[*key].bytes > offer.offset => {
                Err(Refusal::Overlap {
                    region: offer.id,
                    with: self.regions[*key].id,
                })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn admit(&mut self, outline: Outline) -> Key<Region> {
        let region = Region::new(outline);
        self.slabs += region.slabs.len();
        if let Some(donor) = self.sessions.get_mut(&region.donor) {
            donor.regions.insert(region.id);
            donor.donated_bytes += region.bytes;
        }
        let key = self.regions.insert(region);
        self.region_ids.insert(outline.id, key);
        self.allocations
            .entry(outline.allocation)
            .or_default()
            .insert(outline.offset, key);
        self.list(key);
        key
    }
}
