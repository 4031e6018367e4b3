//! The invariants, each checked from the ground up: nothing that is kept up to date is believed.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Account,
    account::Place,
    arena::Key,
    leases::{Lease, Phase},
    regions::Region,
    state::State,
};

/// Says what is wrong unless it holds.
macro_rules! hold {
    ($holds:expr, $($wrong:tt)+) => {
        if !$holds {
            return Err(format!($($wrong)+));
        }
    };
}

pub(super) use hold;

impl State {
    /// Verifies every invariant. Costs as much as the state is large.
    ///
    /// # Errors
    /// Says which invariant does not hold, and where: always a bug of the core.
    pub fn check(&self) -> Result<(), String> {
        self.check_slabs()?;
        self.check_accounts()?;
        self.check_lending_order()?;
        self.check_leases()?;
        self.check_index()?;
        self.check_pins()?;
        self.check_sessions()
    }

    /// A slab has at most one lease, and only slabs that somebody holds have one.
    fn check_slabs(&self) -> Result<(), String> {
        let mut slabs = 0;
        let mut lessees = BTreeSet::new();
        hold!(
            self.region_ids.len() == self.regions.len(),
            "a region has two ids"
        );
        for (id, key) in &self.region_ids {
            let region = &self.regions[*key];
            hold!(region.id == *id, "region {id} is filed under another id");
            slabs += region.slabs.len();
            let mut free: BTreeMap<_, BTreeSet<u32>> = BTreeMap::new();
            for (number, slab) in (0..).zip(&region.slabs) {
                let leased = matches!(slab.place, Place::Leased | Place::Draining | Place::Zombie);
                hold!(
                    slab.lease.is_some() == leased,
                    "slab {number} of {id} is {:?} with lease {:?}",
                    slab.place,
                    slab.lease
                );
                if let Some(lease) = slab.lease {
                    hold!(lessees.insert(lease), "lease {lease:?} is of two slabs");
                    self.check_slab_of(*key, number, lease)?;
                }
                if slab.place == Place::Free {
                    free.entry(slab.dirt.clone()).or_default().insert(number);
                }
            }
            hold!(free == region.free, "region {id} misfiles its free slabs");
            let leases = region
                .slabs
                .iter()
                .filter(|slab| slab.lease.is_some())
                .count();
            hold!(
                leases == region.leases as usize,
                "region {id} miscounts its leases"
            );
            hold!(
                !region.withdrawing || region.leases > 0 || self.unsettled,
                "region {id} is withdrawn, held by nobody, and not returned"
            );
            let within = self.allocations.get(&region.allocation);
            let filed = within.and_then(|regions| regions.get(&region.offset));
            hold!(filed == Some(key), "region {id} is not in its allocation");
        }
        hold!(slabs == self.slabs, "slabs are miscounted");
        hold!(lessees.len() == self.leases.len(), "a lease has no slab");
        self.check_allocations()
    }

    fn check_slab_of(
        &self,
        key: Key<Region>,
        number: u32,
        lease: Key<Lease>,
    ) -> Result<(), String> {
        let Some(lease) = self.leases.get(lease) else {
            return Err(format!("slab {number} has a lease that is over"));
        };
        let slab = &self.regions[key].slabs[number as usize];
        let id = lease.id;
        hold!(
            lease.region == key && lease.slab == number,
            "lease {id} is of another slab"
        );
        hold!(
            lease.generation == slab.generation,
            "lease {id} has a stale generation"
        );
        let place = match lease.phase {
            Phase::Active => Place::Leased,
            Phase::Draining(_) => Place::Draining,
            Phase::Zombie(_) => Place::Zombie,
        };
        hold!(
            slab.place == place,
            "lease {id} is accounted {:?}",
            slab.place
        );
        Ok(())
    }

    /// Regions of one allocation belong to one donor and do not overlap.
    fn check_allocations(&self) -> Result<(), String> {
        let mut regions = 0;
        for (id, neighbours) in &self.allocations {
            let mut end = 0;
            let mut owners = BTreeSet::new();
            for (offset, key) in neighbours {
                let region = &self.regions[*key];
                hold!(*offset >= end, "regions of allocation {id} overlap");
                end = offset + region.bytes;
                owners.insert((region.donor, region.device));
                regions += 1;
            }
            hold!(
                owners.len() == 1,
                "allocation {id} has {} owners",
                owners.len()
            );
        }
        hold!(regions == self.regions.len(), "a region has no allocation");
        Ok(())
    }

    /// offered = free + leased + draining + zombie + scrubbing, for every region and device.
    fn check_accounts(&self) -> Result<(), String> {
        let mut devices = vec![Account::default(); self.devices.list.len()];
        for (_, region) in self.regions.iter() {
            let mut account = Account {
                offered: region.bytes,
                ..Account::default()
            };
            for slab in &region.slabs {
                *account.column(slab.place) += region.slab_bytes;
            }
            hold!(account.balances(), "region {} does not balance", region.id);
            hold!(
                account == region.account,
                "region {} is misaccounted",
                region.id
            );
            devices[region.device] += account;
        }
        for (device, account) in self.devices.list.iter().zip(devices) {
            let uuid = &device.device.uuid;
            hold!(account == device.account, "device {uuid} is misaccounted");
        }
        Ok(())
    }

    /// Lent from are exactly the regions that can be, in their order.
    fn check_lending_order(&self) -> Result<(), String> {
        for (number, device) in self.devices.list.iter().enumerate() {
            let mut free: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
            let mut lendable = Account::default();
            let mut slab_sizes: BTreeMap<u64, u32> = BTreeMap::new();
            for (key, region) in self.regions.iter() {
                if region.device != number || !self.can_lend(region) {
                    hold!(
                        region.device != number || region.listed.is_none(),
                        "region {} is lent from",
                        region.id
                    );
                    continue;
                }
                let rank = region.rank(key);
                hold!(
                    region.listed == Some(rank),
                    "region {} is misranked",
                    region.id
                );
                lendable += region.account;
                *slab_sizes.entry(region.slab_bytes).or_default() += 1;
                for dirt in region.free.keys() {
                    free.entry(dirt.clone()).or_default().insert(rank);
                }
            }
            let uuid = &device.device.uuid;
            hold!(
                free == device.free,
                "device {uuid} lends in the wrong order"
            );
            hold!(
                lendable == device.lendable,
                "device {uuid} miscounts what it lends"
            );
            hold!(
                slab_sizes == device.slab_sizes,
                "device {uuid} misses a slab size"
            );
        }
        Ok(())
    }
}
