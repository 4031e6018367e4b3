//! A region: bytes of one allocation on offer, in slabs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use swiftcache_proto::domain::{AllocationId, Handle, LeaseClass, RegionId, SessionId};

use super::{
    account::{Account, Place},
    arena::{LeaseKey, RegionKey},
    check::hold,
};

/// The tenant whose bytes a slab may still hold; `None` when it was never leased or has been zeroed.
pub(super) type Dirt = Option<Arc<str>>;

/// What a tenant has of a region or an allocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    /// Slabs that hold its bytes, or may still.
    pub(super) slabs: u32,
    /// Those that it leases.
    pub(super) leased: u32,
}

/// What tenants have of a region or an allocation. Those that have nothing are not in it.
pub(super) type Parts = BTreeMap<Arc<str>, Part>;

/// What a donor says of a region beside where it lies. It may say more when it offers the region again, and takes nothing
/// back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Promises {
    /// Slabs of its allocation may be lent to several tenants at the same time.
    pub(super) shared: bool,
    /// The donor follows the device's idle HBM.
    pub(super) elastic: bool,
}

/// Who has a slab, and what for.
pub(super) struct Tenure {
    pub(super) lease: LeaseKey,
    pub(super) generation: u64,
    pub(super) tenant: Arc<str>,
    pub(super) class: LeaseClass,
}

/// A region's place in the order in which regions are lent from: those in use before whole ones, so that whole ones
/// stay cheap to give back; then the fullest; then by id.
pub(super) type Rank = (bool, u64, RegionId, RegionKey);

#[derive(Clone, Debug)]
pub(super) struct Slab {
    lease: Option<LeaseKey>,
    place: Place,
    /// How many times it has been leased.
    generation: u64,
    dirt: Dirt,
}

impl Slab {
    pub(super) fn lease(&self) -> Option<LeaseKey> {
        self.lease
    }

    pub(super) fn place(&self) -> Place {
        self.place
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Its lessee's tenant; or the one whose bytes it may still hold.
    pub(super) fn dirt(&self) -> &Dirt {
        &self.dirt
    }
}

/// What is fixed for the life of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outline {
    pub(super) id: RegionId,
    /// The session that offered it; known until the region is returned.
    pub(super) donor: SessionId,
    pub(super) device: usize,
    pub(super) allocation: AllocationId,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) slab_bytes: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Region {
    outline: Outline,
    promises: Promises,
    /// `None` after a broker restart, until its donor offers it again.
    handle: Option<Handle>,
    /// On its way back to its donor.
    withdrawing: bool,
    /// An operator took it out of service.
    drained: bool,
    slabs: Vec<Slab>,
    parts: Parts,
    /// The free slabs, by what they may still hold.
    free: BTreeMap<Dirt, BTreeSet<u32>>,
    account: Account,
    /// How many slabs have a lease.
    leases: u32,
    /// Published blocks in all its slabs.
    published: u64,
    /// When a lookup last found a block in it, milliseconds.
    last_hit: u64,
}

impl Region {
    /// A region of free slabs that were never leased, without its handle.
    pub(super) fn new(outline: Outline, promises: Promises) -> Self {
        let count = (outline.bytes / outline.slab_bytes) as u32;
        let slab = Slab {
            lease: None,
            place: Place::Free,
            generation: 0,
            dirt: None,
        };
        Self {
            outline,
            promises,
            handle: None,
            withdrawing: false,
            drained: false,
            slabs: vec![slab; count as usize],
            parts: Parts::new(),
            free: BTreeMap::from([(None, (0..count).collect())]),
            account: Account {
                offered: outline.bytes,
                free: outline.bytes,
                ..Account::default()
            },
            leases: 0,
            published: 0,
            last_hit: 0,
        }
    }

    pub(super) fn outline(&self) -> &Outline {
        &self.outline
    }

    pub(super) fn promises(&self) -> Promises {
        self.promises
    }

    pub(super) fn promise(&mut self, more: Promises) {
        self.promises.shared |= more.shared;
        self.promises.elastic |= more.elastic;
    }

    /// What tenants have of it.
    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    pub(super) fn id(&self) -> RegionId {
        self.outline.id
    }

    pub(super) fn donor(&self) -> SessionId {
        self.outline.donor
    }

    pub(super) fn device(&self) -> usize {
        self.outline.device
    }

    pub(super) fn bytes(&self) -> u64 {
        self.outline.bytes
    }

    pub(super) fn slab_bytes(&self) -> u64 {
        self.outline.slab_bytes
    }

    pub(super) fn handle(&self) -> Option<&Handle> {
        self.handle.as_ref()
    }

    pub(super) fn is_withdrawing(&self) -> bool {
        self.withdrawing
    }

    pub(super) fn is_drained(&self) -> bool {
        self.drained
    }

    pub(super) fn slabs(&self) -> &[Slab] {
        &self.slabs
    }

    pub(super) fn slab(&self, number: u32) -> Option<&Slab> {
        self.slabs.get(number as usize)
    }

    pub(super) fn account(&self) -> Account {
        self.account
    }

    /// How many slabs have a lease.
    pub(super) fn leases(&self) -> u32 {
        self.leases
    }

    /// The leases of its slabs, by slab.
    pub(super) fn leased(&self) -> Vec<LeaseKey> {
        self.slabs.iter().filter_map(|slab| slab.lease).collect()
    }

    /// Published blocks in all its slabs.
    pub(super) fn published(&self) -> u64 {
        self.published
    }

    /// When a lookup last found a block in it, milliseconds.
    pub(super) fn last_hit(&self) -> u64 {
        self.last_hit
    }

    /// What its free slabs may still hold.
    pub(super) fn free_by_dirt(&self) -> impl Iterator<Item = &Dirt> {
        self.free.keys()
    }

    /// How many bytes of free slabs may still hold this.
    pub(super) fn free_bytes(&self, dirt: &Dirt) -> u64 {
        let slabs = self.free.get(dirt).map_or(0, |slabs| slabs.len());
        slabs as u64 * self.outline.slab_bytes
    }

    /// The first free slab that may still hold this.
    pub(super) fn first_free(&self, dirt: &Dirt) -> Option<u32> {
        self.free.get(dirt)?.first().copied()
    }

    /// The free slabs that may still hold the bytes of other tenants.
    pub(super) fn free_of_others(&self, tenant: &str) -> impl Iterator<Item = u32> {
        let others = self
            .free
            .iter()
            .filter(move |(dirt, _)| dirt.as_deref().is_some_and(|of| of != tenant));
        others.flat_map(|(_, slabs)| slabs.iter().copied())
    }

    pub(super) fn in_place(&self, place: Place) -> impl Iterator<Item = u32> {
        (0..)
            .zip(&self.slabs)
            .filter(move |(_, slab)| slab.place == place)
            .map(|(number, _)| number)
    }

    pub(super) fn rank(&self, key: RegionKey) -> Rank {
        let whole = self.account.free == self.outline.bytes;
        let free = self.account.free / self.outline.slab_bytes;
        (whole, free, self.outline.id, key)
    }

    pub(super) fn set_handle(&mut self, handle: Handle) {
        self.handle = Some(handle);
    }

    /// Starts its way back.
    pub(super) fn withdraw(&mut self) {
        self.withdrawing = true;
        // Its donor is the one zeroing them: nothing to wait for.
        for slab in self.in_place(Place::Scrubbing).collect::<Vec<_>>() {
            self.put(slab, Place::Free);
        }
    }

    /// Says whether that changed anything.
    pub(super) fn set_drained(&mut self, drained: bool) -> bool {
        std::mem::replace(&mut self.drained, drained) != drained
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
        *self.account.column(slab.place) -= self.outline.slab_bytes;
        *self.account.column(place) += self.outline.slab_bytes;
        slab.place = place;
        if place == Place::Free {
            self.free
                .entry(slab.dirt.clone())
                .or_default()
                .insert(number);
        }
    }

    /// A free slab is leased.
    pub(super) fn lease(&mut self, number: u32, tenure: Tenure) {
        self.put(number, Place::of(tenure.class));
        self.soil(number, Some(tenure.tenant.clone()));
        let slab = &mut self.slabs[number as usize];
        slab.lease = Some(tenure.lease);
        slab.generation = tenure.generation;
        self.leases += 1;
        self.parts.entry(tenure.tenant).or_default().leased += 1;
    }

    /// Replaces whose bytes a slab that is not free holds.
    fn soil(&mut self, number: u32, dirt: Dirt) {
        let slab = &mut self.slabs[number as usize];
        let before = std::mem::replace(&mut slab.dirt, dirt);
        if let Some(tenant) = &slab.dirt {
            self.parts.entry(tenant.clone()).or_default().slabs += 1;
        }
        if let Some(before) = before
            && let Some(part) = self.parts.get_mut(&before)
        {
            part.slabs -= 1;
            if part.slabs == 0 {
                self.parts.remove(&before);
            }
        }
    }

    /// A slab's lease is over. It may still hold the tenant's bytes.
    pub(super) fn free(&mut self, number: u32, tenant: Arc<str>) {
        if let Some(part) = self.parts.get_mut(&tenant) {
            part.leased -= 1;
        }
        self.soil(number, Some(tenant));
        self.slabs[number as usize].lease = None;
        self.leases -= 1;
        self.put(number, Place::Free);
    }

    /// Replaces what a slab may still hold, and its generation.
    pub(super) fn set_history(&mut self, number: u32, generation: u64, dirt: Dirt) {
        let place = self.slabs[number as usize].place;
        // Out of the free set under the old dirt and back under the new one.
        self.put(number, Place::Scrubbing);
        self.slabs[number as usize].generation = generation;
        self.soil(number, dirt);
        self.put(number, place);
    }

    /// A slab holds nobody's bytes any more and is free.
    pub(super) fn clean(&mut self, number: u32) {
        let generation = self.slabs[number as usize].generation;
        self.set_history(number, generation, None);
        self.put(number, Place::Free);
    }

    pub(super) fn published_more(&mut self, blocks: u64) {
        self.published += blocks;
    }

    pub(super) fn published_less(&mut self, blocks: u64) {
        self.published -= blocks;
    }

    pub(super) fn hit(&mut self, now: u64) {
        self.last_hit = now;
    }

    /// Verifies that every slab is where its lease says, and that slabs and bytes are counted right.
    pub(super) fn check(&self) -> Result<(), String> {
        let id = self.outline.id;
        let mut free: BTreeMap<_, BTreeSet<u32>> = BTreeMap::new();
        let mut leases = 0;
        let mut parts = Parts::new();
        let mut account = Account {
            offered: self.outline.bytes,
            ..Account::default()
        };
        for (number, slab) in (0..).zip(&self.slabs) {
            let held = !matches!(slab.place, Place::Free | Place::Scrubbing);
            hold!(
                slab.lease.is_some() == held,
                "slab {number} of {id} is {:?} with lease {:?}",
                slab.place,
                slab.lease
            );
            leases += u32::from(slab.lease.is_some());
            if slab.place == Place::Free {
                free.entry(slab.dirt.clone()).or_default().insert(number);
            }
            if let Some(tenant) = &slab.dirt {
                let part = parts.entry(tenant.clone()).or_default();
                part.slabs += 1;
                part.leased += u32::from(slab.lease.is_some());
            }
            *account.column(slab.place) += self.outline.slab_bytes;
        }
        hold!(
            parts == self.parts,
            "region {id} is mistaken about its tenants"
        );
        hold!(free == self.free, "region {id} misfiles its free slabs");
        hold!(leases == self.leases, "region {id} miscounts its leases");
        hold!(account.balances(), "region {id} does not balance");
        hold!(account == self.account, "region {id} is misaccounted");
        Ok(())
    }
}
