//! From the state to a ledger, and back.

use swiftcache_proto::domain::{DeviceUuid, Generation, LeaseId, RegionId, SessionId};

use super::{
    CoreConfig, DrainTarget, Node, Record,
    account::Place,
    arena::Key,
    leases::{Lease, NewLease, Phase},
    regions::{Outline, Region},
    state::State,
};

/// A ledger that contradicts itself or the node: nothing may be lent on its word.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ledger record {number}: {problem}")]
pub struct LedgerError {
    /// Which record, counted from 1.
    pub number: usize,
    /// What it contradicts.
    pub problem: String,
}

impl State {
    /// Rebuilds the state that wrote these records. Sessions come back detached and regions without their handles;
    /// the index is empty. The caller watches [`State::processes`] before it listens.
    ///
    /// Every beginning of what one state wrote is accepted, so that a ledger cut off by a crash can be used.
    ///
    /// # Errors
    /// When a record contradicts those before it or names a device that `node` lacks.
    pub fn restore(
        config: CoreConfig,
        node: Node,
        records: impl IntoIterator<Item = Record>,
    ) -> Result<Self, LedgerError> {
        let mut state = Self::new(config, node);
        for (number, record) in (1..).zip(records) {
            state
                .replay(record)
                .map_err(|problem| LedgerError { number, problem })?;
        }
        // A donor learns what came back before the restart from the regions listed when it resumes.
        for session in state.sessions.values_mut() {
            session.returned.clear();
        }
        state.unsettled = true;
        Ok(state)
    }

    fn replay(&mut self, record: Record) -> Result<(), String> {
        match record {
            Record::Session {
                session,
                process,
                name,
                tenant,
            } => {
                if self.sessions.contains_key(&session) {
                    return Err(format!("{session:?} was opened before"));
                }
                self.enrol(session, process, name, tenant.into());
            }
            Record::SessionOver { session } => self.replay_session_over(session)?,
            Record::Region {
                donor,
                region,
                device,
                allocation,
                offset,
                bytes,
                slab_bytes,
            } => {
                let outline = Outline {
                    id: region,
                    donor,
                    device: self.device_of(&device)?,
                    allocation,
                    offset,
                    bytes,
                    slab_bytes,
                };
                self.replay_region(outline)?;
            }
            Record::RegionWithdrawn { region } => {
                let key = self.region_of(region)?;
                self.stop_lending(key);
            }
            Record::RegionReturned { region } => {
                let key = self.region_of(region)?;
                if self.regions[key].leases > 0 {
                    return Err(format!("region {region} has leases"));
                }
                let donor = self.regions[key].donor;
                self.remove_region(key);
                self.bury(donor);
            }
            Record::Lease {
                lease,
                generation,
                lessee,
                region,
                slab,
                tenant,
                namespace,
                device,
                block_bytes,
            } => {
                let region = self.region_of(region)?;
                let new = NewLease {
                    id: lease,
                    lessee,
                    tenant: tenant.into(),
                    namespace: namespace.into(),
                    device: self.device_of(&device)?,
                    block_bytes,
                    region,
                    slab,
                    generation: generation.0,
                };
                self.replay_lease(new)?;
            }
            Record::Share { lease, reader } => {
                let key = self.lease_of(lease)?;
                if !self.sessions.contains_key(&reader) {
                    return Err(format!("no {reader:?}"));
                }
                self.add_reader(key, reader);
            }
            Record::Revoked { lease, reason } => {
                let key = self.lease_of(lease)?;
                if self.leases[key].phase == Phase::Active {
                    self.begin_revocation(key, reason, 0);
                }
            }
            Record::LetGo { lease, session } => {
                let key = self.lease_of(lease)?;
                self.drop_party(key, session);
                if self.leases[key].parties().next().is_none() {
                    self.free_slab(key);
                }
            }
            Record::Scrubbing { region, slab } => {
                let key = self.free_slab_of(region, slab)?;
                self.edit_region(key, |region| region.put(slab, Place::Scrubbing));
            }
            Record::Scrubbed { region, slab } => {
                let key = self.region_of(region)?;
                let place = self.regions[key].slabs.get(slab as usize).map(|s| s.place);
                if place != Some(Place::Scrubbing) {
                    return Err(format!(
                        "slab {slab} of region {region} is not being zeroed"
                    ));
                }
                self.clean(key, slab);
            }
            Record::Drained { target } => {
                self.set_drained(&target, true);
            }
            Record::Undrained { target } => {
                self.set_drained(&target, false);
            }
            Record::Quota { target, bytes } => {
                self.replace_quota(target, bytes);
            }
            Record::Slab {
                region,
                slab,
                generation,
                tenant,
            } => {
                let key = self.free_slab_of(region, slab)?;
                let dirt = tenant.map(Into::into);
                self.edit_region(key, |region| region.set_history(slab, generation.0, dirt));
            }
            Record::NextLease { lease } => self.next_lease = self.next_lease.max(lease.0),
        }
        Ok(())
    }

    fn replay_session_over(&mut self, id: SessionId) -> Result<(), String> {
        let session = self.sessions.get(&id).ok_or_else(|| format!("no {id:?}"))?;
        if !session.leases.is_empty() || !session.reads.is_empty() {
            return Err(format!("{id:?} has not let go of its leases"));
        }
        let withdrawn = |region: &RegionId| self.regions[self.region_ids[region]].withdrawing;
        if !session.regions.iter().all(withdrawn) {
            return Err(format!("{id:?} has not withdrawn its regions"));
        }
        self.end_session(id);
        self.bury(id);
        Ok(())
    }

    fn replay_region(&mut self, outline: Outline) -> Result<(), String> {
        if !self.sessions.contains_key(&outline.donor) {
            return Err(format!("no {:?}", outline.donor));
        }
        if self.region_ids.contains_key(&outline.id) {
            return Err(format!("region {} was offered before", outline.id));
        }
        self.admissible(outline)
            .map_err(|refusal| refusal.to_string())?;
        self.admit(outline);
        Ok(())
    }

    fn replay_lease(&mut self, new: NewLease) -> Result<(), String> {
        let region = self.regions[new.region].id;
        self.free_slab_of(region, new.slab)?;
        if self.lease_ids.contains_key(&new.id) {
            return Err(format!("lease {} was granted before", new.id));
        }
        if new.block_bytes == 0 {
            return Err("block_bytes is 0".to_owned());
        }
        let key = self.take_slab(new);
        self.leases[key].restored = true;
        Ok(())
    }

    fn device_of(&self, uuid: &DeviceUuid) -> Result<usize, String> {
        self.devices
            .number(uuid)
            .map_err(|_| format!("names device {uuid}, which this node lacks"))
    }

    fn region_of(&self, id: RegionId) -> Result<Key<Region>, String> {
        let key = self.region_ids.get(&id).copied();
        key.ok_or_else(|| format!("no region {id}"))
    }

    fn lease_of(&self, id: LeaseId) -> Result<Key<Lease>, String> {
        let key = self.lease_ids.get(&id).copied();
        key.ok_or_else(|| format!("no lease {id}"))
    }

    fn free_slab_of(&self, region: RegionId, slab: u32) -> Result<Key<Region>, String> {
        let key = self.region_of(region)?;
        let place = self.regions[key].slabs.get(slab as usize).map(|s| s.place);
        match place {
            Some(Place::Free) => Ok(key),
            _ => Err(format!("slab {slab} of region {region} is not free")),
        }
    }

    /// The first event after a restore tells the time: windows are counted from here, and what the last broker had
    /// begun is finished.
    pub(super) fn settle(&mut self) {
        self.grace_until = self.now.saturating_add(self.config.pin_ms.into());
        for session in self.sessions.values_mut() {
            session.since = self.now;
        }
        let deadline = self.now.saturating_add(self.config.default_drain_ms.into());
        self.draining.clear();
        for (id, key) in &self.lease_ids {
            let lease = &mut self.leases[*key];
            lease.since = self.now;
            lease.last_hit = self.now;
            if let Phase::Draining(revocation) = &mut lease.phase {
                revocation.since = self.now;
                revocation.deadline = deadline;
                self.draining.insert((deadline, *id));
            }
        }
        for key in self.region_ids.values().copied().collect::<Vec<_>>() {
            if self.regions[key].withdrawing && self.regions[key].leases == 0 {
                self.return_region(key);
            }
        }
    }

    /// The shortest ledger that restores this state.
    pub fn records(&self) -> Vec<Record> {
        let mut records = vec![Record::NextLease {
            lease: LeaseId(self.next_lease),
        }];
        records.extend(self.sessions.iter().map(|(id, session)| Record::Session {
            session: *id,
            process: session.process,
            name: session.name.clone(),
            tenant: session.tenant.to_string(),
        }));
        let drained_devices = self.devices.list.iter().filter(|device| device.drained);
        let targets = drained_devices
            .map(|device| DrainTarget::Device(device.device.uuid.clone()))
            .chain(self.drained_donors.iter().cloned().map(DrainTarget::Donor));
        records.extend(targets.map(|target| Record::Drained { target }));
        records.extend(self.quotas.iter().map(|(target, bytes)| Record::Quota {
            target: target.clone(),
            bytes: Some(*bytes),
        }));
        for key in self.region_ids.values() {
            self.record_region(&self.regions[*key], &mut records);
        }
        for key in self.lease_ids.values() {
            self.record_lease(&self.leases[*key], &mut records);
        }
        let over = self.sessions.iter().filter(|(_, session)| session.over);
        records.extend(over.map(|(id, _)| Record::SessionOver { session: *id }));
        records
    }

    fn record_region(&self, region: &Region, records: &mut Vec<Record>) {
        records.push(Record::Region {
            donor: region.donor,
            region: region.id,
            device: self.devices.uuid(region.device).clone(),
            allocation: region.allocation,
            offset: region.offset,
            bytes: region.bytes,
            slab_bytes: region.slab_bytes,
        });
        if region.withdrawing {
            records.push(Record::RegionWithdrawn { region: region.id });
        }
        if region.drained {
            records.push(Record::Drained {
                target: DrainTarget::Region(region.id),
            });
        }
        for (number, slab) in (0..).zip(&region.slabs) {
            if slab.lease.is_none() && slab.generation > 0 {
                records.push(Record::Slab {
                    region: region.id,
                    slab: number,
                    generation: Generation(slab.generation),
                    tenant: slab.dirt.as_ref().map(|tenant| tenant.to_string()),
                });
            }
            if slab.place == Place::Scrubbing {
                records.push(Record::Scrubbing {
                    region: region.id,
                    slab: number,
                });
            }
        }
    }

    fn record_lease(&self, lease: &Lease, records: &mut Vec<Record>) {
        let namespace = self.index.namespace(lease.namespace);
        records.push(Record::Lease {
            lease: lease.id,
            generation: Generation(lease.generation),
            lessee: lease.lessee,
            region: self.regions[lease.region].id,
            slab: lease.slab,
            tenant: namespace.tenant.to_string(),
            namespace: namespace.name.to_string(),
            device: self.devices.uuid(lease.device).clone(),
            block_bytes: lease.block_bytes,
        });
        records.extend(lease.readers.iter().map(|reader| Record::Share {
            lease: lease.id,
            reader: *reader,
        }));
        if let Some(revocation) = lease.revocation() {
            records.push(Record::Revoked {
                lease: lease.id,
                reason: revocation.reason,
            });
        }
        if !lease.lessee_holds {
            records.push(Record::LetGo {
                lease: lease.id,
                session: lease.lessee,
            });
        }
    }
}
