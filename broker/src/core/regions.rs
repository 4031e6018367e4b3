//! All regions: by id and allocation, and for each device in the order in which they are lent from.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use swiftcache_proto::{
    convert::SLAB_BYTES,
    domain::{AllocationId, Handle, RegionId, SessionId},
};

use super::{
    account::{Account, Place},
    arena::{Arena, OfRegion, RegionKey},
    check::hold,
    devices::Devices,
    effect::Refusal,
    region::{Dirt, Outline, Parts, Promises, Rank, Region, Tenure},
};

/// What is offered on one device.
#[derive(Clone, Debug, Default)]
pub(super) struct Shelf {
    /// An operator drains the device.
    drained: bool,
    /// Over all its regions.
    account: Account,
    /// Of its free bytes: of regions that are drained, with their device, their donor or by themselves.
    drained_bytes: u64,
    /// How many of its regions are drained by themselves.
    drained_regions: u32,
    /// Over the regions that can be lent from.
    lendable: Account,
    /// The regions that can be lent from and have a free slab, by what that slab may still hold.
    free: BTreeMap<Dirt, BTreeSet<Rank>>,
    /// How many regions that can be lent from have slabs of this many bytes.
    slab_sizes: BTreeMap<u64, u32>,
    /// The donors that follow its idle HBM, and how many regions each has on offer.
    followers: BTreeMap<SessionId, u32>,
}

impl Shelf {
    pub(super) fn is_drained(&self) -> bool {
        self.drained
    }

    /// Over all regions of the device.
    pub(super) fn account(&self) -> Account {
        self.account
    }

    /// Of the free bytes: what a drain keeps from being lent.
    pub(super) fn drained_bytes(&self) -> u64 {
        self.drained_bytes
    }

    /// How many of its regions are drained by themselves.
    pub(super) fn drained_regions(&self) -> u32 {
        self.drained_regions
    }

    /// Over the regions that can be lent from.
    pub(super) fn lendable(&self) -> Account {
        self.lendable
    }

    /// The regions that can be lent from and have a free slab that may still hold this, in their order.
    pub(super) fn with_free(&self, dirt: &Dirt) -> impl Iterator<Item = Rank> {
        self.free.get(dirt).into_iter().flatten().copied()
    }

    /// The regions that can be lent from and have a free slab that may still hold another tenant's bytes.
    pub(super) fn with_dirty(&self, tenant: &Arc<str>) -> impl Iterator<Item = (&Dirt, Rank)> {
        let others = (self.free.iter())
            .filter(move |(dirt, _)| dirt.as_ref().is_some_and(|dirt| dirt != tenant));
        others.flat_map(|(dirt, ranks)| ranks.iter().map(move |rank| (dirt, *rank)))
    }

    /// The sizes of slabs in regions that can be lent from, ascending.
    pub(super) fn slab_sizes(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.slab_sizes.keys().copied()
    }

    /// The donors that follow its idle HBM and have something on offer.
    pub(super) fn followers(&self) -> impl Iterator<Item = SessionId> {
        self.followers.keys().copied()
    }

    fn add(&mut self, region: &Region, rank: Option<Rank>, drained: bool) {
        self.account += region.account();
        self.drained_regions += u32::from(region.is_drained());
        if drained {
            self.drained_bytes += region.account().free;
        }
        if follows(region) {
            *self.followers.entry(region.donor()).or_default() += 1;
        }
        let Some(rank) = rank else { return };
        self.lendable += region.account();
        *self.slab_sizes.entry(region.slab_bytes()).or_default() += 1;
        for dirt in region.free_by_dirt() {
            self.free.entry(dirt.clone()).or_default().insert(rank);
        }
    }

    fn subtract(&mut self, region: &Region, rank: Option<Rank>, drained: bool) {
        self.account -= region.account();
        self.drained_regions -= u32::from(region.is_drained());
        if drained {
            self.drained_bytes -= region.account().free;
        }
        if follows(region)
            && let Some(count) = self.followers.get_mut(&region.donor())
        {
            *count -= 1;
            if *count == 0 {
                self.followers.remove(&region.donor());
            }
        }
        let Some(rank) = rank else { return };
        self.lendable -= region.account();
        if let Some(count) = self.slab_sizes.get_mut(&region.slab_bytes()) {
            *count -= 1;
            if *count == 0 {
                self.slab_sizes.remove(&region.slab_bytes());
            }
        }
        for dirt in region.free_by_dirt() {
            if let Some(ranks) = self.free.get_mut(dirt) {
                ranks.remove(&rank);
                if ranks.is_empty() {
                    self.free.remove(dirt);
                }
            }
        }
    }
}

/// Whether the region is on offer by a donor that follows its device's idle HBM.
fn follows(region: &Region) -> bool {
    region.promises().elastic && !region.is_withdrawing()
}

/// What is offered of one allocation. Whoever maps a slab of it can reach all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Allocation {
    /// By offset.
    regions: BTreeMap<u64, RegionKey>,
    /// Its slabs may be lent to several tenants at the same time, by its donor's word.
    shared: bool,
    parts: Parts,
}

impl Allocation {
    /// How many slabs of it other tenants lease.
    fn leased_to_others(&self, tenant: &str) -> u32 {
        let others = self.parts.iter().filter(|(of, _)| &***of != tenant);
        others.map(|(_, part)| part.leased).sum()
    }
}

#[derive(Clone, Debug)]
struct Entry {
    region: Region,
    /// Its place in its device's order, while it can be lent from.
    listed: Option<Rank>,
    /// Its device's account counts it among what is drained.
    drained: bool,
}

fn add_parts(sums: &mut Parts, parts: &Parts) {
    for (tenant, part) in parts {
        let sum = sums.entry(tenant.clone()).or_default();
        sum.slabs += part.slabs;
        sum.leased += part.leased;
    }
}

/// Bounds on what is offered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Regions at a time.
    pub(super) regions: usize,
    /// Slabs at a time.
    pub(super) slabs: usize,
}

/// All regions.
#[derive(Clone, Debug)]
pub(super) struct Regions {
    known: Arena<OfRegion, Entry>,
    ids: BTreeMap<RegionId, RegionKey>,
    allocations: BTreeMap<AllocationId, Allocation>,
    /// Slabs of all regions.
    slabs: usize,
    /// By device.
    shelves: Vec<Shelf>,
    /// Labels of the donors an operator drains.
    drained_donors: BTreeSet<String>,
}

impl Regions {
    pub(super) fn new(devices: usize) -> Self {
        Self {
            known: Arena::default(),
            ids: BTreeMap::new(),
            allocations: BTreeMap::new(),
            slabs: 0,
            shelves: vec![Shelf::default(); devices],
            drained_donors: BTreeSet::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Slabs of all regions.
    pub(super) fn slabs(&self) -> usize {
        self.slabs
    }

    pub(super) fn key(&self, id: RegionId) -> Option<RegionKey> {
        self.ids.get(&id).copied()
    }

    pub(super) fn knows(&self, key: RegionKey) -> bool {
        self.known.get(key).is_some()
    }

    pub(super) fn get(&self, key: RegionKey) -> &Region {
        &self.known[key].region
    }

    /// By id, after one of them.
    pub(super) fn after(
        &self,
        after: Option<RegionId>,
    ) -> impl Iterator<Item = (RegionKey, &Region)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let keys = self.ids.range((from, Bound::Unbounded));
        keys.map(|(_, key)| (*key, self.get(*key)))
    }

    /// By id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (RegionKey, &Region)> {
        self.after(None)
    }

    pub(super) fn shelf(&self, device: usize) -> &Shelf {
        &self.shelves[device]
    }

    /// What is offered on each device.
    pub(super) fn shelves(&self) -> &[Shelf] {
        &self.shelves
    }

    /// Whether the region can be lent from.
    pub(super) fn is_listed(&self, key: RegionKey) -> bool {
        self.known[key].listed.is_some()
    }

    /// Whether a drain keeps the region from being lent from: its own, its donor's or its device's.
    pub(super) fn is_drained(&self, key: RegionKey) -> bool {
        self.known[key].drained
    }

    pub(super) fn drained_donors(&self) -> &BTreeSet<String> {
        &self.drained_donors
    }

    /// Whether a region that is not known yet may be admitted.
    pub(super) fn admissible(
        &self,
        offer: &Outline,
        devices: &Devices,
        room: Room,
    ) -> Result<(), Refusal> {
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
        let hbm_bytes = devices.get(offer.device).hbm_bytes;
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
        if self.known.len() >= room.regions {
            return Err(limit("regions", room.regions));
        }
        let slabs = offer.bytes / offer.slab_bytes;
        if slabs > room.slabs.saturating_sub(self.slabs) as u64 {
            return Err(limit("slabs", room.slabs));
        }
        self.fits_beside(offer, end, devices)
    }

    /// Whether the allocation's other regions leave room for one that ends there.
    fn fits_beside(&self, offer: &Outline, end: u64, devices: &Devices) -> Result<(), Refusal> {
        let Some(allocation) = self.allocations.get(&offer.allocation) else {
            return Ok(());
        };
        let neighbours = &allocation.regions;
        for key in neighbours.values().take(1) {
            let region = self.get(*key).outline();
            if region.donor != offer.donor {
                return Err(Refusal::NotYours {
                    what: "allocation",
                    which: offer.allocation.to_string(),
                });
            }
            if region.device != offer.device {
                let uuid = devices.uuid(region.device);
                return Err(Refusal::Invalid {
                    field: "device_uuid",
                    problem: format!("allocation {} lies on {uuid}", offer.allocation),
                });
            }
        }
        // Regions of one allocation never overlap, so only the last one that starts before our end can.
        match neighbours.range(..end).next_back() {
            Some((start, key)) if start + self.get(*key).bytes() > offer.offset => {
                Err(Refusal::Overlap {
                    region: offer.id,
                    with: self.get(*key).id(),
                })
            }
            _ => Ok(()),
        }
    }

    /// Takes an admissible region in, without its handle.
    pub(super) fn admit(&mut self, outline: Outline, promises: Promises) -> RegionKey {
        let region = Region::new(outline, promises);
        self.slabs += region.slabs().len();
        let key = self.known.insert(Entry {
            region,
            listed: None,
            drained: false,
        });
        self.ids.insert(outline.id, key);
        let allocation = self.allocations.entry(outline.allocation).or_default();
        allocation.regions.insert(outline.offset, key);
        allocation.shared |= promises.shared;
        self.list(key);
        key
    }

    /// Forgets a region, and names its allocation if that was its last.
    pub(super) fn remove(&mut self, key: RegionKey) -> (Region, Option<AllocationId>) {
        self.unlist(key);
        let region = self.known.remove(key).region;
        let outline = *region.outline();
        self.slabs -= region.slabs().len();
        self.ids.remove(&outline.id);
        let mut last = None;
        if let Some(allocation) = self.allocations.get_mut(&outline.allocation) {
            allocation.regions.remove(&outline.offset);
            if allocation.regions.is_empty() {
                self.allocations.remove(&outline.allocation);
                last = Some(outline.allocation);
            }
        }
        (region, last)
    }

    /// Its donor says more of a region that it offered before.
    pub(super) fn promise(&mut self, key: RegionKey, more: Promises) {
        self.edit(key, |region| region.promise(more));
        let id = self.get(key).outline().allocation;
        if let Some(allocation) = self.allocations.get_mut(&id) {
            allocation.shared |= more.shared;
        }
    }

    fn allocation(&self, key: RegionKey) -> &Allocation {
        &self.allocations[&self.get(key).outline().allocation]
    }

    /// Whether a slab of the region may go to a tenant as far as others are concerned who can reach its bytes, or whose bytes
    /// it could reach: those who have another slab of the same allocation.
    pub(super) fn is_open_to(&self, key: RegionKey, tenant: &str) -> bool {
        let allocation = self.allocation(key);
        allocation.shared || allocation.parts.keys().all(|of| &**of == tenant)
    }

    /// Whether [`is_open_to`](Self::is_open_to) will hold once slabs that nobody leases are zeroed, and `leases` of other
    /// tenants in the allocation are over.
    pub(super) fn can_open_to(&self, key: RegionKey, tenant: &str, leases: u32) -> bool {
        let allocation = self.allocation(key);
        allocation.shared || allocation.leased_to_others(tenant) <= leases
    }

    /// The free bytes of an allocation that only one tenant at a time may have slabs of, the region's own included; 0 of
    /// others.
    pub(super) fn free_beside(&self, key: RegionKey) -> u64 {
        let allocation = self.allocation(key);
        if allocation.shared {
            return 0;
        }
        let listed = allocation
            .regions
            .values()
            .filter(|key| self.is_listed(**key));
        listed.map(|key| self.get(*key).account().free).sum()
    }

    /// The free slabs that keep an allocation from a tenant because they may hold others' bytes, of the regions that can be
    /// lent from.
    pub(super) fn in_the_way(&self, key: RegionKey, tenant: &str) -> Vec<(RegionKey, u32)> {
        let allocation = self.allocation(key);
        if allocation.shared {
            return Vec::new();
        }
        let listed = allocation
            .regions
            .values()
            .filter(|key| self.is_listed(**key));
        let dirty = listed.flat_map(|key| {
            let free = self.get(*key).free_of_others(tenant);
            free.map(|slab| (*key, slab))
        });
        dirty.collect()
    }

    pub(super) fn set_handle(&mut self, key: RegionKey, handle: Handle) {
        self.edit(key, |region| region.set_handle(handle));
    }

    /// Starts the region's way back: nothing more is lent from it.
    pub(super) fn withdraw(&mut self, key: RegionKey) {
        self.edit(key, Region::withdraw);
    }

    /// A free slab is leased.
    pub(super) fn lease(&mut self, key: RegionKey, slab: u32, tenure: Tenure) {
        self.edit(key, |region| region.lease(slab, tenure));
    }

    /// A slab's lease is over. It may still hold the tenant's bytes.
    pub(super) fn free(&mut self, key: RegionKey, slab: u32, tenant: Arc<str>) {
        self.edit(key, |region| region.free(slab, tenant));
    }

    /// Moves a slab's bytes to another column of the account.
    pub(super) fn put(&mut self, key: RegionKey, slab: u32, place: Place) {
        self.edit(key, |region| region.put(slab, place));
    }

    /// Replaces what a slab may still hold, and its generation.
    pub(super) fn set_history(&mut self, key: RegionKey, slab: u32, generation: u64, dirt: Dirt) {
        self.edit(key, |region| region.set_history(slab, generation, dirt));
    }

    /// A slab holds nobody's bytes any more and is free.
    pub(super) fn clean(&mut self, key: RegionKey, slab: u32) {
        self.edit(key, |region| region.clean(slab));
    }

    pub(super) fn published_more(&mut self, key: RegionKey, blocks: u64) {
        self.known[key].region.published_more(blocks);
    }

    pub(super) fn published_less(&mut self, key: RegionKey, blocks: u64) {
        self.known[key].region.published_less(blocks);
    }

    /// A lookup has found a block in it.
    pub(super) fn hit(&mut self, key: RegionKey, now: u64) {
        self.known[key].region.hit(now);
    }

    /// Says whether that changed anything.
    pub(super) fn drain_region(&mut self, key: RegionKey, drained: bool) -> bool {
        let mut changed = false;
        self.edit(key, |region| changed = region.set_drained(drained));
        changed
    }

    /// Says whether that changed anything.
    pub(super) fn drain_device(&mut self, device: usize, drained: bool) -> bool {
        let here = self.iter().filter(|(_, region)| region.device() == device);
        let keys: Vec<_> = here.map(|(key, _)| key).collect();
        let change = |regions: &mut Self| {
            let before = &mut regions.shelves[device].drained;
            std::mem::replace(before, drained) != drained
        };
        self.relist(&keys, change)
    }

    /// Drains every region of the donors with this label, or ends that. Says whether it changed anything.
    pub(super) fn drain_donor(&mut self, label: &str, drained: bool) -> bool {
        let its = self
            .iter()
            .filter(|(_, region)| region.donor().label() == label);
        let keys: Vec<_> = its.map(|(key, _)| key).collect();
        self.relist(&keys, |regions| match drained {
            true => regions.drained_donors.insert(label.to_owned()),
            false => regions.drained_donors.remove(label),
        })
    }

    /// Changes something that decides whether these regions are lent from.
    fn relist(&mut self, keys: &[RegionKey], change: impl FnOnce(&mut Self) -> bool) -> bool {
        for key in keys {
            self.unlist(*key);
        }
        let changed = change(self);
        for key in keys {
            self.list(*key);
        }
        changed
    }

    /// Changes a region and keeps its device's accounts and lending order in step.
    fn edit(&mut self, key: RegionKey, edit: impl FnOnce(&mut Region)) {
        self.unlist(key);
        edit(&mut self.known[key].region);
        self.list(key);
    }

    /// Whether new leases may be taken from the region. A donor that is over has withdrawn all of its regions.
    fn can_lend(&self, region: &Region) -> bool {
        region.handle().is_some() && !region.is_withdrawing() && !self.drains(region)
    }

    /// Whether a drain concerns the region: its own, its device's or its donor's.
    fn drains(&self, region: &Region) -> bool {
        region.is_drained()
            || self.shelves[region.device()].drained
            || self.drained_donors.contains(&region.donor().label())
    }

    fn unlist(&mut self, key: RegionKey) {
        let entry = &mut self.known[key];
        let listed = entry.listed.take();
        self.shelves[entry.region.device()].subtract(&entry.region, listed, entry.drained);
        let Some(its) = self.allocations.get_mut(&entry.region.outline().allocation) else {
            return;
        };
        for (tenant, part) in entry.region.parts() {
            if let Some(sum) = its.parts.get_mut(tenant) {
                sum.slabs -= part.slabs;
                sum.leased -= part.leased;
                if sum.slabs == 0 {
                    its.parts.remove(tenant);
                }
            }
        }
    }

    fn list(&mut self, key: RegionKey) {
        let lends = self.can_lend(&self.known[key].region);
        let drained = self.drains(&self.known[key].region);
        let entry = &mut self.known[key];
        entry.listed = lends.then(|| entry.region.rank(key));
        entry.drained = drained;
        self.shelves[entry.region.device()].add(&entry.region, entry.listed, drained);
        if let Some(its) = self.allocations.get_mut(&entry.region.outline().allocation) {
            add_parts(&mut its.parts, entry.region.parts());
        }
    }

    /// Verifies every region, that none overlaps another, and that each device's accounts and order are what its regions
    /// make them.
    pub(super) fn check(&self) -> Result<(), String> {
        hold!(self.ids.len() == self.known.len(), "a region has two ids");
        let mut slabs = 0;
        let mut shelves: Vec<Shelf> = self.shelves.clone();
        for shelf in &mut shelves {
            *shelf = Shelf {
                drained: shelf.drained,
                ..Shelf::default()
            };
        }
        for (id, key) in &self.ids {
            let Entry {
                region,
                listed,
                drained,
            } = &self.known[*key];
            hold!(region.id() == *id, "region {id} is filed under another id");
            region.check()?;
            slabs += region.slabs().len();
            let rank = self.can_lend(region).then(|| region.rank(*key));
            hold!(*listed == rank, "region {id} is misranked");
            let mistaken = *drained != self.drains(region);
            hold!(!mistaken, "region {id} is mistaken about a drain");
            shelves[region.device()].add(region, rank, *drained);
            let within = self.allocations.get(&region.outline().allocation);
            let filed = within.and_then(|its| its.regions.get(&region.outline().offset));
            hold!(filed == Some(key), "region {id} is not in its allocation");
        }
        hold!(slabs == self.slabs, "slabs are miscounted");
        for (number, (shelf, counted)) in self.shelves.iter().zip(shelves).enumerate() {
            hold!(
                shelf.account == counted.account && shelf.lendable == counted.lendable,
                "device {number} is misaccounted"
            );
            hold!(
                shelf.drained_bytes == counted.drained_bytes
                    && shelf.drained_regions == counted.drained_regions,
                "device {number} is mistaken about what is drained"
            );
            hold!(
                shelf.free == counted.free,
                "device {number} lends in the wrong order"
            );
            hold!(
                shelf.followers == counted.followers,
                "device {number} is mistaken about who follows it"
            );
            hold!(
                shelf.slab_sizes == counted.slab_sizes,
                "device {number} misses a slab size"
            );
        }
        self.check_allocations()
    }

    /// Regions of one allocation belong to one donor and do not overlap.
    fn check_allocations(&self) -> Result<(), String> {
        let mut regions = 0;
        for (id, allocation) in &self.allocations {
            let mut end = 0;
            let mut owners = BTreeSet::new();
            let mut parts = Parts::new();
            let mut shared = false;
            for (offset, key) in &allocation.regions {
                add_parts(&mut parts, self.get(*key).parts());
                shared |= self.get(*key).promises().shared;
                let region = self.get(*key).outline();
                hold!(*offset >= end, "regions of allocation {id} overlap");
                end = offset + region.bytes;
                owners.insert((region.donor, region.device));
                regions += 1;
            }
            let count = owners.len();
            hold!(count == 1, "allocation {id} has {count} owners");
            hold!(
                parts == allocation.parts && shared <= allocation.shared,
                "allocation {id} is mistaken about its tenants"
            );
        }
        hold!(regions == self.known.len(), "a region has no allocation");
        Ok(())
    }
}
