//! The prefix index: which published block lies in which slot of which lease, per namespace.
//!
//! A namespace's table holds only where a block lies (8 bytes); its hash is kept once, in the lease's slots. A block
//! is in the table if and only if it is in the slots of a lease of the namespace. A block lies in several leases only
//! where their lessees cannot read each other's.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::BuildHasher,
    ops::Bound,
    sync::Arc,
};

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use swiftcache_proto::domain::{BlockHash, Medium};

use super::{
    arena::{Arena, Beside, LeaseKey, NamespaceKey, OfLease, OfNamespace},
    check::hold,
    journal::{Change, Journal, Scope},
    quotas::is_of,
    slots::BlockSlots,
};

/// Where a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) lease: LeaseKey,
    pub(super) slot: u32,
}

/// What lookups in a namespace came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Looked {
    pub(super) lookups: u64,
    /// Blocks they asked for.
    pub(super) blocks: u64,
    /// Blocks they found.
    pub(super) hits: u64,
}

/// What makes two blocks interchangeable: a tenant and a model fingerprint. Known while it has leases.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    scope: Arc<Scope>,
    table: HashTable<Location>,
    /// Blocks in the table beyond the first of each hash.
    copies: u64,
    leases: BTreeSet<LeaseKey>,
    leased_bytes: u64,
    looked: Looked,
}

impl Namespace {
    pub(super) fn tenant(&self) -> &Arc<str> {
        &self.scope.tenant
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.scope.namespace
    }

    /// Whose blocks it has.
    pub(super) fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    /// Its published blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.table.len() as u64
    }

    /// Whether some block lies in several leases.
    pub(super) fn has_copies(&self) -> bool {
        self.copies > 0
    }

    /// Its leases, revoked ones included.
    pub(super) fn leases(&self) -> &BTreeSet<LeaseKey> {
        &self.leases
    }

    /// Bytes of its leases.
    pub(super) fn leased_bytes(&self) -> u64 {
        self.leased_bytes
    }

    pub(super) fn looked(&self) -> Looked {
        self.looked
    }
}

/// The published blocks of one lease.
#[derive(Clone, Debug)]
struct Shelved {
    namespace: NamespaceKey,
    /// The kind of memory that its slab is.
    medium: Medium,
    blocks: BlockSlots,
}

/// All namespaces.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    namespaces: Arena<OfNamespace, Namespace>,
    /// By tenant, then name.
    names: BTreeMap<Arc<str>, BTreeMap<Arc<str>, NamespaceKey>>,
    slots: Beside<OfLease, Shelved>,
    /// Blocks in all tables.
    blocks: u64,
    hasher: RandomState,
}

fn hash_in(slots: &Beside<OfLease, Shelved>, at: Location) -> Option<&BlockHash> {
    slots.get(at.lease)?.blocks.get(at.slot)
}

/// How a table finds an entry's digest anew.
fn digests<'a>(
    hasher: &'a RandomState,
    slots: &'a Beside<OfLease, Shelved>,
) -> impl Fn(&Location) -> u64 + 'a {
    |at| {
        let hash = hash_in(slots, *at).map_or([0; 16], |hash| hash.0);
        hasher.hash_one(u128::from_ne_bytes(hash))
    }
}

impl Index {
    /// Blocks that are published.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn namespace(&self, key: NamespaceKey) -> &Namespace {
        &self.namespaces[key]
    }

    /// All namespaces by tenant and name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (NamespaceKey, &Namespace)> {
        self.after(None)
    }

    /// The namespaces by tenant and name, from the one after that of this tenant and name on.
    pub(super) fn after<'a>(
        &'a self,
        after: Option<(&'a str, &'a str)>,
    ) -> impl Iterator<Item = (NamespaceKey, &'a Namespace)> {
        let tenant = after.map_or(Bound::Unbounded, |(tenant, _)| Bound::Included(tenant));
        let tenants = self.names.range::<str, _>((tenant, Bound::Unbounded));
        let keys = tenants.flat_map(move |(tenant, names)| {
            let within = after.filter(|(of, _)| *of == &**tenant);
            let name = within.map_or(Bound::Unbounded, |(_, name)| Bound::Excluded(name));
            names.range::<str, _>((name, Bound::Unbounded))
        });
        keys.map(|(_, key)| (*key, &self.namespaces[*key]))
    }

    pub(super) fn find_namespace(&self, tenant: &str, name: &str) -> Option<NamespaceKey> {
        self.names.get(tenant)?.get(name).copied()
    }

    /// What all namespaces of a tenant hold, bytes. A user's own tenant includes those under the user's labels.
    pub(super) fn held_by(&self, tenant: &str) -> u64 {
        let tenants = self
            .names
            .range::<str, _>((Bound::Included(tenant), Bound::Unbounded));
        let tenants = tenants.take_while(|(name, _)| name.starts_with(tenant));
        let its = tenants.filter(|(name, _)| is_of(name, tenant));
        let keys = its.flat_map(|(_, names)| names.values());
        keys.map(|key| self.namespaces[*key].leased_bytes).sum()
    }

    /// The blocks in all namespaces of a user, under all labels.
    pub(super) fn blocks_of(&self, user: &str) -> u64 {
        let of_user = |namespace: &&Namespace| is_of(namespace.tenant(), user);
        let its = self.after(None).map(|(_, namespace)| namespace);
        its.filter(of_user).map(Namespace::blocks).sum()
    }

    /// The namespace, made known if it was not.
    pub(super) fn open(&mut self, tenant: &Arc<str>, name: &Arc<str>) -> NamespaceKey {
        let names = self.names.entry(tenant.clone()).or_default();
        *names.entry(name.clone()).or_insert_with(|| {
            self.namespaces.insert(Namespace {
                scope: Arc::new(Scope {
                    tenant: tenant.clone(),
                    namespace: name.clone(),
                }),
                table: HashTable::new(),
                copies: 0,
                leases: BTreeSet::new(),
                leased_bytes: 0,
                looked: Looked::default(),
            })
        })
    }

    /// A namespace has a lease more, of so many bytes and slots in this kind of memory.
    pub(super) fn add_lease(
        &mut self,
        lease: LeaseKey,
        namespace: NamespaceKey,
        bytes: u64,
        slots: u32,
        medium: Medium,
    ) {
        let its = &mut self.namespaces[namespace];
        its.leases.insert(lease);
        its.leased_bytes += bytes;
        let blocks = BlockSlots::new(slots);
        let shelved = Shelved {
            namespace,
            medium,
            blocks,
        };
        self.slots.insert(lease, shelved);
    }

    /// A lease that has no blocks any more is over; forgets its namespace with its last one.
    pub(super) fn remove_lease(&mut self, lease: LeaseKey, bytes: u64) {
        let Some(Shelved { namespace, .. }) = self.slots.remove(lease) else {
            return;
        };
        let its = &mut self.namespaces[namespace];
        its.leases.remove(&lease);
        its.leased_bytes -= bytes;
        if !its.leases.is_empty() {
            return;
        }
        let namespace = self.namespaces.remove(namespace);
        if let Some(names) = self.names.get_mut(namespace.tenant()) {
            names.remove(namespace.name());
            if names.is_empty() {
                self.names.remove(namespace.tenant());
            }
        }
    }

    /// How many slots a lease has.
    pub(super) fn slots(&self, lease: LeaseKey) -> u32 {
        self.slots[lease].blocks.slots()
    }

    /// How many of them hold a published block.
    pub(super) fn published(&self, lease: LeaseKey) -> u32 {
        self.slots[lease].blocks.published()
    }

    /// The published blocks of a lease, by slot.
    pub(super) fn blocks_in(&self, lease: LeaseKey) -> impl Iterator<Item = (u32, &BlockHash)> {
        self.slots[lease].blocks.iter()
    }

    /// The published blocks of a lease from a slot on, by slot.
    pub(super) fn blocks_from(
        &self,
        lease: LeaseKey,
        slot: u32,
    ) -> impl Iterator<Item = (u32, &BlockHash)> {
        self.slots[lease].blocks.iter_from(slot)
    }

    /// The kind of memory that a lease's slab is.
    pub(super) fn medium(&self, lease: LeaseKey) -> Medium {
        self.slots[lease].medium
    }

    /// The block in a slot of a lease.
    pub(super) fn block(&self, at: Location) -> Option<&BlockHash> {
        hash_in(&self.slots, at)
    }

    fn digest(&self, hash: &BlockHash) -> u64 {
        self.hasher.hash_one(u128::from_ne_bytes(hash.0))
    }

    /// Where the blocks of this hash lie, in no particular order.
    pub(super) fn find<'a>(
        &'a self,
        namespace: NamespaceKey,
        hash: &'a BlockHash,
    ) -> impl Iterator<Item = Location> + 'a {
        let table = &self.namespaces[namespace].table;
        let same = move |at: &&Location| self.block(**at) == Some(hash);
        table.iter_hash(self.digest(hash)).filter(same).copied()
    }

    /// Publishes a block in an empty slot.
    pub(super) fn insert(&mut self, journal: &mut Journal, hash: BlockHash, at: Location) {
        let Shelved {
            namespace, medium, ..
        } = self.slots[at.lease];
        let copy = self.find(namespace, &hash).next().is_some();
        self.slots[at.lease].blocks.set(at.slot, hash);
        let digest = self.digest(&hash);
        let namespace = &mut self.namespaces[namespace];
        let rehash = digests(&self.hasher, &self.slots);
        namespace.table.insert_unique(digest, at, rehash);
        namespace.copies += u64::from(copy);
        self.blocks += 1;
        // Also where it has a copy already: who reads the index meanwhile may have passed this slot, and not reach that one
        // before it is empty.
        journal.push(Change {
            scope: namespace.scope.clone(),
            medium,
            hash,
            added: true,
        });
    }

    /// Takes the block in a slot out of the table and out of the slot. False when there is none.
    pub(super) fn remove(&mut self, journal: &mut Journal, at: Location) -> bool {
        let Some(hash) = self.slots[at.lease].blocks.clear(at.slot) else {
            return false;
        };
        let digest = self.digest(&hash);
        let Shelved {
            namespace, medium, ..
        } = self.slots[at.lease];
        let table = &mut self.namespaces[namespace].table;
        if let Ok(entry) = table.find_entry(digest, |entry| *entry == at) {
            entry.remove();
            self.blocks -= 1;
            let (mut copy, mut there) = (false, false);
            for other in self.find(namespace, &hash) {
                copy = true;
                there |= self.medium(other.lease) == medium;
            }
            self.namespaces[namespace].copies -= u64::from(copy);
            if !there {
                journal.push(Change {
                    scope: self.namespaces[namespace].scope.clone(),
                    medium,
                    hash,
                    added: false,
                });
            }
        }
        true
    }

    /// Takes all blocks of a lease out, and says how many there were.
    pub(super) fn clear(&mut self, journal: &mut Journal, lease: LeaseKey) -> u64 {
        let blocks = &self.slots[lease].blocks;
        let slots: Vec<_> = blocks.iter().map(|(slot, _)| slot).collect();
        for slot in &slots {
            self.remove(journal, Location { lease, slot: *slot });
        }
        self.shrink(self.slots[lease].namespace);
        slots.len() as u64
    }

    /// Gives back a table's memory once most of it is unused.
    fn shrink(&mut self, namespace: NamespaceKey) {
        let table = &mut self.namespaces[namespace].table;
        if table.capacity() > 1_024 && table.len() < table.capacity() / 8 {
            let target = table.len() * 2;
            table.shrink_to(target, digests(&self.hasher, &self.slots));
        }
    }

    /// Counts a lookup.
    pub(super) fn looked(&mut self, namespace: NamespaceKey, blocks: u64, hits: u64) {
        let looked = &mut self.namespaces[namespace].looked;
        looked.lookups += 1;
        looked.blocks += blocks;
        looked.hits += hits;
    }

    /// Bytes on the heap behind the tables and the slots.
    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        let tables = self.namespaces.iter();
        let tables = tables.map(|(_, namespace)| namespace.table.allocation_size());
        let slots = self.slots.iter().map(|(_, its)| its.blocks.heap_bytes());
        tables.chain(slots).sum()
    }

    /// Verifies that tables and slots name the same blocks, and that they are counted right.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut blocks = 0;
        let mut hashes: BTreeMap<NamespaceKey, BTreeSet<BlockHash>> = BTreeMap::new();
        let mut leases: BTreeMap<NamespaceKey, BTreeSet<LeaseKey>> = BTreeMap::new();
        let mut published: BTreeMap<NamespaceKey, u64> = BTreeMap::new();
        for (key, its) in self.slots.iter() {
            let counted = its.blocks.iter().count() as u64;
            hold!(
                counted == u64::from(its.blocks.published()),
                "lease {key:?} miscounts its blocks"
            );
            for (slot, hash) in its.blocks.iter() {
                hold!(
                    slot < its.blocks.slots(),
                    "lease {key:?} has no slot {slot}"
                );
                let at = Location { lease: key, slot };
                let filed = self.find(its.namespace, hash).any(|other| other == at);
                hold!(filed, "slot {slot} of lease {key:?} is not in the index");
                hashes.entry(its.namespace).or_default().insert(*hash);
            }
            blocks += counted;
            *published.entry(its.namespace).or_default() += counted;
            leases.entry(its.namespace).or_default().insert(key);
        }
        for (key, namespace) in self.iter() {
            let name = namespace.name();
            let counted = published.get(&key).copied().unwrap_or(0);
            hold!(
                counted == namespace.blocks(),
                "namespace {name} has other blocks"
            );
            let distinct = hashes.get(&key).map_or(0, BTreeSet::len) as u64;
            hold!(
                counted == distinct + namespace.copies,
                "namespace {name} miscounts its copies"
            );
            let its = leases.remove(&key).unwrap_or_default();
            hold!(its == namespace.leases, "namespace {name} has other leases");
            hold!(!its.is_empty(), "namespace {name} has no lease");
        }
        hold!(leases.is_empty(), "a lease is of no namespace");
        hold!(blocks == self.blocks, "indexed blocks are miscounted");
        Ok(())
    }
}
