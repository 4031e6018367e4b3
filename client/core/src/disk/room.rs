//! The blocks of one namespace: by hash, in slots of its extents, and worth what [`Value`] says.

use std::collections::BTreeMap;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use swiftcache_proto::domain::{BlockHash, Medium};

use super::format::{Entry, Geometry};
use crate::cache::value::{BlockId, Value};

/// There is one list on a disk; which of the lists of [`Value`] it is makes no difference.
const LIST: Medium = Medium::Host;

/// Where a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Spot {
    pub(super) extent: u32,
    pub(super) slot: u32,
}

/// A block that is not there any more.
pub(super) type Gone = BlockHash;

#[derive(Clone, Copy, Debug)]
struct Block {
    spot: Option<Spot>,
    checksum: u64,
    before: Option<BlockHash>,
    /// When it was last used, on the count that all rooms share.
    used: u64,
    /// Its bytes are there.
    ready: bool,
    readers: u32,
}

#[derive(Debug)]
pub(super) struct Room {
    layer_bytes: Vec<u64>,
    geometry: Geometry,
    value: Value,
    blocks: Vec<Block>,
    unused: Vec<u32>,
    index: HashMap<BlockHash, u32, RandomState>,
    /// Of each extent: who lies in each slot.
    extents: BTreeMap<u32, Vec<Option<u32>>>,
    free: Vec<Spot>,
    /// Blocks whose bytes are there.
    ready: u64,
    last_used: u64,
}

impl Room {
    pub(super) fn new(layer_bytes: Vec<u64>, geometry: Geometry) -> Self {
        Self {
            layer_bytes,
            geometry,
            value: Value::default(),
            blocks: Vec::new(),
            unused: Vec::new(),
            index: HashMap::default(),
            extents: BTreeMap::new(),
            free: Vec::new(),
            ready: 0,
            last_used: 0,
        }
    }

    pub(super) fn layer_bytes(&self) -> &[u64] {
        &self.layer_bytes
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.layer_bytes.iter().sum()
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) fn extents(&self) -> usize {
        self.extents.len()
    }

    /// Blocks that can be found.
    pub(super) fn blocks(&self) -> u64 {
        self.ready
    }

    pub(super) fn last_used(&self) -> u64 {
        self.last_used
    }

    /// When the block was used that is the next to go.
    pub(super) fn coldest(&self) -> Option<u64> {
        let oldest = self.value.oldest(LIST).next()?;
        Some(self.blocks[oldest.0 as usize].used)
    }

    /// All blocks that can be found, with when each was used.
    pub(super) fn uses(&self) -> Vec<(u64, BlockHash)> {
        let its = self.index.iter();
        let its = its.map(|(hash, id)| (&self.blocks[*id as usize], *hash));
        its.filter(|(block, _)| block.ready)
            .map(|(block, hash)| (block.used, hash))
            .collect()
    }

    /// The block of this hash, also one whose bytes are not there yet.
    pub(super) fn find(&self, hash: &BlockHash) -> Option<u32> {
        self.index.get(hash).copied()
    }

    /// Whether a block can be found.
    pub(super) fn has(&self, hash: &BlockHash) -> bool {
        self.find(hash)
            .is_some_and(|id| self.blocks[id as usize].ready)
    }

    pub(super) fn add_extent(&mut self, extent: u32) {
        let slots = self.geometry.slots;
        self.extents.insert(extent, vec![None; slots as usize]);
        let spots = (0..slots).rev().map(|slot| Spot { extent, slot });
        self.free.extend(spots);
    }

    /// Gives up the extent whose blocks were used longest ago, if nobody touches it.
    pub(super) fn give_extent(&mut self) -> Option<(u32, Vec<Gone>)> {
        let idle = self.extents.iter().filter(|(_, slots)| {
            let mut ids = slots.iter().flatten();
            ids.all(|id| self.is_idle(*id))
        });
        let coldest = idle.min_by_key(|(_, slots)| {
            let ids = slots.iter().flatten();
            ids.map(|id| self.blocks[*id as usize].used)
                .max()
                .unwrap_or(0)
        });
        let extent = *coldest?.0;
        let ids: Vec<u32> = self.extents[&extent].iter().flatten().copied().collect();
        let gone = ids.into_iter().map(|id| self.lose(id)).collect();
        self.extents.remove(&extent);
        self.free.retain(|spot| spot.extent != extent);
        Some((extent, gone))
    }

    pub(super) fn has_free_slot(&self) -> bool {
        !self.free.is_empty()
    }

    /// Drops the block that is worth least.
    pub(super) fn make_room(&mut self) -> Option<Gone> {
        let Self { value, blocks, .. } = self;
        let victims = value.victims(LIST, 1, |id| {
            let block = &blocks[id.0 as usize];
            block.ready && block.readers == 0
        });
        let id = victims.first()?.0;
        Some(self.lose(id))
    }

    /// Takes a free slot for a block whose bytes are not there yet.
    pub(super) fn take_slot(&mut self, hash: BlockHash, used: u64) -> Option<(u32, Spot)> {
        let spot = self.free.pop()?;
        let block = Block {
            spot: Some(spot),
            checksum: 0,
            before: None,
            used,
            ready: false,
            readers: 0,
        };
        Some((self.insert(hash, block, spot), spot))
    }

    fn insert(&mut self, hash: BlockHash, block: Block, spot: Spot) -> u32 {
        let id = match self.unused.pop() {
            Some(id) => {
                self.blocks[id as usize] = block;
                id
            }
            None => {
                self.blocks.push(block);
                (self.blocks.len() - 1) as u32
            }
        };
        self.index.insert(hash, id);
        if let Some(slots) = self.extents.get_mut(&spot.extent) {
            slots[spot.slot as usize] = Some(id);
        }
        self.value.add(BlockId(id), hash, LIST);
        self.last_used = self.last_used.max(block.used);
        id
    }

    pub(super) fn make_ready(
        &mut self,
        id: u32,
        checksum: u64,
        before: Option<BlockHash>,
        used: u64,
    ) {
        self.ready += 1;
        let block = &mut self.blocks[id as usize];
        block.ready = true;
        block.checksum = checksum;
        block.before = before;
        block.used = used;
        if let Some(before) = before.and_then(|before| self.find(&before)) {
            self.value.follow(BlockId(id), BlockId(before));
        }
    }

    /// What a file held: in order of use.
    pub(super) fn take_in(&mut self, entries: &[(Entry, Spot)]) {
        for (entry, spot) in entries {
            if let Some(older) = self.find(&entry.hash) {
                self.lose(older);
            }
            let block = Block {
                spot: Some(*spot),
                checksum: entry.checksum,
                before: entry.before,
                used: entry.used,
                ready: true,
                readers: 0,
            };
            self.insert(entry.hash, block, *spot);
            self.ready += 1;
        }
        for (entry, _) in entries {
            let pair = (
                self.find(&entry.hash),
                entry.before.and_then(|it| self.find(&it)),
            );
            if let (Some(id), Some(before)) = pair {
                self.value.follow(BlockId(id), BlockId(before));
            }
        }
        let taken: std::collections::HashSet<Spot> = (self.index.values())
            .filter_map(|id| self.blocks[*id as usize].spot)
            .collect();
        self.free.retain(|spot| !taken.contains(spot));
    }

    pub(super) fn lose(&mut self, id: u32) -> Gone {
        let hash = self.value.get(BlockId(id)).hash;
        self.index.remove(&hash);
        self.value.lose(BlockId(id));
        if let Some(spot) = self.blocks[id as usize].spot.take() {
            if let Some(slots) = self.extents.get_mut(&spot.extent) {
                slots[spot.slot as usize] = None;
            }
            self.free.push(spot);
        }
        self.ready -= u64::from(self.blocks[id as usize].ready);
        self.blocks[id as usize].ready = false;
        self.unused.push(id);
        hash
    }

    pub(super) fn begin_reading(&mut self, id: u32) -> Option<(Spot, u64)> {
        let block = &mut self.blocks[id as usize];
        let spot = block.spot.filter(|_| block.ready)?;
        block.readers += 1;
        Some((spot, block.checksum))
    }

    pub(super) fn end_reading(&mut self, id: u32) {
        self.blocks[id as usize].readers -= 1;
    }

    /// Whether nobody reads or writes it.
    pub(super) fn is_idle(&self, id: u32) -> bool {
        let block = &self.blocks[id as usize];
        block.ready && block.readers == 0
    }

    /// Somebody wanted the block. Gives its entry as it is now.
    pub(super) fn found(&mut self, id: u32, used: u64) -> Entry {
        self.value.find_again(BlockId(id));
        self.last_used = self.last_used.max(used);
        let block = &mut self.blocks[id as usize];
        block.used = used;
        Entry {
            hash: self.value.get(BlockId(id)).hash,
            before: block.before,
            used,
            checksum: block.checksum,
        }
    }

    pub(super) fn follow(&mut self, hashes: &[BlockHash]) {
        for pair in hashes.windows(2) {
            if let (Some(before), Some(id)) = (self.find(&pair[0]), self.find(&pair[1])) {
                self.value.follow(BlockId(id), BlockId(before));
                self.blocks[id as usize].before.get_or_insert(pair[0]);
            }
        }
    }
}
