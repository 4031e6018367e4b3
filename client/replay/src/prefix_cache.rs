//! Which block lies in which slot of the busy model's own pool: a prefix cache with LRU eviction, in which a
//! block always outlives the blocks that continue it.

use std::collections::{BTreeMap, HashMap};

use swiftcache_proto::domain::BlockHash;

/// The pool's bookkeeping. Holds no bytes.
#[derive(Debug)]
pub struct PrefixCache {
    slots: Vec<Slot>,
    by_hash: HashMap<BlockHash, u32>,
    /// Slots whose block nobody uses, oldest first: what may be evicted.
    idle: BTreeMap<u64, u32>,
    /// Slots that hold nothing.
    free: Vec<u32>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    block: Option<BlockHash>,
    users: u32,
    /// Its key in `idle`, while it is there.
    stamp: u64,
}

/// The slots one request holds while it runs.
#[derive(Debug)]
pub struct Seating {
    /// One slot for each block of the prompt, in order.
    pub slots: Vec<u32>,
    /// How many of them already hold their block.
    pub hits: usize,
    /// Room for the answer.
    answer: Vec<u32>,
}

impl PrefixCache {
    /// An empty pool of `slots` blocks.
    pub fn new(slots: u32) -> Self {
        Self {
            slots: vec![Slot::default(); slots as usize],
            by_hash: HashMap::new(),
            idle: BTreeMap::new(),
            free: (0..slots).rev().collect(),
            clock: 0,
        }
    }

    /// The pool's size, blocks.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Seats a request: its leading blocks where they lie, the rest and `answer` more blocks in free slots,
    /// evicting what has been idle longest. Nothing when running requests leave too little room.
    pub fn seat(&mut self, blocks: &[BlockHash], answer: usize) -> Option<Seating> {
        let held = blocks.iter().map_while(|block| self.by_hash.get(block));
        let mut slots: Vec<u32> = held.copied().collect();
        let hits = slots.len();
        for slot in &slots {
            let entry = &mut self.slots[*slot as usize];
            if entry.users == 0 {
                self.idle.remove(&entry.stamp);
            }
            entry.users += 1;
        }
        let fresh = blocks.len() - hits + answer;
        if self.free.len() + self.idle.len() < fresh {
            let seating = Seating {
                slots,
                hits,
                answer: Vec::new(),
            };
            self.rise(&seating);
            return None;
        }
        let mut taken: Vec<u32> = (0..fresh).filter_map(|_| self.take()).collect();
        let answer = taken.split_off(blocks.len() - hits);
        slots.extend(taken);
        Some(Seating {
            slots,
            hits,
            answer,
        })
    }

    fn take(&mut self) -> Option<u32> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => self.idle.pop_first()?.1,
        };
        let entry = &mut self.slots[slot as usize];
        if let Some(block) = entry.block.take() {
            self.by_hash.remove(&block);
        }
        entry.users = 1;
        Some(slot)
    }

    /// From now on `block` is found in `slot`, unless another slot already holds it.
    pub fn publish(&mut self, slot: u32, block: BlockHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(block) {
            entry.insert(slot);
            self.slots[slot as usize].block = Some(block);
        }
    }

    /// The request is over. Its blocks stay findable until their slots are needed; the last of the prompt goes
    /// first.
    pub fn rise(&mut self, seating: &Seating) {
        for slot in seating.answer.iter().chain(seating.slots.iter().rev()) {
            let entry = &mut self.slots[*slot as usize];
            entry.users -= 1;
            if entry.users > 0 {
                continue;
            }
            if entry.block.is_some() {
                self.clock += 1;
                entry.stamp = self.clock;
                self.idle.insert(self.clock, *slot);
            } else {
                self.free.push(*slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn blocks(ids: &[u8]) -> Vec<BlockHash> {
        ids.iter().map(|id| BlockHash([*id; 16])).collect()
    }

    fn seat(cache: &mut PrefixCache, ids: &[u8]) -> Seating {
        let blocks = blocks(ids);
        let seating = cache.seat(&blocks, 0).unwrap();
        for (slot, block) in seating.slots.iter().zip(blocks) {
            cache.publish(*slot, block);
        }
        seating
    }

    #[test]
    fn the_tail_of_the_oldest_prompt_goes_first() {
        let mut cache = PrefixCache::new(4);
        let first = seat(&mut cache, &[1, 2, 3]);
        cache.rise(&first);
        let second = seat(&mut cache, &[9, 8]);
        cache.rise(&second);
        // 3 went to make room for 8; 1 and 2 are still there.
        let again = seat(&mut cache, &[1, 2, 3]);
        assert_eq!(again.hits, 2);
    }

    #[test]
    fn blocks_in_use_are_never_evicted_and_a_refusal_changes_nothing() {
        let mut cache = PrefixCache::new(3);
        let running = seat(&mut cache, &[1, 2]);
        assert!(cache.seat(&blocks(&[1, 7, 8]), 0).is_none());
        assert!(cache.seat(&blocks(&[7]), 1).is_none());
        cache.rise(&running);
        let seating = cache.seat(&blocks(&[1, 7, 8]), 0).unwrap();
        assert_eq!(seating.hits, 1);
    }

    proptest! {
        /// Whatever comes and goes: slots are never shared by different blocks, none is lost, and no block is
        /// held whose parent is not.
        #[test]
        fn parents_outlive_children(prompts in proptest::collection::vec((0u8..4, 1usize..6, 0usize..3), 1..80)) {
            let mut cache = PrefixCache::new(8);
            let mut running = VecDeque::new();
            for (family, length, answer) in prompts {
                // Block i of a family: its prefix is blocks 0..i of the same family.
                let ids: Vec<u8> = (0..length as u8).map(|index| family * 16 + index).collect();
                let hashes = blocks(&ids);
                let mut seated = cache.seat(&hashes, answer);
                while seated.is_none() && let Some(oldest) = running.pop_front() {
                    cache.rise(&oldest);
                    seated = cache.seat(&hashes, answer);
                }
                let seating = seated.expect("at most 5 + 2 of 8 slots");
                for (slot, block) in seating.slots.iter().zip(hashes) {
                    cache.publish(*slot, block);
                }
                running.push_back(seating);
                for block in cache.by_hash.keys() {
                    let id = block.0[0];
                    let parent = BlockHash([id.wrapping_sub(1); 16]);
                    prop_assert!(id % 16 == 0 || cache.by_hash.contains_key(&parent));
                }
                let used = cache.slots.iter().filter(|slot| slot.users > 0).count();
                prop_assert_eq!(used + cache.idle.len() + cache.free.len(), 8);
                let named = cache.slots.iter().filter(|slot| slot.block.is_some()).count();
                prop_assert_eq!(named, cache.by_hash.len());
            }
        }
    }
}
