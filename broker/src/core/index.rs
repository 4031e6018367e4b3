//! The prefix index: which published block lies in which slot of which lease, per namespace.
//!
//! A namespace's table holds only where a block lies (8 bytes); its hash is kept once, in the lease's slots. A block
//! is in the table if and only if it is in the slots of an active lease of the namespace. A block lies in several leases
//! only where their lessees cannot read each other's.

use std::{collections::BTreeMap, hash::BuildHasher, sync::Arc};

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use swiftcache_proto::domain::{BlockHash, Generation, LeaseId};

use super::{
    Caller, Note, Publish, Refusal, Reply,
    arena::{Arena, Key},
    leases::Lease,
    state::State,
};

/// Where a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) lease: Key<Lease>,
    pub(super) slot: u32,
}

/// What makes two blocks interchangeable: a tenant and a model fingerprint. Known while it has leases.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    pub(super) tenant: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) table: HashTable<Location>,
    /// Blocks in the table beyond the first of each hash.
    pub(super) copies: u64,
    pub(super) leases: u32,
    pub(super) leased_bytes: u64,
    /// Of leases whose lessees hold them and need not let go, bytes: what fairness counts.
    pub(super) active_bytes: u64,
    pub(super) lookups: u64,
    pub(super) lookup_blocks: u64,
    pub(super) hit_blocks: u64,
}

/// All namespaces.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    namespaces: Arena<Namespace>,
    /// By tenant, then name.
    names: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Key<Namespace>>>,
    /// Blocks in all tables.
    blocks: u64,
    hasher: RandomState,
}

fn hash_in(leases: &Arena<Lease>, at: Location) -> Option<&BlockHash> {
    leases.get(at.lease)?.blocks.get(at.slot)
}

impl Index {
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn namespace(&self, key: Key<Namespace>) -> &Namespace {
        &self.namespaces[key]
    }

    pub(super) fn namespace_mut(&mut self, key: Key<Namespace>) -> &mut Namespace {
        &mut self.namespaces[key]
    }

    /// All namespaces by tenant and name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key<Namespace>, &Namespace)> {
        let keys = self.names.values().flat_map(BTreeMap::values);
        keys.map(|key| (*key, &self.namespaces[*key]))
    }

    pub(super) fn find_namespace(&self, tenant: &str, name: &str) -> Option<Key<Namespace>> {
        self.names.get(tenant)?.get(name).copied()
    }

    /// What all namespaces of a tenant hold, bytes.
    pub(super) fn held_by(&self, tenant: &str) -> u64 {
        let keys = self
            .names
            .get(tenant)
            .into_iter()
            .flat_map(BTreeMap::values);
        keys.map(|key| self.namespaces[*key].leased_bytes).sum()
    }

    /// The namespace, made known if it was not.
    pub(super) fn open(&mut self, tenant: &Arc<str>, name: &Arc<str>) -> Key<Namespace> {
        let names = self.names.entry(tenant.clone()).or_default();
        *names.entry(name.clone()).or_insert_with(|| {
            self.namespaces.insert(Namespace {
                tenant: tenant.clone(),
                name: name.clone(),
                table: HashTable::new(),
                copies: 0,
                leases: 0,
                leased_bytes: 0,
                active_bytes: 0,
                lookups: 0,
                lookup_blocks: 0,
                hit_blocks: 0,
            })
        })
    }

    /// Counts a lease of the namespace.
    pub(super) fn charge(&mut self, key: Key<Namespace>, bytes: u64) {
        let namespace = &mut self.namespaces[key];
        namespace.leases += 1;
        namespace.leased_bytes += bytes;
    }

    /// A lease of the namespace is over; forgets the namespace with its last one.
    pub(super) fn discharge(&mut self, key: Key<Namespace>, bytes: u64) {
        let namespace = &mut self.namespaces[key];
        namespace.leases -= 1;
        namespace.leased_bytes -= bytes;
        if namespace.leases > 0 {
            return;
        }
        let namespace = self.namespaces.remove(key);
        if let Some(names) = self.names.get_mut(&namespace.tenant) {
            names.remove(&namespace.name);
            if names.is_empty() {
                self.names.remove(&namespace.tenant);
            }
        }
    }

    fn digest(&self, hash: &BlockHash) -> u64 {
        self.hasher.hash_one(u128::from_ne_bytes(hash.0))
    }

    /// Where the blocks of this hash lie, in no particular order.
    pub(super) fn find<'a>(
        &'a self,
        leases: &'a Arena<Lease>,
        namespace: Key<Namespace>,
        hash: &'a BlockHash,
    ) -> impl Iterator<Item = Location> + 'a {
        let table = &self.namespaces[namespace].table;
        let same = move |at: &&Location| hash_in(leases, **at) == Some(hash);
        table.iter_hash(self.digest(hash)).filter(same).copied()
    }

    /// Puts a block into an empty slot and into the table.
    fn insert(&mut self, leases: &mut Arena<Lease>, hash: BlockHash, at: Location) {
        let namespace = leases[at.lease].namespace;
        let copy = self.find(leases, namespace, &hash).next().is_some();
        leases[at.lease].blocks.set(at.slot, hash);
        let digest = self.digest(&hash);
        let hasher = self.hasher.clone();
        let rehash = |at: &Location| {
            let hash = hash_in(leases, *at).map_or([0; 16], |hash| hash.0);
            hasher.hash_one(u128::from_ne_bytes(hash))
        };
        let namespace = &mut self.namespaces[namespace];
        namespace.table.insert_unique(digest, at, rehash);
        namespace.copies += u64::from(copy);
        self.blocks += 1;
    }

    /// Takes the block in a slot out of the table and out of the slot.
    fn remove(&mut self, leases: &mut Arena<Lease>, at: Location) -> bool {
        let Some(hash) = leases[at.lease].blocks.clear(at.slot) else {
            return false;
        };
        let digest = self.digest(&hash);
        let namespace = leases[at.lease].namespace;
        let table = &mut self.namespaces[namespace].table;
        if let Ok(entry) = table.find_entry(digest, |entry| *entry == at) {
            entry.remove();
            self.blocks -= 1;
            let copy = self.find(leases, namespace, &hash).next().is_some();
            self.namespaces[namespace].copies -= u64::from(copy);
        }
        true
    }

    /// Gives back a table's memory once most of it is unused.
    fn shrink(&mut self, leases: &Arena<Lease>, namespace: Key<Namespace>) {
        let hasher = self.hasher.clone();
        let table = &mut self.namespaces[namespace].table;
        if table.capacity() > 1_024 && table.len() < table.capacity() / 8 {
            let target = table.len() * 2;
            table.shrink_to(target, |at| {
                let hash = hash_in(leases, *at).map_or([0; 16], |hash| hash.0);
                hasher.hash_one(u128::from_ne_bytes(hash))
            });
        }
    }

    /// Bytes on the heap behind the tables.
    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        let tables = self.namespaces.iter();
        tables
            .map(|(_, namespace)| namespace.table.allocation_size())
            .sum()
    }
}

impl State {
    pub(super) fn publish(&mut self, publish: Publish) -> Result<Reply, Refusal> {
        let key = self.active_lease_of(publish.caller, publish.lease, publish.generation)?;
        self.publishable(key, &publish.blocks)?;
        let namespace = self.leases[key].namespace;
        let publisher = self.publisher(key);
        let mut duplicates = Vec::new();
        let mut published = 0;
        for (number, (hash, slot)) in (0..).zip(publish.blocks) {
            let at = Location { lease: key, slot };
            // Said again.
            if self.leases[key].blocks.get(slot) == Some(&hash) {
                continue;
            }
            let mut places = self.index.find(&self.leases, namespace, &hash);
            if places.any(|other| self.rank_for(&publisher, other.lease).is_some()) {
                duplicates.push(number);
                continue;
            }
            drop(places);
            self.index.insert(&mut self.leases, hash, at);
            published += 1;
        }
        let region = self.leases[key].region;
        self.regions[region].published += u64::from(published);
        self.counters.published_blocks += u64::from(published);
        self.note(Note::Published { blocks: published });
        Ok(Reply::Published { duplicates })
    }

    /// Whether every block has an empty slot of its own, or lies there already.
    fn publishable(&self, key: Key<Lease>, blocks: &[(BlockHash, u32)]) -> Result<(), Refusal> {
        let invalid = |problem| {
            Err(Refusal::Invalid {
                field: "slots",
                problem,
            })
        };
        let slots = &self.leases[key].blocks;
        for (hash, slot) in blocks {
            if *slot >= slots.slots() {
                return invalid(format!("names slot {slot} of {}", slots.slots()));
            }
            if slots.get(*slot).is_some_and(|held| held != hash) {
                return invalid(format!(
                    "names slot {slot}, which holds another block; unpublish it first"
                ));
            }
        }
        let mut named: Vec<_> = blocks.iter().map(|(_, slot)| *slot).collect();
        named.sort_unstable();
        if let Some(twice) = named.windows(2).find(|pair| pair[0] == pair[1]) {
            return invalid(format!("names slot {} twice", twice[0]));
        }
        let findable = self.index.blocks() + self.borrowers.kept() + blocks.len() as u64;
        if findable > self.config.max_blocks {
            return Err(Refusal::Limit {
                what: "indexed blocks",
                limit: self.config.max_blocks,
            });
        }
        Ok(())
    }

    pub(super) fn unpublish(
        &mut self,
        caller: Caller,
        lease: LeaseId,
        generation: Generation,
        slots: &[u32],
    ) -> Result<Reply, Refusal> {
        let key = self.active_lease_of(caller, lease, generation)?;
        let most = self.leases[key].blocks.slots();
        if let Some(slot) = slots.iter().find(|slot| **slot >= most) {
            return Err(Refusal::Invalid {
                field: "slots",
                problem: format!("names slot {slot} of {most}"),
            });
        }
        let mut blocks = 0;
        for slot in slots {
            let at = Location {
                lease: key,
                slot: *slot,
            };
            blocks += u32::from(self.index.remove(&mut self.leases, at));
        }
        let region = self.leases[key].region;
        self.regions[region].published -= u64::from(blocks);
        let (pinned, retry_ms) = self.pinned_among(key, slots);
        self.note(Note::Unpublished { blocks });
        Ok(Reply::Unpublished { pinned, retry_ms })
    }

    /// Drops all blocks of a lease from the index; pins on its slots stay.
    pub(super) fn forget_blocks(&mut self, key: Key<Lease>) -> u64 {
        let slots: Vec<_> = self.leases[key]
            .blocks
            .iter()
            .map(|(slot, _)| slot)
            .collect();
        for slot in &slots {
            let at = Location {
                lease: key,
                slot: *slot,
            };
            self.index.remove(&mut self.leases, at);
        }
        let lease = &self.leases[key];
        self.regions[lease.region].published -= slots.len() as u64;
        self.index.shrink(&self.leases, lease.namespace);
        slots.len() as u64
    }

    /// Drops all blocks of a namespace from the index.
    pub(super) fn forget_namespace(&mut self, namespace: Key<Namespace>) -> u64 {
        let leases: Vec<_> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.namespace == namespace)
            .map(|(key, _)| key)
            .collect();
        leases.into_iter().map(|key| self.forget_blocks(key)).sum()
    }
}
