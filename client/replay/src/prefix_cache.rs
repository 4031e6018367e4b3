//! The prefix cache of the busy model's own pool: which block lies in which slot. It evicts the least recently used
//! block, and it never evicts a block before the blocks that continue it.

use std::collections::{BTreeMap, HashMap};

use swiftcache_proto::domain::BlockHash;

/// The pool's bookkeeping. It holds no bytes.
#[derive(Debug)]
pub struct PrefixCache {
    slots: Vec<Slot>,
    by_hash: HashMap<BlockHash, u32>,
    /// Slots whose block no running request uses, oldest first. These may be evicted.
    idle: BTreeMap<u64, u32>,
    /// Slots that hold nothing.
    free: Vec<u32>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    block: Option<BlockHash>,
    users: u32,
    /// The slot's key in `idle`, while it is there.
    stamp: u64,
}

/// The slots that one request holds while it runs.
#[derive(Debug)]
pub struct Allocation {
    /// One slot for each block of the prompt, in order.
    pub slots: Vec<u32>,
    /// How many of these slots, from the first on, already hold their block.
    pub hits: usize,
    /// The slots for the answer.
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

    /// Allocates the slots of a request. Its leading blocks stay in the slots where they already are. The rest, and
    /// `answer` more blocks, get free slots, and then the slots that have been idle longest. Returns none when
    /// running requests leave too little room.
    pub fn allocate(&mut self, blocks: &[BlockHash], answer: usize) -> Option<Allocation> {
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
            let allocation = Allocation {
                slots,
                hits,
                answer: Vec::new(),
            };
            self.release(&allocation);
            return None;
        }
        let mut taken: Vec<u32> = (0..fresh).filter_map(|_| self.take()).collect();
        let answer = taken.split_off(blocks.len() - hits);
        slots.extend(taken);
        Some(Allocation {
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

    /// From now on, `block` is found in `slot`, unless another slot already holds it.
    pub fn publish(&mut self, slot: u32, block: BlockHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(block) {
            entry.insert(slot);
            self.slots[slot as usize].block = Some(block);
        }
    }

    /// Releases the slots of a request that is over. Its blocks are still found until their slots are needed. The
    /// last block of the prompt is evicted first.
    pub fn release(&mut self, allocation: &Allocation) {
        for slot in allocation
            .answer
            .iter()
            .chain(allocation.slots.iter().rev())
        {
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

    fn allocate(cache: &mut PrefixCache, ids: &[u8]) -> Allocation {
        let blocks = blocks(ids);
        let allocation = cache.allocate(&blocks, 0).unwrap();
        for (slot, block) in allocation.slots.iter().zip(blocks) {
            cache.publish(*slot, block);
        }
        allocation
    }

    #[test]
    fn the_tail_of_the_oldest_prompt_goes_first() {
        let mut cache = PrefixCache::new(4);
        let first = allocate(&mut cache, &[1, 2, 3]);
        cache.release(&first);
        let second = allocate(&mut cache, &[9, 8]);
        cache.release(&second);
        // Block 3 was evicted to make room for 8. Blocks 1 and 2 are still there.
        let again = allocate(&mut cache, &[1, 2, 3]);
        assert_eq!(again.hits, 2);
    }

    #[test]
    fn blocks_in_use_are_never_evicted_and_a_refusal_changes_nothing() {
        let mut cache = PrefixCache::new(3);
        let running = allocate(&mut cache, &[1, 2]);
        assert!(cache.allocate(&blocks(&[1, 7, 8]), 0).is_none());
        assert!(cache.allocate(&blocks(&[7]), 1).is_none());
        cache.release(&running);
        let allocation = cache.allocate(&blocks(&[1, 7, 8]), 0).unwrap();
        assert_eq!(allocation.hits, 1);
    }

    proptest! {
        /// In any sequence of requests: no two blocks share a slot, no slot is lost, and the parent of every held
        /// block is held too.
        #[test]
        fn parents_outlive_children(prompts in proptest::collection::vec((0u8..4, 1usize..6, 0usize..3), 1..80)) {
            let mut cache = PrefixCache::new(8);
            let mut running = VecDeque::new();
            for (family, length, answer) in prompts {
                // The prefix of block i of a family is blocks 0..i of the same family.
                let ids: Vec<u8> = (0..length as u8).map(|index| family * 16 + index).collect();
                let hashes = blocks(&ids);
                let mut allocated = cache.allocate(&hashes, answer);
                while allocated.is_none() && let Some(oldest) = running.pop_front() {
                    cache.release(&oldest);
                    allocated = cache.allocate(&hashes, answer);
                }
                let allocation = allocated.expect("at most 5 + 2 of 8 slots");
                for (slot, block) in allocation.slots.iter().zip(hashes) {
                    cache.publish(*slot, block);
                }
                running.push_back(allocation);
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
