//! Leases: from the grant until everyone has let go.

use std::{collections::BTreeSet, sync::Arc};

use swiftcache_proto::domain::{
    DeviceUuid, Generation, LeaseId, LinkKind, PinId, RevokeReason, SessionId,
};

use super::{
    Caller, Effect, Grant, Record, Refusal, Reply, account::Place, arena::Key, index::Namespace,
    lookup::Unreadable, regions::Region, revocation::Revocation, slots::BlockSlots, state::State,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Active,
    Draining(Revocation),
    Zombie(Revocation),
}

#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) generation: u64,
    pub(super) phase: Phase,
    pub(super) region: Key<Region>,
    pub(super) slab: u32,
    pub(super) bytes: u64,
    pub(super) lessee: SessionId,
    /// The lessee has not let go.
    pub(super) lessee_holds: bool,
    /// The sessions that opened it for reading and have not let go.
    pub(super) readers: BTreeSet<SessionId>,
    pub(super) namespace: Key<Namespace>,
    /// The device the lessee computes on.
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    /// When it was granted, milliseconds.
    pub(super) since: u64,
    /// When a lookup last found a block in it, milliseconds.
    pub(super) last_hit: u64,
    pub(super) blocks: BlockSlots,
    /// Pins of other sessions on its slots.
    pub(super) pins: BTreeSet<PinId>,
    /// Granted by a broker before this one, whose pins may still be read under.
    pub(super) restored: bool,
}

impl Lease {
    pub(super) fn revocation(&self) -> Option<&Revocation> {
        match &self.phase {
            Phase::Active => None,
            Phase::Draining(revocation) | Phase::Zombie(revocation) => Some(revocation),
        }
    }

    /// Everyone who may touch the slab.
    pub(super) fn parties(&self) -> impl Iterator<Item = SessionId> {
        let lessee = self.lessee_holds.then_some(self.lessee);
        lessee.into_iter().chain(self.readers.iter().copied())
    }
}

/// What a grant fixes for the life of a lease.
pub(super) struct NewLease {
    pub(super) id: LeaseId,
    pub(super) lessee: SessionId,
    pub(super) tenant: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    pub(super) region: Key<Region>,
    pub(super) slab: u32,
    pub(super) generation: u64,
}

fn unknown_lease(lease: LeaseId) -> Refusal {
    Refusal::Unknown {
        what: "lease",
        which: lease.to_string(),
    }
}

impl State {
    pub(super) fn lease_key(&self, lease: LeaseId) -> Result<Key<Lease>, Refusal> {
        self.lease_ids
            .get(&lease)
            .copied()
            .ok_or_else(|| unknown_lease(lease))
    }

    /// The lease, if the caller is its lessee, the generation is its own and it is not being revoked.
    pub(super) fn active_lease_of(
        &self,
        caller: Caller,
        lease: LeaseId,
        generation: Generation,
    ) -> Result<Key<Lease>, Refusal> {
        self.session_of(caller)?;
        let key = self.lease_key(lease)?;
        let held = &self.leases[key];
        if held.lessee != caller.session {
            return Err(Refusal::NotYours {
                what: "lease",
                which: lease.to_string(),
            });
        }
        if held.generation != generation.0 {
            return Err(Refusal::Stale(format!(
                "lease {lease} is generation {}, not {}",
                held.generation, generation.0
            )));
        }
        if let Some(revocation) = held.revocation() {
            return Err(Refusal::Stale(format!(
                "lease {lease} is being revoked: {}",
                revocation.reason
            )));
        }
        Ok(key)
    }

    /// Takes a free slab.
    pub(super) fn take_slab(&mut self, new: NewLease) -> Key<Lease> {
        let namespace = self.index.open(&new.tenant, &new.namespace);
        let bytes = self.regions[new.region].slab_bytes;
        let slots = u32::try_from(bytes / new.block_bytes)
            .unwrap_or(u32::MAX)
            .min(self.config.max_slots);
        let key = self.leases.insert(Lease {
            id: new.id,
            generation: new.generation,
            phase: Phase::Active,
            region: new.region,
            slab: new.slab,
            bytes,
            lessee: new.lessee,
            lessee_holds: true,
            readers: BTreeSet::new(),
            namespace,
            device: new.device,
            block_bytes: new.block_bytes,
            since: self.now,
            last_hit: self.now,
            blocks: BlockSlots::new(slots),
            pins: BTreeSet::new(),
            restored: false,
        });
        self.lease_ids.insert(new.id, key);
        self.next_lease = self.next_lease.max(new.id.0 + 1);
        self.index.charge(namespace, bytes);
        self.edit_region(new.region, |region| {
            region.put(new.slab, Place::Leased);
            let slab = &mut region.slabs[new.slab as usize];
            slab.lease = Some(key);
            slab.generation = new.generation;
            region.leases += 1;
        });
        match self.sessions.get_mut(&new.lessee) {
            Some(session) if !session.over => {
                session.leases.insert(new.id);
                session.held_bytes += bytes;
                session.active_bytes += bytes;
                self.index.namespace_mut(namespace).active_bytes += bytes;
            }
            // A compacted ledger names lessees that are gone where readers still hold on.
            _ => self.leases[key].lessee_holds = false,
        }
        key
    }

    /// The lease as its lessee or a reader on another device sees it; `None` while its region has no handle.
    pub(super) fn grant_of(&self, key: Key<Lease>, link: LinkKind) -> Option<Grant> {
        let lease = &self.leases[key];
        let region = &self.regions[lease.region];
        Some(Grant {
            lease: lease.id,
            generation: Generation(lease.generation),
            region: region.id,
            slab: lease.slab,
            slab_bytes: region.slab_bytes,
            allocation: region.allocation,
            offset: region.offset + u64::from(lease.slab) * region.slab_bytes,
            device: self.devices.uuid(region.device).clone(),
            handle: region.handle.clone()?,
            link,
            slots: lease.blocks.slots(),
            block_bytes: lease.block_bytes,
            map_bytes: region.offset + region.bytes,
        })
    }

    pub(super) fn share(
        &mut self,
        caller: Caller,
        id: LeaseId,
        device: &DeviceUuid,
    ) -> Result<Reply, Refusal> {
        let session = self.session_of(caller)?;
        let key = self.lease_key(id)?;
        let lease = &self.leases[key];
        if *session.tenant != *self.index.namespace(lease.namespace).tenant {
            return Err(Refusal::NotYours {
                what: "lease",
                which: id.to_string(),
            });
        }
        if lease.lessee == caller.session {
            return Err(Refusal::Invalid {
                field: "lease_id",
                problem: format!("{id} is this session's own lease"),
            });
        }
        let device = self.devices.number(device)?;
        let owner = self.regions[lease.region].device;
        let Some(path) = self.devices.path(device, owner) else {
            return Err(Refusal::Invalid {
                field: "device_uuid",
                problem: format!("has no peer access to {}", self.devices.uuid(owner)),
            });
        };
        if let Some(revocation) = lease.revocation() {
            let reason = revocation.reason;
            return Err(Refusal::Stale(format!(
                "lease {id} is being revoked: {reason}"
            )));
        }
        let limit = |what, limit: usize| {
            Err(Refusal::Limit {
                what,
                limit: limit as u64,
            })
        };
        let config = &self.config;
        let not_now = || {
            Refusal::Stale(format!(
                "lease {id} cannot be opened until its donor has offered the region again"
            ))
        };
        match self.may_read(caller.session, lease) {
            Ok(()) => {}
            Err(Unreadable::NoHandle) => return Err(not_now()),
            Err(Unreadable::Readers) => return limit("readers of one lease", config.max_readers),
            Err(Unreadable::Reads) => {
                return limit("leases read by one session", config.max_leases_per_session);
            }
        }
        let grant = self.grant_of(key, path.kind).ok_or_else(not_now)?;
        if lease.readers.contains(&caller.session) {
            return Ok(Reply::Shared(grant));
        }
        self.out.push(Effect::Record(Record::Share {
            lease: id,
            reader: caller.session,
        }));
        self.add_reader(key, caller.session);
        Ok(Reply::Shared(grant))
    }

    pub(super) fn add_reader(&mut self, key: Key<Lease>, reader: SessionId) {
        self.leases[key].readers.insert(reader);
        if let Some(session) = self.sessions.get_mut(&reader) {
            session.reads.insert(self.leases[key].id);
        }
    }

    /// The lessee gives leases back, or a reader its shares; perhaps because it cannot map them. Leases that are over
    /// already are skipped.
    pub(super) fn release(
        &mut self,
        caller: Caller,
        ids: &[LeaseId],
        unmappable: bool,
    ) -> Result<Reply, Refusal> {
        self.session_of(caller)?;
        for id in ids {
            let Some(key) = self.lease_ids.get(id) else {
                continue;
            };
            let lease = &self.leases[*key];
            if lease.lessee != caller.session && !lease.readers.contains(&caller.session) {
                return Err(Refusal::NotYours {
                    what: "lease",
                    which: id.to_string(),
                });
            }
        }
        for id in ids {
            let Some(key) = self.lease_ids.get(id).copied() else {
                continue;
            };
            if unmappable {
                self.cannot_map(caller.session, self.leases[key].region);
            }
            if self.leases[key].lessee == caller.session {
                self.lessee_lets_go(key, RevokeReason::Released);
            } else {
                self.let_go(key, caller.session);
            }
        }
        Ok(Reply::Done)
    }

    /// The processes that may touch the lease's slab, in order and once each.
    pub(super) fn pids_of(&self, key: Key<Lease>) -> Vec<u32> {
        let pids: BTreeSet<_> = self.leases[key]
            .parties()
            .filter_map(|party| self.sessions.get(&party))
            .map(|session| session.process.pid)
            .collect();
        pids.into_iter().collect()
    }
}
