//! The blocks this borrower keeps: where each lies, who uses it, and in what order they were last used. What each is
//! worth is `value`'s.

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use swiftcache_proto::domain::BlockHash;

use super::{
    kept::HostNews,
    value::{Family, Waiting},
};
use crate::transfer::AreaId;

pub(super) const NONE: u32 = u32::MAX;

/// A block's number in the table. Reused only when nobody uses the block any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlockId(pub(super) u32);

/// A slot in a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) slab: AreaId,
    pub(super) slot: u32,
}

/// Which of the two lists of least recently used blocks a block is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    Donor = 0,
    Host = 1,
}

/// Whether the broker may know a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Published {
    /// It never heard of it at its present place.
    No,
    /// A publishing whose outcome is not known, or that a restarted broker has forgotten while readers may still
    /// rely on it.
    Maybe,
    /// It does.
    Yes,
}

#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) hash: BlockHash,
    /// `None`: lost, and kept only until the last pin goes.
    pub(super) place: Option<Place>,
    /// Its bytes are all there.
    pub(super) ready: bool,
    pub(super) published: Published,
    /// Hits, writes and publishings that need it to stay where it is.
    pub(super) pins: u32,
    /// When it was last used, on the table's own clock.
    pub(super) used: u64,
    /// How often it was found, fading: see `value`.
    pub(super) found: u8,
    /// A block before it in its sequence is gone: no lookup can reach it.
    pub(super) stray: bool,
    pub(super) family: Family,
    pub(super) list: List,
    newer: u32,
    older: u32,
}

#[derive(Debug)]
struct Ends {
    newest: u32,
    oldest: u32,
}

/// The table of blocks, found by hash.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) table: Vec<Block>,
    unused: Vec<u32>,
    index: HashMap<BlockHash, u32, RandomState>,
    ends: [Ends; 2],
    clock: u64,
    pub(super) waiting: Waiting,
    pub(super) host_news: HostNews,
}

impl Default for Blocks {
    fn default() -> Self {
        let ends = || Ends {
            newest: NONE,
            oldest: NONE,
        };
        Self {
            table: Vec::new(),
            unused: Vec::new(),
            index: HashMap::default(),
            ends: [ends(), ends()],
            clock: 0,
            waiting: Waiting::default(),
            host_news: HostNews::default(),
        }
    }
}

impl Blocks {
    pub(super) fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        self.index.get(hash).copied().map(BlockId)
    }

    pub(super) fn get(&self, id: BlockId) -> &Block {
        &self.table[id.0 as usize]
    }

    pub(super) fn get_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.table[id.0 as usize]
    }

    /// Adds a block that is about to be written, pinned once for its writer. Its hash must not be in the table.
    pub(super) fn insert(&mut self, hash: BlockHash, place: Place, list: List) -> BlockId {
        let block = Block {
            hash,
            place: Some(place),
            ready: false,
            published: Published::No,
            pins: 1,
            used: 0,
            found: 0,
            stray: false,
            family: Family::default(),
            list,
            newer: NONE,
            older: NONE,
        };
        let id = match self.unused.pop() {
            Some(id) => {
                self.table[id as usize] = block;
                id
            }
            None => {
                self.table.push(block);
                (self.table.len() - 1) as u32
            }
        };
        let before = self.index.insert(hash, id);
        debug_assert!(before.is_none(), "{hash} is there already");
        self.link_newest(id);
        self.come_back(BlockId(id));
        BlockId(id)
    }

    /// Makes a block the most recently used of its list.
    pub(super) fn touch(&mut self, id: BlockId) {
        if self.get(id).place.is_some() {
            self.unlink(id.0);
            self.link_newest(id.0);
        }
    }

    pub(super) fn pin(&mut self, id: BlockId) {
        self.get_mut(id).pins += 1;
    }

    /// Takes one pin off; a lost block goes with its last one.
    pub(super) fn unpin(&mut self, id: BlockId) {
        let block = self.get_mut(id);
        debug_assert!(block.pins > 0, "{} is not pinned", block.hash);
        block.pins -= 1;
        if block.pins == 0 && block.place.is_none() {
            self.unused.push(id.0);
        }
    }

    /// Takes a block out of the index and its slot: it can be found no more, and nor can what follows it. Returns
    /// where it was.
    pub(super) fn lose(&mut self, id: BlockId) -> Option<Place> {
        let place = self.forget(id)?;
        self.strand(id);
        Some(place)
    }

    /// Takes a block out that is found elsewhere: what follows it is still worth something.
    pub(super) fn lose_duplicate(&mut self, id: BlockId) -> Option<Place> {
        let place = self.forget(id)?;
        self.part(id);
        Some(place)
    }

    fn forget(&mut self, id: BlockId) -> Option<Place> {
        let place = self.get_mut(id).place.take()?;
        self.unlink(id.0);
        let (hash, pins) = (self.get(id).hash, self.get(id).pins);
        self.note_host(id);
        self.index.remove(&hash);
        if pins == 0 {
            self.unused.push(id.0);
        }
        Some(place)
    }

    /// The block's bytes are all there.
    pub(super) fn make_ready(&mut self, id: BlockId) {
        self.get_mut(id).ready = true;
        self.note_host(id);
    }

    /// Something is new about a block of the host tier, or one that leaves it.
    fn note_host(&mut self, id: BlockId) {
        let block = &self.table[id.0 as usize];
        if block.list == List::Host {
            self.host_news.add(block.hash);
        }
    }

    /// Moves a block that is not lost; the list it moves to stays in order of use. The broker does not know it there.
    pub(super) fn relocate(&mut self, id: BlockId, place: Place, list: List) {
        let used = self.get(id).used;
        self.note_host(id);
        self.unlink(id.0);
        let block = self.get_mut(id);
        block.place = Some(place);
        block.list = list;
        block.published = Published::No;
        self.link_by_use(id.0, used);
        self.note_host(id);
    }

    pub(super) fn oldest_of(&self, list: List) -> u32 {
        self.ends[list as usize].oldest
    }

    pub(super) fn newest_of(&self, list: List) -> u32 {
        self.ends[list as usize].newest
    }

    /// The blocks of a list from the most recently used on.
    pub(super) fn newest(&self, list: List) -> impl Iterator<Item = BlockId> {
        let mut next = self.newest_of(list);
        std::iter::from_fn(move || {
            let block = self.table.get(next as usize)?;
            let id = BlockId(next);
            next = block.older;
            Some(id)
        })
    }

    pub(super) fn newer_than(&self, id: u32) -> u32 {
        self.table[id as usize].newer
    }

    /// Makes a block the first to go.
    pub(super) fn make_oldest(&mut self, id: u32) {
        self.unlink(id);
        self.table[id as usize].used = 0;
        self.link_after(id, NONE);
    }

    /// The blocks of a list from the least recently used on.
    #[cfg(test)]
    pub(super) fn oldest(&self, list: List) -> impl Iterator<Item = (BlockId, &Block)> {
        let mut next = self.ends[list as usize].oldest;
        std::iter::from_fn(move || {
            let block = self.table.get(next as usize)?;
            let id = BlockId(next);
            next = block.newer;
            Some((id, block))
        })
    }

    fn link_newest(&mut self, id: u32) {
        self.clock += 1;
        let newest = self.ends[self.table[id as usize].list as usize].newest;
        self.table[id as usize].used = self.clock;
        self.link_after(id, newest);
    }

    /// Links a block next to the newest one that was used no later.
    fn link_by_use(&mut self, id: u32, used: u64) {
        let mut older = self.ends[self.table[id as usize].list as usize].newest;
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
        let ends = &mut self.ends[self.table[id as usize].list as usize];
        let newer = match self.table.get_mut(older as usize) {
            Some(block) => std::mem::replace(&mut block.newer, id),
            None => std::mem::replace(&mut ends.oldest, id),
        };
        match self.table.get_mut(newer as usize) {
            Some(block) => block.older = id,
            None => ends.newest = id,
        }
        let block = &mut self.table[id as usize];
        block.older = older;
        block.newer = newer;
    }

    fn unlink(&mut self, id: u32) {
        let block = &self.table[id as usize];
        let (older, newer, list) = (block.older, block.newer, block.list);
        match self.table.get_mut(older as usize) {
            Some(block) => block.newer = newer,
            None => self.ends[list as usize].oldest = newer,
        }
        match self.table.get_mut(newer as usize) {
            Some(block) => block.older = older,
            None => self.ends[list as usize].newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 16])
    }

    fn place(n: u8) -> Place {
        Place {
            slab: AreaId(0),
            slot: n.into(),
        }
    }

    /// The lists as vectors, oldest first: slow and obvious.
    #[derive(Default)]
    struct Naive([Vec<(u8, u64)>; 2]);

    impl Naive {
        fn remove(&mut self, n: u8) -> Option<(u8, u64)> {
            self.0.iter_mut().find_map(|list| {
                let at = list.iter().position(|(other, _)| *other == n)?;
                Some(list.remove(at))
            })
        }
    }

    proptest! {
        #[test]
        fn the_lists_are_in_order_of_use(
            steps in prop::collection::vec((0_u8..4, 0_u8..24, any::<bool>()), 1..200),
        ) {
            let mut tested = Blocks::default();
            let mut naive = Naive::default();
            let mut clock = 0;
            for (step, n, to_host) in steps {
                let list = if to_host { List::Host } else { List::Donor };
                match (step, tested.find(&hash(n))) {
                    (0, None) => {
                        clock += 1;
                        let id = tested.insert(hash(n), place(n), list);
                        tested.unpin(id);
                        naive.0[list as usize].push((n, clock));
                    }
                    (1, Some(id)) => {
                        clock += 1;
                        tested.touch(id);
                        let old = tested.get(id).list as usize;
                        naive.remove(n);
                        naive.0[old].push((n, clock));
                    }
                    (2, Some(id)) => {
                        prop_assert_eq!(tested.lose(id), Some(place(n)));
                        naive.remove(n);
                    }
                    (3, Some(id)) => {
                        tested.relocate(id, place(n), list);
                        if let Some((n, used)) = naive.remove(n) {
                            let list = &mut naive.0[list as usize];
                            let at = list.partition_point(|(_, other)| *other <= used);
                            list.insert(at, (n, used));
                        }
                    }
                    _ => {}
                }
                for list in [List::Donor, List::Host] {
                    let order: Vec<u8> = tested.oldest(list).map(|(_, b)| b.hash.0[0]).collect();
                    let expected: Vec<u8> =
                        naive.0[list as usize].iter().map(|(n, _)| *n).collect();
                    prop_assert_eq!(order, expected);
                }
            }
        }
    }

    #[test]
    fn a_lost_block_keeps_its_number_until_its_last_pin_goes() {
        let mut blocks = Blocks::default();
        let lost = blocks.insert(hash(1), place(1), List::Donor);
        assert_eq!(blocks.lose(lost), Some(place(1)));
        assert_eq!(blocks.find(&hash(1)), None);
        let other = blocks.insert(hash(1), place(2), List::Donor);
        assert_ne!(lost, other);
        blocks.unpin(lost);
        assert_eq!(blocks.insert(hash(3), place(3), List::Donor), lost);
    }
}
