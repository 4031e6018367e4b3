//! What operators do: drain, undrain, evict.

use swiftcache_proto::domain::{LeaseId, RevokeReason};

use super::{
    DrainTarget, Effect, EvictTarget, Note, Record, Refusal, Reply, arena::Key, leases::Lease,
    regions::Region, state::State,
};

impl State {
    pub(super) fn drain(&mut self, target: DrainTarget, drain_ms: u32) -> Result<Reply, Refusal> {
        let regions = self.targeted(&target)?;
        if self.set_drained(&target, true) {
            self.out.push(Effect::Record(Record::Drained {
                target: target.clone(),
            }));
        }
        self.note(Note::Drained {
            target: named(&target),
        });
        let leases: Vec<Key<Lease>> = regions
            .into_iter()
            .flat_map(|key| self.regions[key].leased())
            .collect();
        let (mut revoked, mut bytes) = (0, 0);
        for key in leases {
            let lease_bytes = self.leases[key].bytes;
            if self.revoke(key, RevokeReason::Drained, drain_ms, None) {
                revoked += 1;
                bytes += lease_bytes;
            }
        }
        Ok(Reply::Drained {
            leases: revoked,
            bytes,
        })
    }

    pub(super) fn undrain(&mut self, target: &DrainTarget) -> Result<Reply, Refusal> {
        self.targeted(target)?;
        if self.set_drained(target, false) {
            self.out.push(Effect::Record(Record::Undrained {
                target: target.clone(),
            }));
        }
        self.note(Note::Undrained {
            target: named(target),
        });
        Ok(Reply::Done)
    }

    /// The regions a drain concerns.
    fn targeted(&self, target: &DrainTarget) -> Result<Vec<Key<Region>>, Refusal> {
        let unknown = |what| Refusal::Unknown {
            what,
            which: named(target),
        };
        match target {
            DrainTarget::Device(uuid) => {
                let device = self.devices.number(uuid)?;
                let all = self.region_ids.values().copied();
                Ok(all
                    .filter(|key| self.regions[*key].device == device)
                    .collect())
            }
            DrainTarget::Donor(label) => {
                let mut donors = self.donors_labelled(label).peekable();
                donors.peek().ok_or_else(|| unknown("donor"))?;
                let ids = donors.flat_map(|donor| self.sessions[&donor].regions.iter());
                Ok(ids.map(|id| self.region_ids[id]).collect())
            }
            DrainTarget::Region(id) => {
                let key = self.region_ids.get(id).ok_or_else(|| unknown("region"))?;
                Ok(vec![*key])
            }
        }
    }

    /// Marks the target; says whether that changed anything.
    pub(super) fn set_drained(&mut self, target: &DrainTarget, drained: bool) -> bool {
        let Ok(regions) = self.targeted(target) else {
            return false;
        };
        for key in &regions {
            self.unlist(*key);
        }
        let changed = match target {
            DrainTarget::Device(uuid) => self.devices.number(uuid).is_ok_and(|number| {
                let device = &mut self.devices.list[number];
                std::mem::replace(&mut device.drained, drained) != drained
            }),
            DrainTarget::Donor(label) if drained => self.drained_donors.insert(label.clone()),
            DrainTarget::Donor(label) => self.drained_donors.remove(label),
            DrainTarget::Region(_) => regions.iter().any(|key| {
                let region = &mut self.regions[*key];
                std::mem::replace(&mut region.drained, drained) != drained
            }),
        };
        for key in regions {
            self.list(key);
        }
        changed
    }

    pub(super) fn evict(&mut self, target: &EvictTarget) -> Result<Reply, Refusal> {
        let (blocks, leases) = match target {
            EvictTarget::Namespace(name) => (self.evict_namespaces(name)?, 0),
            EvictTarget::Lease(id) => self.evict_lease(*id)?,
        };
        self.note(Note::Evicted { blocks });
        Ok(Reply::Evicted { blocks, leases })
    }

    fn evict_namespaces(&mut self, name: &str) -> Result<u64, Refusal> {
        let named: Vec<_> = self
            .index
            .iter()
            .filter(|(_, namespace)| *namespace.name == *name)
            .map(|(key, _)| key)
            .collect();
        if named.is_empty() {
            return Err(Refusal::Unknown {
                what: "namespace",
                which: name.to_owned(),
            });
        }
        Ok(named
            .into_iter()
            .map(|key| self.forget_namespace(key))
            .sum())
    }

    fn evict_lease(&mut self, id: LeaseId) -> Result<(u64, u32), Refusal> {
        let key = self.lease_key(id)?;
        let blocks = self.leases[key].blocks.published().into();
        let drain_ms = self.config.default_drain_ms;
        let revoked = self.revoke(key, RevokeReason::Drained, drain_ms, None);
        Ok((blocks, revoked.into()))
    }
}

fn named(target: &DrainTarget) -> String {
    match target {
        DrainTarget::Device(uuid) => uuid.to_string(),
        DrainTarget::Donor(label) => label.clone(),
        DrainTarget::Region(id) => id.to_string(),
    }
}
