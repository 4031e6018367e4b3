//! Transfer planning: which blocks lie next to each other at both ends.

use std::sync::Arc;

use super::{
    layout::PagedLayer,
    slab::{SlabIndex, SlabMemory},
};
use crate::device::{Part, Piece};

/// Blocks that lie in consecutive slots of a slab and in consecutive blocks of the engine's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) slot: u32,
    pub(super) block: u32,
    pub(super) count: u32,
}

/// One slab's part of a transfer.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) index: SlabIndex,
    pub(super) slab: Arc<SlabMemory>,
    pub(super) runs: Vec<Run>,
    pub(super) blocks: u64,
}

/// A transfer between the engine's pool and any number of slabs. Reused from one transfer to the next, so that a
/// warm borrower allocates nothing for each block.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) groups: Vec<Group>,
    /// What is to be copied on one stream in one layer.
    pub(super) parts: Vec<Part>,
    pub(super) pieces: Vec<Piece>,
    spare: Vec<Vec<Run>>,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From slabs to the engine.
    Load,
    /// From the engine to slabs.
    Store,
}

impl Plan {
    /// Adds one block, in prefix order.
    pub(super) fn add(&mut self, index: SlabIndex, slab: &Arc<SlabMemory>, slot: u32, block: u32) {
        // Consecutive blocks mostly lie in the slab of the block before.
        let at = match self.groups.iter().rposition(|group| group.index == index) {
            Some(at) => at,
            None => {
                self.groups.push(Group {
                    index,
                    slab: Arc::clone(slab),
                    runs: self.spare.pop().unwrap_or_default(),
                    blocks: 0,
                });
                self.groups.len() - 1
            }
        };
        let group = &mut self.groups[at];
        group.blocks += 1;
        match group.runs.last_mut() {
            Some(run) if run.slot + run.count == slot && run.block + run.count == block => {
                run.count += 1;
            }
            _ => group.runs.push(Run {
                slot,
                block,
                count: 1,
            }),
        }
    }

    /// Empties the plan, keeping its buffers and no slab.
    pub(super) fn clear(&mut self) {
        for mut group in self.groups.drain(..) {
            group.runs.clear();
            self.spare.push(group.runs);
        }
        self.clear_parts();
    }

    /// Empties what [`add_part`](Self::add_part) has added.
    pub(super) fn clear_parts(&mut self) {
        self.parts.clear();
        self.pieces.clear();
    }

    /// Adds one group's part of one layer: a run is one piece where the engine's blocks are dense, else one a block.
    pub(super) fn add_part(
        &mut self,
        group: usize,
        layer: usize,
        layer_bytes: u64,
        kv: &PagedLayer,
        direction: Direction,
    ) {
        let before = self.pieces.len();
        let group = &self.groups[group];
        let base = group.slab.layer_offsets[layer];
        let dense = kv.block_stride == layer_bytes;
        for run in &group.runs {
            let (steps, bytes) = if dense {
                (1, layer_bytes * u64::from(run.count))
            } else {
                (run.count, layer_bytes)
            };
            for step in 0..steps {
                let slab = base + u64::from(run.slot + step) * layer_bytes;
                let engine = kv.offset + u64::from(run.block + step) * kv.block_stride;
                let (from, to) = match direction {
                    Direction::Load => (slab, engine),
                    Direction::Store => (engine, slab),
                };
                self.pieces.push(Piece { from, to, bytes });
            }
        }
        let (slab, engine) = (group.slab.memory.clone(), kv.memory.clone());
        let (from, to) = match direction {
            Direction::Load => (slab, engine),
            Direction::Store => (engine, slab),
        };
        self.parts.push(Part {
            from,
            to,
            pieces: self.pieces.len() - before,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use swiftcache_proto::domain::LinkKind;

    use super::*;
    use crate::borrower::tests::{device, layer};

    const LAYERS: [u64; 3] = [64, 16, 128];
    const SLOTS: u32 = 32;
    const OFFSET: u64 = 24;

    fn slab(base: u64) -> Arc<SlabMemory> {
        let layer = layer();
        let bytes = base + u64::from(SLOTS) * LAYERS.iter().sum::<u64>();
        let memory = layer.allocate_host(&device(), bytes).unwrap();
        let streams = [
            layer.stream(&device()).unwrap(),
            layer.stream(&device()).unwrap(),
        ];
        let link = LinkKind::Nvlink;
        Arc::new(SlabMemory::new(
            memory, base, SLOTS, &LAYERS, link, streams, None,
        ))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_byte_goes_where_it_belongs_in_as_few_pieces_as_there_are_runs(
            wanted in prop::collection::btree_map(0_u32..64, (0_u32..2, 0..SLOTS), 0..40),
            dense in any::<bool>(),
            store in any::<bool>(),
        ) {
            let slabs = [slab(0), slab(4096)];
            // One block a slot.
            let mut wanted: BTreeMap<u32, (u32, u32)> = wanted;
            let mut used = std::collections::BTreeSet::new();
            wanted.retain(|_, place| used.insert(*place));
            let mut plan = Plan::default();
            for (block, (which, slot)) in &wanted {
                plan.add(SlabIndex(*which), &slabs[*which as usize], *slot, *block);
            }
            let direction = if store { Direction::Store } else { Direction::Load };
            for (layer_number, bytes) in LAYERS.iter().enumerate() {
                let stride = if dense { *bytes } else { bytes + 8 };
                let kv = PagedLayer {
                    memory: slabs[0].memory.clone(),
                    offset: OFFSET,
                    block_stride: stride,
                };
                let mut seen = BTreeMap::new();
                for group in 0..plan.groups.len() {
                    let which = plan.groups[group].index.0;
                    let before: u64 = LAYERS[..layer_number].iter().sum();
                    let base = if which == 0 { 0 } else { 4096 } + before * u64::from(SLOTS);
                    let runs = runs(&wanted, which);
                    plan.clear_parts();
                    plan.add_part(group, layer_number, *bytes, &kv, direction);
                    let pieces = &plan.pieces;
                    prop_assert_eq!(plan.parts[0].pieces, pieces.len());
                    if dense {
                        prop_assert_eq!(pieces.len(), runs);
                    }
                    for piece in pieces {
                        let (engine, slab) = if store {
                            (piece.from, piece.to)
                        } else {
                            (piece.to, piece.from)
                        };
                        prop_assert_eq!(piece.bytes % bytes, 0);
                        for step in 0..piece.bytes / bytes {
                            let block = (engine - OFFSET) / stride + step;
                            let slot = (slab - base) / bytes + step;
                            prop_assert_eq!((engine - OFFSET) % stride, 0);
                            prop_assert_eq!((slab - base) % bytes, 0);
                            let twice = seen.insert(block as u32, (which, slot as u32));
                            prop_assert!(twice.is_none());
                        }
                    }
                }
                prop_assert_eq!(&seen, &wanted);
            }
            plan.clear();
            prop_assert_eq!(plan.groups.len(), 0);
        }
    }

    /// Maximal runs of consecutive blocks in consecutive slots of one slab, counted the slow way.
    fn runs(wanted: &BTreeMap<u32, (u32, u32)>, which: u32) -> usize {
        let of_slab: Vec<(u32, u32)> = wanted
            .iter()
            .filter(|(_, (slab, _))| *slab == which)
            .map(|(block, (_, slot))| (*block, *slot))
            .collect();
        let follows = of_slab
            .windows(2)
            .filter(|pair| pair[1].0 == pair[0].0 + 1 && pair[1].1 == pair[0].1 + 1);
        of_slab.len() - follows.count()
    }
}
