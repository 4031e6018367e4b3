//! Which slabs a demand is granted.
//!
//! Best link first, then most bandwidth; among equals the device with the most free bytes, so that transfers spread;
//! on a device, regions in use before whole ones, so that whole ones stay cheap to give back.

use std::sync::Arc;

use swiftcache_proto::domain::{Generation, LeaseId, LinkKind, SessionId, Shortfall};

use super::{
    Effect, Grant, LeaseDemand, Note, Record, Refusal, Reply,
    arena::Key,
    devices::{Dirt, Rank},
    fairness::{Claim, Party},
    leases::NewLease,
    regions::Region,
    state::State,
};

/// A demand being served.
pub(super) struct Demand {
    pub(super) session: SessionId,
    pub(super) tenant: Arc<str>,
    namespace: Arc<str>,
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    /// Devices it can reach, best first.
    pub(super) tiers: Vec<(LinkKind, Vec<usize>)>,
    /// Still to be granted, bytes.
    pub(super) missing: u64,
}

/// Why no further slab is granted.
enum Stop {
    Quota,
    Fairness,
    NoSlab,
}

impl State {
    pub(super) fn lease(&mut self, demand: LeaseDemand) -> Result<Reply, Refusal> {
        let session = self.session_of(demand.caller)?;
        let (id, tenant) = (demand.caller.session, session.tenant.clone());
        let device = self.devices.number(&demand.device)?;
        for (field, value) in [("bytes", demand.bytes), ("block_bytes", demand.block_bytes)] {
            if value == 0 {
                return Err(Refusal::Invalid {
                    field,
                    problem: "is 0".to_owned(),
                });
            }
        }
        let asked_bytes = demand.bytes;
        let mut demand = Demand {
            session: id,
            tenant,
            namespace: demand.namespace.into(),
            device,
            block_bytes: demand.block_bytes,
            tiers: self.devices.tiers(device),
            missing: demand.bytes,
        };
        let (grants, stop) = self.grant_slabs(&mut demand);
        let shortfall = self.shortfall(&demand, stop);
        self.counters.leases_granted += grants.len() as u64;
        if shortfall != Shortfall::None {
            self.counters.leases_refused += u64::from(grants.is_empty());
            self.note(Note::LeaseShort {
                session: id,
                name: self.sessions[&id].name.clone(),
                tenant: demand.tenant.to_string(),
                namespace: demand.namespace.to_string(),
                device: self.devices.uuid(device).clone(),
                asked_bytes,
                granted_bytes: asked_bytes - demand.missing,
                shortfall,
            });
        }
        Ok(Reply::Leased { grants, shortfall })
    }

    fn grant_slabs(&mut self, demand: &mut Demand) -> (Vec<Grant>, Option<Stop>) {
        self.expire_waits();
        self.waits.remove(&demand.session);
        let mut grants: Vec<Grant> = Vec::new();
        while demand.missing > 0 {
            let Some((region, slab, link)) = self.best_slab(demand) else {
                return (grants, Some(Stop::NoSlab));
            };
            let bytes = self.regions[region].slab_bytes;
            if grants.len() >= self.config.max_grants || self.over_quota(demand, bytes) {
                return (grants, Some(Stop::Quota));
            }
            if !self.fair(demand, self.regions[region].device, bytes) {
                return (grants, Some(Stop::Fairness));
            }
            grants.extend(self.grant(demand, region, slab, link));
            demand.missing = demand.missing.saturating_sub(bytes);
        }
        (grants, None)
    }

    fn over_quota(&self, demand: &Demand, bytes: u64) -> bool {
        let session = &self.sessions[&demand.session];
        let beyond = |held: u64, quota: Option<u64>| quota.is_some_and(|most| held + bytes > most);
        beyond(session.held_bytes, self.config.session_quota_bytes)
            || self.over_set_quota(&demand.tenant, &demand.namespace, beyond)
            || session.leases.len() >= self.config.max_leases_per_session
            || self.leases.len() >= self.config.max_leases
    }

    /// The best free slab that the demand's tenant may have as it is.
    fn best_slab(&self, demand: &Demand) -> Option<(Key<Region>, u32, LinkKind)> {
        let own = Some(demand.tenant.clone());
        demand.tiers.iter().find_map(|(link, devices)| {
            let candidates = devices.iter().filter_map(|number| {
                let usable = [&own, &None]
                    .into_iter()
                    .filter_map(|dirt| Some((self.first_fitting(*number, dirt, demand)?, dirt)));
                // Whole regions last; then the tenant's own leavings, which cost nobody a scrub.
                let best = usable.min_by_key(|(rank, dirt)| (rank.0, dirt.is_none(), *rank))?;
                Some((*number, best))
            });
            let most_free = |(number, _): &(usize, _)| {
                let free = self.devices.list[*number].lendable.free;
                (free, std::cmp::Reverse(*number))
            };
            let (_, ((.., key), dirt)) = candidates.max_by_key(most_free)?;
            let slab = *self.regions[key].free.get(dirt)?.first()?;
            Some((key, slab, *link))
        })
    }

    fn first_fitting(&self, device: usize, dirt: &Dirt, demand: &Demand) -> Option<Rank> {
        let mut ranks = self.devices.list[device].free.get(dirt)?.iter();
        ranks
            .find(|(.., key)| self.regions[*key].serves(demand))
            .copied()
    }

    fn grant(
        &mut self,
        demand: &Demand,
        region: Key<Region>,
        slab: u32,
        link: LinkKind,
    ) -> Option<Grant> {
        let id = LeaseId(self.next_lease);
        let generation = self.regions[region].slabs[slab as usize].generation + 1;
        let key = self.take_slab(NewLease {
            id,
            lessee: demand.session,
            tenant: demand.tenant.clone(),
            namespace: demand.namespace.clone(),
            device: demand.device,
            block_bytes: demand.block_bytes,
            region,
            slab,
            generation,
        });
        self.out.push(Effect::Record(Record::Lease {
            lease: id,
            generation: Generation(generation),
            lessee: demand.session,
            region: self.regions[region].id,
            slab,
            tenant: demand.tenant.to_string(),
            namespace: demand.namespace.to_string(),
            device: self.devices.uuid(demand.device).clone(),
            block_bytes: demand.block_bytes,
        }));
        self.note(Note::Leased {
            lease: id,
            region: self.regions[region].id,
            device: self.devices.uuid(self.regions[region].device).clone(),
            bytes: self.leases[key].bytes,
            link,
        });
        self.grant_of(key, link)
    }

    /// Says why the demand was not met in full, and does what can be done about it: has slabs zeroed, and asks
    /// borrowers above their share to let go.
    fn shortfall(&mut self, demand: &Demand, stop: Option<Stop>) -> Shortfall {
        match stop {
            None => Shortfall::None,
            Some(Stop::Quota) => Shortfall::Quota,
            Some(Stop::Fairness) => {
                self.wait(demand);
                Shortfall::Fairness
            }
            Some(Stop::NoSlab) if self.block_too_large(demand) => Shortfall::BlockTooLarge,
            Some(Stop::NoSlab) => {
                self.wait(demand);
                let scrubbing = self.scrub_for(demand);
                self.reclaim_for(demand);
                match scrubbing {
                    true => Shortfall::Scrubbing,
                    false => Shortfall::NoFreeSlab,
                }
            }
        }
    }

    fn block_too_large(&self, demand: &Demand) -> bool {
        let devices = demand.tiers.iter().flat_map(|(_, devices)| devices);
        let largest = devices
            .filter_map(|number| self.devices.list[*number].slab_sizes.last_key_value())
            .map(|(bytes, _)| *bytes)
            .max();
        largest.is_some_and(|bytes| bytes < demand.block_bytes)
    }

    /// Has free slabs that other tenants used zeroed, as many as the demand misses; says whether any are under way.
    fn scrub_for(&mut self, demand: &Demand) -> bool {
        let devices: Vec<_> = demand
            .tiers
            .iter()
            .flat_map(|(_, devices)| devices.iter().copied())
            .collect();
        let under_way = |state: &Self| -> u64 {
            let lendable = devices
                .iter()
                .map(|number| &state.devices.list[*number].lendable);
            lendable.map(|account| account.scrubbing).sum()
        };
        let mut scrubbing = under_way(self);
        for number in &devices {
            while scrubbing < demand.missing {
                let Some((region, slab)) = self.dirty_slab(*number, demand) else {
                    break;
                };
                let bytes = self.regions[region].slab_bytes;
                if !self.fair(demand, *number, bytes) {
                    break;
                }
                self.scrub(region, slab);
                scrubbing += bytes;
            }
        }
        scrubbing > 0
    }

    /// A free slab that only lacks zeroing, in a region whose donor can be told.
    fn dirty_slab(&self, device: usize, demand: &Demand) -> Option<(Key<Region>, u32)> {
        let others = self.devices.list[device]
            .free
            .iter()
            .filter(|(dirt, _)| dirt.as_ref().is_some_and(|dirt| *dirt != demand.tenant));
        others
            .flat_map(|(dirt, ranks)| ranks.iter().map(move |rank| (dirt, rank)))
            .find_map(|(dirt, (.., key))| {
                let region = &self.regions[*key];
                let donor = self.sessions.get(&region.donor)?;
                let fits = donor.attached && region.serves(demand);
                let slab = *region.free.get(dirt)?.first()?;
                fits.then_some((*key, slab))
            })
    }

    pub(super) fn claim_of(&self, demand: &Demand) -> Claim {
        Claim {
            missing: demand.missing,
            device: demand.device,
            block_bytes: demand.block_bytes,
            party: demand.party(),
        }
    }
}

impl Region {
    /// Whether the demand could use a slab of it. An engine that lends part of its pool gains nothing by leasing it, and
    /// CUDA opens a handle in other processes only. What a session cannot map is of no use to it.
    pub(super) fn serves(&self, demand: &Demand) -> bool {
        self.donor != demand.session
            && self.slab_bytes >= demand.block_bytes
            && !self.unmappable_by.contains(&demand.session)
    }
}

impl Demand {
    /// Whose share it counts towards.
    pub(super) fn party(&self) -> Party {
        (self.tenant.clone(), self.namespace.clone())
    }
}
