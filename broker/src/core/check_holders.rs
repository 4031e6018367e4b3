//! The invariants of those who hold slabs: leases, the index, pins and sessions.

use std::collections::{BTreeMap, BTreeSet};

use super::{arena::Key, check::hold, leases::Phase, regions::Region, state::State};

impl State {
    /// Every lease is held by somebody who knows it; an active one by its lessee.
    pub(super) fn check_leases(&self) -> Result<(), String> {
        hold!(
            self.lease_ids.len() == self.leases.len(),
            "a lease has two ids"
        );
        let mut draining = BTreeSet::new();
        for (id, key) in &self.lease_ids {
            let lease = &self.leases[*key];
            hold!(lease.id == *id, "lease {id} is filed under another id");
            hold!(id.0 < self.next_lease, "lease {id} will be granted again");
            hold!(
                lease.parties().next().is_some(),
                "lease {id} is held by nobody"
            );
            if lease.phase == Phase::Active {
                hold!(
                    lease.lessee_holds,
                    "lease {id} is active without its lessee"
                );
            }
            if let Phase::Draining(revocation) = lease.phase {
                draining.insert((revocation.deadline, *id));
            }
            for reader in &lease.readers {
                let session = self.sessions.get(reader);
                let knows = session.is_some_and(|session| session.reads.contains(id));
                hold!(knows, "{reader:?} does not know that it reads lease {id}");
            }
            let lessee = self.sessions.get(&lease.lessee);
            let knows = lessee.is_some_and(|session| session.leases.contains(id));
            hold!(
                knows == lease.lessee_holds,
                "lessee of {id} is mistaken about it"
            );
        }
        hold!(draining == self.draining, "drain windows are misfiled");
        Ok(())
    }

    /// The index and the slots name the same blocks, all of them in active leases.
    pub(super) fn check_index(&self) -> Result<(), String> {
        let mut blocks = 0;
        let mut counts: BTreeMap<_, (u32, u64, u64, u64)> = BTreeMap::new();
        let mut regions: BTreeMap<Key<Region>, u64> = BTreeMap::new();
        let mut hashes: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (key, lease) in self.leases.iter() {
            let id = lease.id;
            let published = lease.blocks.iter().count();
            hold!(
                published == lease.blocks.published() as usize,
                "lease {id} miscounts its blocks"
            );
            hold!(
                published == 0 || lease.phase == Phase::Active,
                "blocks of the revoked lease {id} can be found"
            );
            for (slot, hash) in lease.blocks.iter() {
                hold!(slot < lease.blocks.slots(), "lease {id} has no slot {slot}");
                let mut found = self.index.find(&self.leases, lease.namespace, hash);
                let here = found.any(|at| at.lease == key && at.slot == slot);
                hold!(here, "slot {slot} of lease {id} is not in the index");
                hashes.entry(lease.namespace).or_default().insert(*hash);
            }
            blocks += published as u64;
            let active = lease.phase == Phase::Active && lease.lessee_holds;
            let count = counts.entry(lease.namespace).or_default();
            *count = (
                count.0 + 1,
                count.1 + lease.bytes,
                count.2 + published as u64,
                count.3 + if active { lease.bytes } else { 0 },
            );
            *regions.entry(lease.region).or_default() += published as u64;
        }
        for (key, namespace) in self.index.iter() {
            let count = counts.remove(&key).unwrap_or_default();
            let known = (
                namespace.leases,
                namespace.leased_bytes,
                namespace.table.len() as u64,
                namespace.active_bytes,
            );
            hold!(count == known, "namespace {} is miscounted", namespace.name);
            let distinct = hashes.get(&key).map_or(0, BTreeSet::len) as u64;
            hold!(
                namespace.table.len() as u64 == distinct + namespace.copies,
                "namespace {} miscounts its copies",
                namespace.name
            );
            hold!(
                namespace.leases > 0,
                "namespace {} has no lease",
                namespace.name
            );
        }
        hold!(counts.is_empty(), "a lease is of no namespace");
        hold!(
            blocks == self.index.blocks(),
            "indexed blocks are miscounted"
        );
        for (key, region) in self.regions.iter() {
            let published = regions.get(&key).copied().unwrap_or(0);
            hold!(
                published == region.published,
                "region {} miscounts its blocks",
                region.id
            );
        }
        Ok(())
    }

    /// Pins are on known leases of other sessions, and every party of a pin knows it.
    pub(super) fn check_pins(&self) -> Result<(), String> {
        let mut on_leases = BTreeSet::new();
        let mut extents: BTreeMap<_, usize> = BTreeMap::new();
        for (id, pin) in &self.pins.live {
            hold!(!pin.spans.is_empty(), "{id:?} pins nothing");
            for span in &pin.spans {
                let Some(lease) = self.leases.get(span.lease) else {
                    return Err(format!("{id:?} is on a lease that is over"));
                };
                hold!(
                    lease.lessee != pin.session,
                    "{id:?} is on the session's own lease"
                );
                hold!(lease.phase == Phase::Active, "{id:?} is on a revoked lease");
                on_leases.insert((span.lease, *id));
            }
            let session = self.sessions.get(&pin.session);
            let knows = session.is_some_and(|session| session.pins.contains(id));
            hold!(knows, "{:?} does not know {id:?}", pin.session);
            *extents.entry(pin.session).or_default() += pin.weight;
        }
        let known = self
            .leases
            .iter()
            .flat_map(|(key, lease)| lease.pins.iter().map(move |pin| (key, *pin)));
        hold!(known.eq(on_leases), "leases are mistaken about their pins");
        for (id, session) in &self.sessions {
            let weight = extents.get(id).copied().unwrap_or(0);
            hold!(
                weight == session.pinned_extents,
                "{id:?} miscounts its pins"
            );
            let stale = session
                .pins
                .iter()
                .find(|pin| !self.pins.live.contains_key(pin));
            hold!(stale.is_none(), "{id:?} has a pin that is over");
        }
        Ok(())
    }

    /// Sessions hold, read and donate what the rest of the state says they do.
    pub(super) fn check_sessions(&self) -> Result<(), String> {
        for (id, session) in &self.sessions {
            let watched = self.processes.get(&session.process);
            let watched = watched.is_some_and(|sessions| sessions.contains(id));
            hold!(
                watched != session.over,
                "{id:?} is not watched as it should be"
            );
            if session.over {
                hold!(
                    !session.regions.is_empty(),
                    "{id:?} is over and has no region"
                );
                let holds = !session.leases.is_empty() || !session.reads.is_empty();
                hold!(!holds, "{id:?} is over and holds leases");
            }
            let (mut held, mut active) = (0, 0);
            for lease in &session.leases {
                let Some(key) = self.lease_ids.get(lease) else {
                    return Err(format!("{id:?} holds lease {lease}, which is over"));
                };
                let lease = &self.leases[*key];
                let mine = lease.lessee == *id && lease.lessee_holds;
                hold!(mine, "{id:?} does not hold lease {}", lease.id);
                held += lease.bytes;
                active += if lease.phase == Phase::Active {
                    lease.bytes
                } else {
                    0
                };
            }
            for region in &session.unmappable {
                let key = self.region_ids.get(region);
                let knows = key.is_some_and(|key| self.regions[*key].unmappable_by.contains(id));
                hold!(
                    knows,
                    "{id:?} cannot map region {region}, which does not know"
                );
            }
            for lease in &session.reads {
                let key = self.lease_ids.get(lease);
                let reads = key.is_some_and(|key| self.leases[*key].readers.contains(id));
                hold!(reads, "{id:?} does not read lease {lease}");
            }
            let mut donated = 0;
            for region in &session.regions {
                let Some(key) = self.region_ids.get(region) else {
                    return Err(format!("{id:?} donates region {region}, which is returned"));
                };
                hold!(
                    self.regions[*key].donor == *id,
                    "{id:?} does not donate {region}"
                );
                donated += self.regions[*key].bytes;
            }
            hold!(
                (held, active, donated)
                    == (
                        session.held_bytes,
                        session.active_bytes,
                        session.donated_bytes
                    ),
                "{id:?} miscounts its bytes"
            );
        }
        for (_, region) in self.regions.iter() {
            let donor = self.sessions.get(&region.donor);
            let knows = donor.is_some_and(|donor| donor.regions.contains(&region.id));
            hold!(knows, "region {} has no donor", region.id);
            for session in &region.unmappable_by {
                let session = self.sessions.get(session);
                let knows = session.is_some_and(|session| session.unmappable.contains(&region.id));
                hold!(
                    knows,
                    "region {} is unmappable by somebody who can",
                    region.id
                );
            }
        }
        let lives = |id| self.sessions.get(&id).is_some_and(|session| !session.over);
        self.borrowers.check(lives)?;
        hold!(
            self.waits.keys().all(|id| self.sessions.contains_key(id)),
            "somebody who is gone waits"
        );
        let empty = self.processes.values().any(BTreeSet::is_empty);
        hold!(!empty, "a process without sessions is watched");
        Ok(())
    }
}
