//! The oracle on what operators do.

use super::{
    fixture::SLAB,
    oracle::{Answer, No, Oracle},
};
use crate::core::{DrainTarget, EvictTarget, Reply};
use swiftcache_proto::domain::{RegionId, RevokeReason};

impl Oracle {
    pub(super) fn targeted(&self, target: &DrainTarget) -> Result<Vec<RegionId>, No> {
        let known = match target {
            DrainTarget::Device(device) => super::fixture::node()
                .devices
                .iter()
                .any(|known| known.uuid == *device),
            DrainTarget::Donor(label) => self
                .sessions
                .iter()
                .any(|session| !session.over && session.id.label() == *label),
            DrainTarget::Region(id) => self.regions.iter().any(|region| region.id == *id),
        };
        if !known {
            return Err(No::Unknown);
        }
        let regions = self.regions.iter().filter(|region| match target {
            DrainTarget::Device(device) => region.device == *device,
            DrainTarget::Donor(label) => {
                let donor = self.sessions.iter().find(|known| known.id == region.donor);
                region.donor.label() == *label && donor.is_some_and(|donor| !donor.over)
            }
            DrainTarget::Region(id) => region.id == *id,
        });
        Ok(regions.map(|region| region.id).collect())
    }

    pub(super) fn drain(&mut self, target: &DrainTarget, drain_ms: u32) -> Answer {
        let regions = self.targeted(target)?;
        match target {
            DrainTarget::Device(device) => self.drained_devices.push(device.clone()),
            DrainTarget::Donor(label) => self.drained_donors.push(label.clone()),
            DrainTarget::Region(id) => {
                for region in &mut self.regions {
                    region.drained |= region.id == *id;
                }
            }
        }
        let mut revoked = 0;
        for lease in self.leases.clone() {
            if regions.contains(&lease.region) {
                let drained = RevokeReason::Drained;
                revoked += u32::from(self.revoke(lease.id, drained, drain_ms, None));
            }
        }
        Ok(Some(Reply::Drained {
            leases: revoked,
            bytes: u64::from(revoked) * SLAB,
        }))
    }

    pub(super) fn undrain(&mut self, target: &DrainTarget) -> Answer {
        self.targeted(target)?;
        match target {
            DrainTarget::Device(device) => self.drained_devices.retain(|other| other != device),
            DrainTarget::Donor(label) => self.drained_donors.retain(|other| other != label),
            DrainTarget::Region(id) => {
                for region in &mut self.regions {
                    region.drained &= region.id != *id;
                }
            }
        }
        Ok(Some(Reply::Done))
    }

    pub(super) fn evict(&mut self, target: &EvictTarget) -> Answer {
        let named: Vec<_> = self
            .leases
            .iter()
            .filter(|lease| match target {
                EvictTarget::Namespace(name) => lease.namespace == *name,
                EvictTarget::Lease(id) => lease.id == *id,
            })
            .map(|lease| lease.id)
            .collect();
        if named.is_empty() {
            return Err(No::Unknown);
        }
        let mut blocks = 0;
        for lease in &mut self.leases {
            if named.contains(&lease.id) {
                blocks += lease.blocks.len() as u64;
                if lease.estate.is_none() {
                    lease.blocks.clear();
                }
            }
        }
        let kept = self.leases.iter().filter(|lease| lease.estate.is_some());
        let kept: Vec<_> = kept.map(|lease| lease.id).collect();
        if let EvictTarget::Namespace(_) = target {
            for id in kept.into_iter().filter(|id| named.contains(id)) {
                self.end_estate(id);
            }
        }
        let leases = match target {
            EvictTarget::Namespace(_) => 0,
            EvictTarget::Lease(id) => {
                let drain_ms = self.config.default_drain_ms;
                self.revoke(*id, RevokeReason::Drained, drain_ms, None)
                    .into()
            }
        };
        Ok(Some(Reply::Evicted { blocks, leases }))
    }
}
