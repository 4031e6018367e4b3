//! What a block is worth: how lately it was used, how often it was found, and whether a lookup can still reach it.
//!
//! * *Recency*: for each medium there is a list in order of use.
//! * *Frequency*: a block that was found is spared when its turn comes, once for each time it was found, up to
//!   [`MOST_FOUND`]. So what many requests share, or a conversation that goes on, outlives what was stored once and
//!   never asked for again.
//!   A block that went and comes back was missed: that counts as a find, and it keeps its earlier ones. For this, as many
//!   as twice the cache's blocks are remembered when they go.
//! * *Position*: a block whose predecessor is gone is a *stray*: it goes first, and is never carried anywhere. A block
//!   goes after those that follow it. Its predecessor coming back makes it worth something again.
//!
//! This knows neither where a block lies nor who uses it, and reads no clock: a planner can use it without a node.

use std::collections::{HashMap, HashSet, VecDeque};

use swiftcache_proto::domain::{BlockHash, Medium};

const NONE: u32 = u32::MAX;

/// More finds than this count as this: what was hot long ago must not outlive its use by much.
const MOST_FOUND: u8 = 3;
/// Blocks that went are remembered for each that the cache has numbers for.
const DEPARTED_PER_BLOCK: usize = 2;
/// The most blocks that went and are remembered, about 40 bytes each.
const MOST_DEPARTED: usize = 1 << 18;
/// Strays remembered by what they wait for, before those that are gone are swept out.
const SWEEP_AT: usize = 1_024;

/// What decides which blocks go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retention {
    /// What a block is worth, as the cache decides it.
    #[default]
    Value,
    /// When it was last used, and nothing else: what most caches do. For comparison.
    Age,
}

/// A block's number. Given to another block only when nobody uses the first one any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockId(pub(crate) u32);

/// What one block is worth.
#[derive(Clone, Debug)]
pub(crate) struct Worth {
    pub(crate) hash: BlockHash,
    /// It can be found.
    present: bool,
    /// When it was last used, on this room's own count.
    pub(crate) used: u64,
    /// How often it was found, fading.
    pub(crate) found: u8,
    /// A block before it in its sequence is gone: no lookup can reach it.
    pub(crate) stray: bool,
    /// Where it lies, and so which list it is in.
    pub(crate) medium: Medium,
    newer: u32,
    older: u32,
    family: Family,
}

/// A block's place in the tree of prefixes: numbers of blocks, or `NONE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Family {
    before: u32,
    first_after: u32,
    next_sibling: u32,
    previous_sibling: u32,
}

impl Default for Family {
    fn default() -> Self {
        Self {
            before: NONE,
            first_after: NONE,
            next_sibling: NONE,
            previous_sibling: NONE,
        }
    }
}

/// Strays by the hash of the block they have lost. May name blocks that are gone or reachable meanwhile.
#[derive(Debug, Default)]
struct Waiting {
    by_hash: HashMap<BlockHash, Vec<(u32, BlockHash)>>,
    count: usize,
}

/// Blocks that went, by the first bytes of their hashes: two that share these are taken for one, which costs no more
/// than a wrong guess of worth.
#[derive(Debug, Default)]
struct Departed {
    /// How often each was found, and when it went.
    found: HashMap<u64, (u8, u64)>,
    /// In the order in which they went; may name blocks that are back, or went again.
    order: VecDeque<(u64, u64)>,
    count: u64,
}

impl Departed {
    fn key(hash: &BlockHash) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = hash.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    fn remember(&mut self, hash: &BlockHash, found: u8, most: usize) {
        let key = Self::key(hash);
        self.count += 1;
        self.found.insert(key, (found, self.count));
        self.order.push_back((key, self.count));
        while self.order.len() > most {
            if let Some((key, when)) = self.order.pop_front()
                && self.found.get(&key).is_some_and(|(_, last)| *last == when)
            {
                self.found.remove(&key);
            }
        }
    }

    /// How often a block that comes back was found before it went, if that is remembered.
    fn take(&mut self, hash: &BlockHash) -> Option<u8> {
        self.found.remove(&Self::key(hash)).map(|(found, _)| found)
    }
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    newest: u32,
    oldest: u32,
}

impl Default for Ends {
    fn default() -> Self {
        Self {
            newest: NONE,
            oldest: NONE,
        }
    }
}

/// What each block is worth, by number.
#[derive(Debug, Default)]
pub(crate) struct Value {
    table: Vec<Worth>,
    hbm: Ends,
    host: Ends,
    clock: u64,
    waiting: Waiting,
    departed: Departed,
    retention: Retention,
}

impl Value {
    /// Without blocks.
    pub(crate) fn new(retention: Retention) -> Self {
        Self {
            retention,
            ..Self::default()
        }
    }

    pub(crate) fn get(&self, id: BlockId) -> &Worth {
        &self.table[id.0 as usize]
    }

    /// Adds a block, the most recently used of its list. Its number follows the last one, or was another block's that is gone.
    pub(crate) fn add(&mut self, id: BlockId, hash: BlockHash, medium: Medium) {
        let before = self.departed.take(&hash);
        let worth = Worth {
            hash,
            present: true,
            used: 0,
            found: before.map_or(0, |found| (found + 1).min(MOST_FOUND)),
            stray: false,
            medium,
            newer: NONE,
            older: NONE,
            family: Family::default(),
        };
        match self.table.get_mut(id.0 as usize) {
            Some(before) => *before = worth,
            None => self.table.push(worth),
        }
        self.link_newest(id.0);
        self.come_back(id);
    }

    /// Makes a block the most recently used of its list.
    pub(crate) fn touch(&mut self, id: BlockId) {
        if self.get(id).present {
            self.unlink(id.0);
            self.link_newest(id.0);
        }
    }

    /// A block is gone: it can be found no more, and nor can what follows it.
    pub(crate) fn lose(&mut self, id: BlockId) {
        let most = (self.table.len() * DEPARTED_PER_BLOCK).min(MOST_DEPARTED);
        let block = &self.table[id.0 as usize];
        self.departed.remember(&block.hash, block.found, most);
        self.forget(id);
        self.strand(id);
    }

    /// A block is gone that is found elsewhere: what follows it is still worth something.
    pub(crate) fn lose_duplicate(&mut self, id: BlockId) {
        self.forget(id);
        self.part(id);
    }

    fn forget(&mut self, id: BlockId) {
        self.table[id.0 as usize].present = false;
        self.unlink(id.0);
    }

    /// A block lies elsewhere from now on; the list that it comes to stays in order of use.
    pub(crate) fn relocate(&mut self, id: BlockId, medium: Medium) {
        let used = self.get(id).used;
        self.unlink(id.0);
        self.table[id.0 as usize].medium = medium;
        self.link_by_use(id.0, used);
    }

    /// The blocks of a list from the most recently used on.
    pub(crate) fn newest(&self, medium: Medium) -> impl Iterator<Item = BlockId> {
        let mut next = self.ends(medium).newest;
        std::iter::from_fn(move || {
            let block = self.table.get(next as usize)?;
            let id = BlockId(next);
            next = block.older;
            Some(id)
        })
    }

    /// The blocks of a list from the least recently used on.
    pub(crate) fn oldest(&self, medium: Medium) -> impl Iterator<Item = BlockId> {
        let mut next = self.ends(medium).oldest;
        std::iter::from_fn(move || {
            let block = self.table.get(next as usize)?;
            let id = BlockId(next);
            next = block.newer;
            Some(id)
        })
    }

    fn ends(&self, medium: Medium) -> &Ends {
        match medium {
            Medium::Hbm => &self.hbm,
            Medium::Host => &self.host,
        }
    }

    fn ends_of(&mut self, id: u32) -> &mut Ends {
        match self.table[id as usize].medium {
            Medium::Hbm => &mut self.hbm,
            Medium::Host => &mut self.host,
        }
    }

    /// Makes a block the first to go.
    fn make_oldest(&mut self, id: u32) {
        self.unlink(id);
        self.table[id as usize].used = 0;
        self.link_after(id, NONE);
    }

    fn link_newest(&mut self, id: u32) {
        self.clock += 1;
        let newest = self.ends_of(id).newest;
        self.table[id as usize].used = self.clock;
        self.link_after(id, newest);
    }

    /// Links a block next to the newest one that was used no later.
    fn link_by_use(&mut self, id: u32, used: u64) {
        let mut older = self.ends_of(id).newest;
        while let Some(block) = self.table.get(older as usize) {
            if block.used <= used {
                break;
            }
            older = block.older;
        }
        self.link_after(id, older);
    }

    /// Links a block right after `older`; as the oldest when that is none.
    fn link_after(&mut self, id: u32, older: u32) {
        let newer = match self.table.get_mut(older as usize) {
            Some(block) => std::mem::replace(&mut block.newer, id),
            None => std::mem::replace(&mut self.ends_of(id).oldest, id),
        };
        match self.table.get_mut(newer as usize) {
            Some(block) => block.older = id,
            None => self.ends_of(id).newest = id,
        }
        let block = &mut self.table[id as usize];
        block.older = older;
        block.newer = newer;
    }

    fn unlink(&mut self, id: u32) {
        let block = &self.table[id as usize];
        let (older, newer) = (block.older, block.newer);
        match self.table.get_mut(older as usize) {
            Some(block) => block.newer = newer,
            None => self.ends_of(id).oldest = newer,
        }
        match self.table.get_mut(newer as usize) {
            Some(block) => block.older = older,
            None => self.ends_of(id).newest = older,
        }
    }

    /// Says that `id` follows `before` in a sequence.
    pub(crate) fn follow(&mut self, id: BlockId, before: BlockId) {
        let lost = |block: &Worth| !block.present;
        let orphaned = self.get(id).family.before == NONE;
        if !orphaned || id == before || lost(self.get(id)) || lost(self.get(before)) {
            return;
        }
        // A hash names its whole prefix, so this cannot close a circle; a caller that lies about hashes must not hang
        // us. A block that nothing follows, like all new ones, closes none.
        if self.get(id).family.first_after != NONE && self.comes_before(id.0, before.0) {
            return;
        }
        let next = std::mem::replace(&mut self.table[before.0 as usize].family.first_after, id.0);
        if let Some(next) = self.table.get_mut(next as usize) {
            next.family.previous_sibling = id.0;
        }
        let family = &mut self.table[id.0 as usize].family;
        family.before = before.0;
        family.next_sibling = next;
        let stray = self.get(before).stray;
        self.mark(id.0, stray);
    }

    fn comes_before(&self, id: u32, after: u32) -> bool {
        let mut up = after;
        while let Some(block) = self.table.get(up as usize) {
            if up == id {
                return true;
            }
            up = block.family.before;
        }
        false
    }

    /// A lookup has found the block: it can be reached, whoever holds what comes before it.
    pub(crate) fn find_again(&mut self, id: BlockId) {
        let block = &mut self.table[id.0 as usize];
        block.found = (block.found + 1).min(MOST_FOUND);
        block.stray = false;
        self.touch(id);
    }

    /// Up to `most` blocks of a list that are worth least, of those that `may_go`. Those that are spared are found so
    /// much less often from now on.
    pub(crate) fn victims(
        &mut self,
        medium: Medium,
        most: usize,
        may_go: impl Fn(BlockId) -> bool,
    ) -> Vec<BlockId> {
        let mut victims = Vec::new();
        let mut chosen = HashSet::new();
        // In the last round nobody is spared any more.
        let first = match self.retention {
            Retention::Value => 0,
            Retention::Age => MOST_FOUND + 1,
        };
        for round in first..=MOST_FOUND + 1 {
            let newest = self.ends(medium).newest;
            let mut next = self.ends(medium).oldest;
            while next != NONE && victims.len() < most {
                let id = next;
                next = self.table[id as usize].newer;
                let block = &self.table[id as usize];
                if !chosen.contains(&id) && may_go(BlockId(id)) {
                    let spared = !block.stray
                        && round <= MOST_FOUND
                        && (block.found > 0 || self.is_followed(id, medium, &chosen));
                    if spared {
                        self.table[id as usize].found =
                            self.table[id as usize].found.saturating_sub(1);
                        self.touch(BlockId(id));
                    } else {
                        chosen.insert(id);
                        victims.push(BlockId(id));
                    }
                }
                // What was spared in this round is looked at in the next.
                if id == newest {
                    break;
                }
            }
            if victims.len() >= most {
                break;
            }
        }
        victims
    }

    /// Whether a block that stays follows this one in the same list.
    fn is_followed(&self, id: u32, medium: Medium, chosen: &HashSet<u32>) -> bool {
        self.after(id)
            .any(|after| self.table[after as usize].medium == medium && !chosen.contains(&after))
    }

    /// The blocks right after one.
    fn after(&self, id: u32) -> impl Iterator<Item = u32> {
        let mut next = self.table[id as usize].family.first_after;
        std::iter::from_fn(move || {
            let block = self.table.get(next as usize)?;
            Some(std::mem::replace(&mut next, block.family.next_sibling))
        })
    }

    /// The block that a block follows, where it is present.
    pub(crate) fn before(&self, id: BlockId) -> Option<BlockId> {
        let before = self.get(id).family.before;
        (before != NONE).then_some(BlockId(before))
    }

    /// The block is gone: so is the way to those after it.
    fn strand(&mut self, id: BlockId) {
        let hash = self.get(id).hash;
        for child in self.part(id) {
            self.mark(child, true);
            let child_hash = self.table[child as usize].hash;
            let waiting = self.waiting.by_hash.entry(hash).or_default();
            waiting.push((child, child_hash));
            self.waiting.count += 1;
        }
        if self.waiting.count > SWEEP_AT.max(self.table.len()) {
            self.sweep();
        }
    }

    /// Takes a block out of the tree. Returns those that followed it.
    fn part(&mut self, id: BlockId) -> Vec<u32> {
        let children: Vec<u32> = self.after(id.0).collect();
        for child in &children {
            let family = &mut self.table[*child as usize].family;
            family.before = NONE;
            family.next_sibling = NONE;
            family.previous_sibling = NONE;
        }
        let family = std::mem::take(&mut self.table[id.0 as usize].family);
        if let Some(next) = self.table.get_mut(family.next_sibling as usize) {
            next.family.previous_sibling = family.previous_sibling;
        }
        match self.table.get_mut(family.previous_sibling as usize) {
            Some(previous) => previous.family.next_sibling = family.next_sibling,
            None => {
                if let Some(before) = self.table.get_mut(family.before as usize) {
                    before.family.first_after = family.next_sibling;
                }
            }
        }
        children
    }

    /// A block is there again: those that waited for it can be reached.
    fn come_back(&mut self, id: BlockId) {
        if self.waiting.count == 0 {
            return;
        }
        let hash = self.get(id).hash;
        let waiting = self.waiting.by_hash.remove(&hash);
        let waiting = waiting.unwrap_or_default();
        self.waiting.count -= waiting.len();
        for (child, hash) in waiting {
            if self.waits(child, &hash) {
                self.follow(BlockId(child), id);
            }
        }
    }

    fn waits(&self, child: u32, hash: &BlockHash) -> bool {
        let block = &self.table[child as usize];
        block.hash == *hash && block.present && block.family.before == NONE
    }

    fn sweep(&mut self) {
        let mut by_hash = std::mem::take(&mut self.waiting.by_hash);
        by_hash.retain(|_, waiting| {
            waiting.retain(|(child, hash)| self.waits(*child, hash));
            !waiting.is_empty()
        });
        self.waiting.count = by_hash.values().map(Vec::len).sum();
        self.waiting.by_hash = by_hash;
    }

    /// Makes a block and all that follow it strays, or none of them.
    fn mark(&mut self, id: u32, stray: bool) {
        let mut to_mark = vec![id];
        while let Some(id) = to_mark.pop() {
            if self.table[id as usize].stray == stray {
                continue;
            }
            self.table[id as usize].stray = stray;
            if stray {
                self.make_oldest(id);
            }
            to_mark.extend(self.after(id));
        }
    }
}

#[cfg(test)]
#[path = "value_tests.rs"]
mod tests;
