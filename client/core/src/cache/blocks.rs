//! The blocks that the cache keeps: where each lies, and who uses it. What each is worth is `value`'s.

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use swiftcache_proto::domain::{BlockHash, Medium};

use super::{
    news::HostNews,
    value::{Value, Worth},
};
use crate::transfer::AreaId;

pub(super) use super::value::BlockId;

/// A slot in a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) slab: AreaId,
    pub(super) slot: u32,
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
    /// `None`: lost, and kept only until the last pin goes.
    pub(super) place: Option<Place>,
    /// Its bytes are all there.
    pub(super) ready: bool,
    pub(super) published: Published,
    /// Hits, writes and publishings that need it to stay where it is.
    pub(super) pins: u32,
}

/// The table of blocks, found by hash.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    table: Vec<Block>,
    value: Value,
    unused: Vec<u32>,
    index: HashMap<BlockHash, u32, RandomState>,
    pub(super) host_news: HostNews,
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

    pub(super) fn worth(&self, id: BlockId) -> &Worth {
        self.value.get(id)
    }

    pub(super) fn hash(&self, id: BlockId) -> BlockHash {
        self.value.get(id).hash
    }

    /// The blocks that can be found.
    pub(super) fn all(&self) -> impl Iterator<Item = BlockId> {
        self.index.values().copied().map(BlockId)
    }

    /// Adds a block that is about to be written, pinned once for its writer. Its hash must not be in the table.
    pub(super) fn insert(&mut self, hash: BlockHash, place: Place, medium: Medium) -> BlockId {
        let block = Block {
            place: Some(place),
            ready: false,
            published: Published::No,
            pins: 1,
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
        self.value.add(BlockId(id), hash, medium);
        BlockId(id)
    }

    /// Says that `id` follows `before` in a sequence.
    pub(super) fn follow(&mut self, id: BlockId, before: BlockId) {
        self.value.follow(id, before);
    }

    /// The block that a block follows, where this borrower has it.
    pub(super) fn before(&self, id: BlockId) -> Option<BlockId> {
        self.value.before(id)
    }

    /// Makes a block the most recently used of its list.
    pub(super) fn touch(&mut self, id: BlockId) {
        self.value.touch(id);
    }

    /// A lookup has found the block.
    pub(super) fn find_again(&mut self, id: BlockId) {
        self.value.find_again(id);
    }

    /// Up to `most` blocks of a medium that are worth least, of those that `may_go`.
    pub(super) fn victims(
        &mut self,
        medium: Medium,
        most: usize,
        may_go: impl Fn(&Block) -> bool,
    ) -> Vec<BlockId> {
        let Self { table, value, .. } = self;
        value.victims(medium, most, |id| may_go(&table[id.0 as usize]))
    }

    /// The blocks of a medium from the most recently used on.
    pub(super) fn newest(&self, medium: Medium) -> impl Iterator<Item = BlockId> {
        self.value.newest(medium)
    }

    pub(super) fn pin(&mut self, id: BlockId) {
        self.get_mut(id).pins += 1;
    }

    /// Takes one pin off; a lost block goes with its last one.
    pub(super) fn unpin(&mut self, id: BlockId) {
        debug_assert!(self.get(id).pins > 0, "{} is not pinned", self.hash(id));
        let block = self.get_mut(id);
        block.pins -= 1;
        if block.pins == 0 && block.place.is_none() {
            self.unused.push(id.0);
        }
    }

    /// Takes a block out of the index and its slot: it can be found no more, and nor can what follows it. Returns
    /// where it was.
    pub(super) fn lose(&mut self, id: BlockId) -> Option<Place> {
        let place = self.forget(id)?;
        self.value.lose(id);
        Some(place)
    }

    /// Takes a block out that is found elsewhere: what follows it is still worth something.
    pub(super) fn lose_duplicate(&mut self, id: BlockId) -> Option<Place> {
        let place = self.forget(id)?;
        self.value.lose_duplicate(id);
        Some(place)
    }

    fn forget(&mut self, id: BlockId) -> Option<Place> {
        let place = self.get_mut(id).place.take()?;
        self.note_host(id);
        self.index.remove(&self.value.get(id).hash);
        if self.get(id).pins == 0 {
            self.unused.push(id.0);
        }
        Some(place)
    }

    /// The block's bytes are all there.
    pub(super) fn make_ready(&mut self, id: BlockId) {
        self.get_mut(id).ready = true;
        self.note_host(id);
    }

    /// Something is new about a block in host memory, or one that leaves it: it may be of the host tier.
    fn note_host(&mut self, id: BlockId) {
        let worth = self.value.get(id);
        if worth.medium == Medium::Host {
            self.host_news.add(worth.hash);
        }
    }

    /// Moves a block that is not lost. The broker does not know it there.
    pub(super) fn relocate(&mut self, id: BlockId, place: Place, medium: Medium) {
        self.note_host(id);
        let block = self.get_mut(id);
        block.place = Some(place);
        block.published = Published::No;
        self.value.relocate(id, medium);
        self.note_host(id);
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
                let list = if to_host { Medium::Host } else { Medium::Hbm };
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
                        let old = tested.worth(id).medium as usize;
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
                for list in [Medium::Hbm, Medium::Host] {
                    let order: Vec<u8> = (tested.value.oldest(list)).map(|id| tested.hash(id).0[0]).collect();
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
        let lost = blocks.insert(hash(1), place(1), Medium::Hbm);
        assert_eq!(blocks.lose(lost), Some(place(1)));
        assert_eq!(blocks.find(&hash(1)), None);
        let other = blocks.insert(hash(1), place(2), Medium::Hbm);
        assert_ne!(lost, other);
        blocks.unpin(lost);
        assert_eq!(blocks.insert(hash(3), place(3), Medium::Hbm), lost);
    }
}
