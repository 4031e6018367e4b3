//! What a cache would hold and find: its rules without bytes, leases, a broker or a clock. A planner asks it before
//! anything is installed.
//!
//! It decides as the cache does (`value`, `evict`, `rescue`, `promote`), on the same order of use. What takes time in a real
//! cache happens at once here: a lease is mapped when it is offered, and a move is over when it begins.

use std::collections::{BTreeMap, BTreeSet};

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashSet};
use swiftcache_proto::domain::{BlockHash, Medium};

use super::{
    evict::MOST_SLACK,
    value::{BlockId, Retention, Value},
};

/// Blocks that a promotion looks at for each that it moves.
const LOOKED_AT: usize = 4;

/// A slab's number: those of better links come first, host memory last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Slab {
    medium: Medium,
    rank: u32,
    number: u32,
}

/// Slots of one slab.
#[derive(Debug)]
struct Slots {
    donor: usize,
    free: Vec<u32>,
    occupants: Vec<Option<u32>>,
    /// When a block of it was last found.
    last_hit: u64,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// `None`: lost.
    slab: Option<Slab>,
    slot: u32,
    /// A store under way needs it where it is.
    pinned: bool,
}

/// Blocks that a lookup found in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelRun {
    /// The donor that lends the slab they lie in, as [`CacheModel::lend`] named it. `None`: the host tier.
    pub donor: Option<usize>,
    /// How many they are.
    pub blocks: u32,
}

/// The blocks that a cache of these sizes would hold.
#[derive(Debug)]
pub struct CacheModel {
    value: Value,
    blocks: Vec<Block>,
    unused: Vec<u32>,
    index: HashMap<BlockHash, u32, RandomState>,
    slabs: BTreeMap<Slab, Slots>,
    /// Slabs with a free slot, the first to be filled first.
    roomy: BTreeSet<Slab>,
    numbers: u32,
    lookups: u64,
    slots: [u32; 2],
    free: [u32; 2],
    lost: u64,
}

impl CacheModel {
    /// An empty cache with a host tier of `host_slots` blocks, and nothing lent.
    pub fn new(host_slots: u32, retention: Retention) -> Self {
        let mut model = Self {
            value: Value::new(retention),
            blocks: Vec::new(),
            unused: Vec::new(),
            index: HashMap::default(),
            slabs: BTreeMap::new(),
            roomy: BTreeSet::new(),
            numbers: 0,
            lookups: 0,
            slots: [0; 2],
            free: [0; 2],
            lost: 0,
        };
        if host_slots > 0 {
            model.add_slab(Medium::Host, 0, 0, host_slots);
        }
        model
    }

    /// A donor lends one slab more. `rank` orders donors by their links, the best first.
    pub fn lend(&mut self, donor: usize, rank: u32, slots: u32) {
        if slots > 0 {
            self.add_slab(Medium::Hbm, rank, donor, slots);
        }
    }

    /// A donor takes back so many slabs: those that are worth least, as the broker chooses them. The hottest of their blocks
    /// go elsewhere as far as there is room, or are all dropped unless `rescue`. Returns how many slabs held blocks.
    pub fn take_back(&mut self, donor: usize, slabs: usize, rescue: bool) -> usize {
        let mut candidates: Vec<Slab> = (self.slabs.iter())
            .filter(|(key, slots)| key.medium == Medium::Hbm && slots.donor == donor)
            .map(|(key, _)| *key)
            .collect();
        candidates.sort_by_key(|key| {
            let slots = &self.slabs[key];
            let held = slots.occupants.iter().flatten().count();
            (held, slots.last_hit, key.number)
        });
        candidates.truncate(slabs);
        let mut waiting = Vec::new();
        let mut revoked = 0;
        for key in &candidates {
            self.roomy.remove(key);
            if let Some(slots) = self.slabs.remove(key) {
                self.slots[Medium::Hbm as usize] -= slots.occupants.len() as u32;
                self.free[Medium::Hbm as usize] -= slots.free.len() as u32;
                let before = waiting.len();
                waiting.extend(slots.occupants.into_iter().flatten());
                revoked += usize::from(waiting.len() > before);
            }
        }
        waiting.sort_by_key(|id| {
            let worth = self.value.get(BlockId(*id));
            std::cmp::Reverse((!worth.stray, worth.found, worth.used))
        });
        let mut room = rescue;
        let mut left: HashSet<u32, RandomState> = waiting.iter().copied().collect();
        for id in waiting {
            let worth = self.value.get(BlockId(id));
            let used = worth.used;
            let before = self.value.before(BlockId(id));
            let reachable = !worth.stray && before.is_none_or(|before| !left.contains(&before.0));
            let to = match room && reachable {
                true => self.place_for(used),
                false => None,
            };
            // Without room for this one there is none for colder ones.
            room &= to.is_some() || !reachable;
            match to {
                Some(to) => {
                    left.remove(&id);
                    self.put(id, to);
                    self.value.relocate(BlockId(id), to.0.medium);
                }
                None => self.lose(id),
            }
        }
        revoked
    }

    /// How many blocks donors lend room for.
    pub fn lent_slots(&self) -> u32 {
        self.slots[Medium::Hbm as usize]
    }

    /// How many slabs a donor lends.
    pub fn slabs_of(&self, donor: usize) -> usize {
        (self.slabs.iter())
            .filter(|(key, slots)| key.medium == Medium::Hbm && slots.donor == donor)
            .count()
    }

    /// How many blocks it holds.
    pub fn held(&self) -> usize {
        self.index.len()
    }

    /// How many blocks were lost so far: evicted, or dropped with a slab.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Finds the longest prefix run of `hashes`: by place, in their order.
    pub fn lookup(&mut self, hashes: &[BlockHash]) -> Vec<ModelRun> {
        self.lookups += 1;
        let mut found = Vec::new();
        let mut runs: Vec<ModelRun> = Vec::new();
        for hash in hashes {
            let Some(id) = self.index.get(hash).copied() else {
                break;
            };
            let Some(slab) = self.blocks[id as usize].slab else {
                break;
            };
            let lookups = self.lookups;
            let donor = self.slabs.get_mut(&slab).and_then(|slots| {
                slots.last_hit = lookups;
                (slab.medium == Medium::Hbm).then_some(slots.donor)
            });
            match runs.last_mut() {
                Some(run) if run.donor == donor => run.blocks += 1,
                _ => runs.push(ModelRun { donor, blocks: 1 }),
            }
            found.push(id);
        }
        for id in found.iter().rev() {
            self.value.find_again(BlockId(*id));
        }
        runs
    }

    /// Stores a sequence's blocks: those that are not there yet. Returns for how many there was no room.
    pub fn store(&mut self, hashes: &[BlockHash]) -> u32 {
        let known: Vec<u32> = (hashes.iter())
            .filter_map(|hash| self.index.get(hash).copied())
            .collect();
        for id in &known {
            self.blocks[*id as usize].pinned = true;
        }
        let want = (hashes.len() - known.len()) as u32;
        if want > 0 {
            self.make_room(want);
        }
        let mut unplaced = 0;
        let mut sequence: Vec<u32> = Vec::with_capacity(hashes.len());
        for (hash, done) in hashes.iter().zip(0..) {
            let id = match self.index.get(hash).copied() {
                Some(id) => id,
                None => match self.take().or_else(|| self.take_of(Medium::Host)) {
                    Some(to) => self.insert(*hash, to),
                    // A block without those before it is worth nothing.
                    None => {
                        unplaced = hashes.len() as u32 - done;
                        break;
                    }
                },
            };
            if let Some(before) = sequence.last() {
                self.value.follow(BlockId(id), BlockId(*before));
            }
            sequence.push(id);
        }
        for id in sequence.iter().rev() {
            self.value.touch(BlockId(*id));
        }
        for id in known {
            self.blocks[id as usize].pinned = false;
        }
        self.promote();
        unplaced
    }

    fn add_slab(&mut self, medium: Medium, rank: u32, donor: usize, slots: u32) {
        let key = Slab {
            medium,
            rank,
            number: self.numbers,
        };
        self.numbers += 1;
        self.slots[medium as usize] += slots;
        self.free[medium as usize] += slots;
        self.roomy.insert(key);
        let slots = Slots {
            donor,
            free: (0..slots).rev().collect(),
            occupants: vec![None; slots as usize],
            last_hit: 0,
        };
        self.slabs.insert(key, slots);
    }

    /// A free slot of donors.
    fn take(&mut self) -> Option<(Slab, u32)> {
        self.take_of(Medium::Hbm)
    }

    fn take_of(&mut self, medium: Medium) -> Option<(Slab, u32)> {
        let key = match medium {
            Medium::Hbm => self.roomy.first(),
            Medium::Host => self.roomy.last(),
        };
        let key = *key.filter(|key| key.medium == medium)?;
        let slots = self.slabs.get_mut(&key)?;
        let slot = slots.free.pop()?;
        if slots.free.is_empty() {
            self.roomy.remove(&key);
        }
        self.free[medium as usize] -= 1;
        Some((key, slot))
    }

    /// A block lies in a slot that was taken for it.
    fn put(&mut self, id: u32, (slab, slot): (Slab, u32)) {
        if let Some(slots) = self.slabs.get_mut(&slab) {
            slots.occupants[slot as usize] = Some(id);
        }
        let block = &mut self.blocks[id as usize];
        block.slab = Some(slab);
        block.slot = slot;
    }

    fn insert(&mut self, hash: BlockHash, to: (Slab, u32)) -> u32 {
        let block = Block {
            slab: None,
            slot: 0,
            pinned: false,
        };
        let id = match self.unused.pop() {
            Some(id) => id,
            None => {
                self.blocks.push(block);
                (self.blocks.len() - 1) as u32
            }
        };
        self.put(id, to);
        self.index.insert(hash, id);
        self.value.add(BlockId(id), hash, to.0.medium);
        id
    }

    /// The slot of a block is free, if its slab is still there.
    fn vacate(&mut self, id: u32) {
        let block = self.blocks[id as usize];
        let Some(slab) = block.slab else { return };
        if let Some(slots) = self.slabs.get_mut(&slab) {
            slots.occupants[block.slot as usize] = None;
            slots.free.push(block.slot);
            self.roomy.insert(slab);
            self.free[slab.medium as usize] += 1;
        }
    }

    fn lose(&mut self, id: u32) {
        self.vacate(id);
        self.blocks[id as usize].slab = None;
        self.index.remove(&self.value.get(BlockId(id)).hash);
        self.value.lose(BlockId(id));
        self.unused.push(id);
        self.lost += 1;
    }

    fn victims(&mut self, medium: Medium, most: usize) -> Vec<u32> {
        let Self { value, blocks, .. } = self;
        let victims = value.victims(medium, most, |id| {
            let block = &blocks[id.0 as usize];
            !block.pinned && block.slab.is_some()
        });
        victims.into_iter().map(|id| id.0).collect()
    }

    fn make_room(&mut self, want: u32) {
        let donor = self.free[Medium::Hbm as usize];
        if donor >= want {
            return;
        }
        let short = want - donor;
        let slack = (self.slots[Medium::Hbm as usize] / 16).min(MOST_SLACK);
        let victims = self.victims(Medium::Hbm, (short + slack) as usize);
        let still_short = short.saturating_sub(victims.len() as u32);
        for id in victims {
            let worth = self.value.get(BlockId(id));
            let (used, stray) = (worth.used, worth.stray);
            // Nobody could find a stray there either.
            match (!stray).then(|| self.host_slot_for(used)).flatten() {
                Some(to) => {
                    self.vacate(id);
                    self.put(id, to);
                    self.value.relocate(BlockId(id), Medium::Host);
                }
                None => self.lose(id),
            }
        }
        let host = still_short.saturating_sub(self.free[Medium::Host as usize]);
        for id in self.victims(Medium::Host, host as usize) {
            self.lose(id);
        }
    }

    /// A slot of the host tier for a block that was last used at `used`: a free one, or that of a colder block.
    fn host_slot_for(&mut self, used: u64) -> Option<(Slab, u32)> {
        if let Some(free) = self.take_of(Medium::Host) {
            return Some(free);
        }
        let colder = self.victims(Medium::Host, 1).pop()?;
        if self.value.get(BlockId(colder)).used >= used {
            return None;
        }
        self.lose(colder);
        self.take_of(Medium::Host)
    }

    /// A slot for a rescued block.
    fn place_for(&mut self, used: u64) -> Option<(Slab, u32)> {
        self.take().or_else(|| self.host_slot_for(used))
    }

    /// Back to donors: the hottest blocks of the host tier, as far as donors have room beyond what making room leaves free.
    fn promote(&mut self) {
        let slack = (self.slots[Medium::Hbm as usize] / 16).min(MOST_SLACK);
        let room = self.free[Medium::Hbm as usize].saturating_sub(slack) as usize;
        let most = room.min(MOST_SLACK as usize);
        let hottest: Vec<BlockId> = (self.value.newest(Medium::Host))
            .take(most * LOOKED_AT)
            .filter(|id| !self.value.get(*id).stray)
            .take(most)
            .collect();
        for id in hottest {
            if let Some(to) = self.take() {
                self.vacate(id.0);
                self.put(id.0, to);
                self.value.relocate(id, Medium::Hbm);
            }
        }
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
