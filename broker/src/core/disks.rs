//! Disks: which blocks lie on which, which are to be written there, and which a lookup wanted back.
//!
//! A disk is a session's. What it says concerns its own tenant only, and so does what it is told.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use swiftcache_proto::domain::{BlockHash, SessionId};

use super::{borrowers::Kept, check::hold, event::DiskState};

/// Blocks that wait to be written to one disk. Those beyond are written when they come to host memory again.
const MOST_TO_STORE: usize = 1 << 20;
/// Blocks that wait to be brought back from one disk. Those beyond are wanted again by the next lookup.
const MOST_WANTED: usize = 1 << 16;

/// Blocks by namespace, in the order in which they were named.
type Queue = VecDeque<(Arc<str>, BlockHash)>;

#[derive(Clone, Debug)]
pub(super) struct Disk {
    tenant: Arc<str>,
    name: String,
    state: DiskState,
    namespaces: BTreeMap<Arc<str>, OnDisk>,
    to_store: Queue,
    wanted: Queue,
    /// What its agent has taken of `wanted` and not dealt with.
    taken: Vec<(Arc<str>, BlockHash)>,
    /// What is in `wanted` or in `taken`.
    asked: BTreeMap<Arc<str>, Kept>,
    asked_blocks: u64,
}

#[derive(Clone, Debug, Default)]
struct OnDisk {
    block_bytes: u64,
    blocks: Kept,
}

impl Disk {
    pub(super) fn tenant(&self) -> &Arc<str> {
        &self.tenant
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn state(&self) -> &DiskState {
        &self.state
    }

    pub(super) fn blocks(&self) -> u64 {
        let counts = self.namespaces.values().map(|its| its.blocks.len());
        counts.sum::<usize>() as u64
    }

    pub(super) fn to_store(&self) -> u64 {
        self.to_store.len() as u64
    }

    pub(super) fn wanted(&self) -> u64 {
        (self.wanted.len() + self.taken.len()) as u64
    }

    pub(super) fn asked(&self) -> u64 {
        self.asked_blocks
    }

    pub(super) fn has(&self, namespace: &str, hash: &BlockHash) -> bool {
        let its = self.namespaces.get(namespace);
        its.is_some_and(|its| its.blocks.contains(hash))
    }

    /// Bytes of a block of a namespace.
    pub(super) fn block_bytes(&self, namespace: &str) -> Option<u64> {
        let its = self.namespaces.get(namespace)?;
        Some(its.block_bytes)
    }

    /// How many blocks of a namespace it can have in host memory at a time.
    pub(super) fn most(&self, namespace: &str) -> u64 {
        let bytes = self.block_bytes(namespace).unwrap_or(u64::MAX).max(1);
        self.state.memory_bytes / bytes
    }

    /// How long it takes to bring back what was wanted, milliseconds; 0 when nobody knows.
    pub(super) fn wait_ms(&self, namespace: &str) -> u32 {
        let bytes = self.wanted() * self.block_bytes(namespace).unwrap_or(0);
        match self.state.bytes_per_second {
            0 => 0,
            rate => u32::try_from(bytes.saturating_mul(1_000) / rate)
                .unwrap_or(u32::MAX)
                .max(1),
        }
    }

    /// A block lies in host memory. False when there is nothing to write.
    fn offer(&mut self, namespace: &Arc<str>, hash: BlockHash) -> bool {
        let new = !self.has(namespace, &hash) && self.to_store.len() < MOST_TO_STORE;
        if new {
            self.to_store.push_back((Arc::clone(namespace), hash));
        }
        new
    }
}

/// All disks.
#[derive(Clone, Debug, Default)]
pub(super) struct Disks {
    by_session: BTreeMap<SessionId, Disk>,
    by_tenant: BTreeMap<Arc<str>, BTreeSet<SessionId>>,
    /// The blocks on all of them.
    blocks: u64,
}

impl Disks {
    pub(super) fn get(&self, session: SessionId) -> Option<&Disk> {
        self.by_session.get(&session)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SessionId, &Disk)> {
        self.by_session.iter().map(|(id, disk)| (*id, disk))
    }

    /// The disks of a tenant.
    pub(super) fn of(&self, tenant: &str) -> impl Iterator<Item = (SessionId, &Disk)> {
        let ids = self.by_tenant.get(tenant).into_iter().flatten();
        ids.map(|id| (*id, &self.by_session[id]))
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// A session has a disk, without a block so far.
    pub(super) fn open(&mut self, session: SessionId, tenant: Arc<str>, name: String) {
        self.close(session);
        self.by_tenant
            .entry(Arc::clone(&tenant))
            .or_default()
            .insert(session);
        let disk = Disk {
            tenant,
            name,
            state: DiskState::default(),
            namespaces: BTreeMap::new(),
            to_store: Queue::new(),
            wanted: Queue::new(),
            taken: Vec::new(),
            asked: BTreeMap::new(),
            asked_blocks: 0,
        };
        self.by_session.insert(session, disk);
    }

    pub(super) fn close(&mut self, session: SessionId) {
        let Some(disk) = self.by_session.remove(&session) else {
            return;
        };
        self.blocks -= disk.blocks();
        if let Some(its) = self.by_tenant.get_mut(&disk.tenant) {
            its.remove(&session);
            if its.is_empty() {
                self.by_tenant.remove(&disk.tenant);
            }
        }
    }

    pub(super) fn set_state(&mut self, session: SessionId, state: DiskState) {
        if let Some(disk) = self.by_session.get_mut(&session) {
            disk.state = state;
        }
    }

    /// Blocks of a namespace that lie on a disk now, and some that do not any more.
    pub(super) fn keep(
        &mut self,
        session: SessionId,
        namespace: &str,
        block_bytes: u64,
        stored: Vec<BlockHash>,
        dropped: &[BlockHash],
    ) {
        let Some(disk) = self.by_session.get_mut(&session) else {
            return;
        };
        let its = disk.namespaces.entry(namespace.into()).or_default();
        let before = its.blocks.len();
        its.block_bytes = block_bytes;
        for hash in dropped {
            its.blocks.remove(hash);
        }
        its.blocks.extend(stored);
        self.blocks = self.blocks + its.blocks.len() as u64 - before as u64;
        if its.blocks.is_empty() {
            disk.namespaces.remove(namespace);
        }
    }

    /// Blocks lie in host memory. Says how many of them some disk of the tenant has to write. Those that the disk's own session put
    /// there come from it.
    pub(super) fn offer(
        &mut self,
        tenant: &str,
        namespace: &Arc<str>,
        by: SessionId,
        hashes: &[BlockHash],
    ) -> u32 {
        let ids = self.by_tenant.get(tenant).into_iter().flatten();
        let mut queued = 0;
        for id in ids.filter(|id| **id != by) {
            if let Some(disk) = self.by_session.get_mut(id) {
                let new = hashes.iter().filter(|hash| disk.offer(namespace, **hash));
                queued += new.count() as u32;
            }
        }
        queued
    }

    /// A lookup wants a block back. False when it is on its way already, or too many are.
    pub(super) fn want(
        &mut self,
        session: SessionId,
        namespace: &Arc<str>,
        hash: BlockHash,
    ) -> bool {
        let Some(disk) = self.by_session.get_mut(&session) else {
            return false;
        };
        if disk.wanted.len() >= MOST_WANTED {
            return false;
        }
        let asked = disk.asked.entry(Arc::clone(namespace)).or_default();
        let new = asked.insert(hash);
        if new {
            disk.wanted.push_back((Arc::clone(namespace), hash));
            disk.asked_blocks += 1;
        }
        new
    }

    /// Up to `most` blocks to write.
    pub(super) fn take_to_store(
        &mut self,
        session: SessionId,
        most: usize,
    ) -> Vec<(Arc<str>, BlockHash)> {
        let Some(disk) = self.by_session.get_mut(&session) else {
            return Vec::new();
        };
        let count = disk.to_store.len().min(most);
        let mut taken: Vec<_> = disk.to_store.drain(..count).collect();
        taken.retain(|(namespace, hash)| !disk.has(namespace, hash));
        taken
    }

    /// Blocks that cannot be written yet.
    pub(super) fn put_back(&mut self, session: SessionId, blocks: Vec<(Arc<str>, BlockHash)>) {
        if let Some(disk) = self.by_session.get_mut(&session) {
            disk.to_store.extend(blocks);
        }
    }

    /// Up to `most` blocks to bring back. Those that were taken before are dealt with: they may be wanted again.
    pub(super) fn take_wanted(
        &mut self,
        session: SessionId,
        most: usize,
    ) -> Vec<(Arc<str>, BlockHash)> {
        let Some(disk) = self.by_session.get_mut(&session) else {
            return Vec::new();
        };
        for (namespace, hash) in std::mem::take(&mut disk.taken) {
            if let Some(asked) = disk.asked.get_mut(&namespace) {
                asked.remove(&hash);
                if asked.is_empty() {
                    disk.asked.remove(&namespace);
                }
            }
        }
        let count = disk.wanted.len().min(most);
        disk.taken = disk.wanted.drain(..count).collect();
        disk.taken.clone()
    }

    /// Verifies what is counted, and that every disk's session satisfies `lives`.
    pub(super) fn check(&self, lives: impl Fn(SessionId) -> bool) -> Result<(), String> {
        let blocks: u64 = self.by_session.values().map(Disk::blocks).sum();
        hold!(blocks == self.blocks, "blocks on disks are miscounted");
        let filed: usize = self.by_tenant.values().map(BTreeSet::len).sum();
        hold!(filed == self.by_session.len(), "disks are misfiled");
        for (id, disk) in &self.by_session {
            hold!(lives(*id), "disk {} belongs to nobody", disk.name);
            let its = self.by_tenant.get(&disk.tenant);
            hold!(
                its.is_some_and(|its| its.contains(id)),
                "disk {} is not its tenant's",
                disk.name
            );
            let asked: usize = disk.asked.values().map(Kept::len).sum();
            hold!(
                asked == disk.wanted.len() + disk.taken.len(),
                "disk {} miscounts what is wanted",
                disk.name
            );
        }
        Ok(())
    }
}
