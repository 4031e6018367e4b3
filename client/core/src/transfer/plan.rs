//! Transfer planning: which blocks lie next to each other at both ends.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{
    area::{AreaId, BlockArea},
    pool::PagedLayer,
    route::Direction,
};
use crate::device::{Part, Piece};

/// Blocks that lie in consecutive slots of an area and in consecutive blocks of the engine's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) slot: u32,
    pub(super) block: u32,
    pub(super) count: u32,
}

/// One area's part of a transfer.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) area: Arc<BlockArea>,
    pub(super) runs: Vec<Run>,
    pub(super) blocks: u64,
}

/// A transfer between the engine's pool and any number of areas. Reused from one transfer to the next, so that a
/// warm borrower allocates nothing for each block.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(super) groups: Vec<Group>,
    /// What is to be copied on one stream in one layer.
    pub(super) parts: Vec<Part>,
    pub(super) pieces: Vec<Piece>,
    spare: Vec<Vec<Run>>,
}

impl Plan {
    /// Adds one block, in prefix order.
    pub(crate) fn add(&mut self, area: &Arc<BlockArea>, slot: u32, block: u32) {
        // Consecutive blocks mostly lie in the area of the block before.
        let same = |group: &Group| Arc::ptr_eq(&group.area, area);
        let at = match self.groups.iter().rposition(same) {
            Some(at) => at,
            None => {
                self.groups.push(Group {
                    area: Arc::clone(area),
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

    /// The areas it touches.
    pub(crate) fn areas(&self) -> impl Iterator<Item = AreaId> {
        self.groups.iter().map(|group| group.area.id)
    }

    /// Blocks, in all areas.
    pub(super) fn blocks(&self) -> u64 {
        self.groups.iter().map(|group| group.blocks).sum()
    }

    /// Whether the bytes of all areas outlive those who allocated them.
    pub(crate) fn lasts(&self) -> bool {
        self.groups.iter().all(|group| group.area.lasts)
    }

    /// Empties the plan, keeping its buffers and no area.
    fn clear(&mut self) {
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
        let base = group.area.layer_offsets[layer];
        let dense = kv.block_stride == layer_bytes;
        for run in &group.runs {
            let (steps, bytes) = if dense {
                (1, layer_bytes * u64::from(run.count))
            } else {
                (run.count, layer_bytes)
            };
            for step in 0..steps {
                let slot = base + u64::from(run.slot + step) * layer_bytes;
                let engine = kv.offset + u64::from(run.block + step) * kv.block_stride;
                let (from, to) = match direction {
                    Direction::Load => (slot, engine),
                    Direction::Store => (engine, slot),
                };
                self.pieces.push(Piece { from, to, bytes });
            }
        }
        let (area, engine) = (group.area.memory.clone(), kv.memory.clone());
        let (from, to) = match direction {
            Direction::Load => (area, engine),
            Direction::Store => (engine, area),
        };
        self.parts.push(Part {
            from,
            to,
            pieces: self.pieces.len() - before,
        });
    }
}

/// Empty plans, with the buffers of earlier ones.
#[derive(Debug, Default)]
pub(crate) struct Plans(Mutex<Vec<Plan>>);

impl Plans {
    pub(crate) fn take(&self) -> Plan {
        self.0.lock().pop().unwrap_or_default()
    }

    pub(crate) fn put_back(&self, mut plan: Plan) {
        plan.clear();
        self.0.lock().push(plan);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use swiftcache_device::host::HostLayer;
    use swiftcache_proto::{
        domain::{LinkKind, Medium},
        topology::Topology,
    };

    use super::*;
    use crate::{device::DeviceLayer, transfer::Routes};

    const LAYERS: [u64; 3] = [64, 16, 128];
    const SLOTS: u32 = 32;
    const OFFSET: u64 = 24;

    fn area(base: u64) -> Arc<BlockArea> {
        let topology = Topology::load("hgx-8").unwrap();
        let device = topology.devices[0].uuid.clone();
        let layer: Arc<dyn DeviceLayer> =
            Arc::new(HostLayer::from_topology(&topology, false).unwrap());
        let bytes = base + u64::from(SLOTS) * LAYERS.iter().sum::<u64>();
        let memory = layer.allocate_host(&device, bytes).unwrap();
        let routes = Routes::new(layer, device.clone());
        let route = routes.to(Medium::Host, &device).unwrap();
        let link = LinkKind::Nvlink;
        Arc::new(BlockArea::new(memory, base, SLOTS, &LAYERS, link, route))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_byte_goes_where_it_belongs_in_as_few_pieces_as_there_are_runs(
            wanted in prop::collection::btree_map(0_u32..64, (0_u32..2, 0..SLOTS), 0..40),
            dense in any::<bool>(),
            store in any::<bool>(),
        ) {
            let areas = [area(0), area(4096)];
            // One block a slot.
            let mut wanted: BTreeMap<u32, (u32, u32)> = wanted;
            let mut used = std::collections::BTreeSet::new();
            wanted.retain(|_, place| used.insert(*place));
            let mut plan = Plan::default();
            for (block, (which, slot)) in &wanted {
                plan.add(&areas[*which as usize], *slot, *block);
            }
            let direction = if store { Direction::Store } else { Direction::Load };
            for (layer_number, bytes) in LAYERS.iter().enumerate() {
                let stride = if dense { *bytes } else { bytes + 8 };
                let kv = PagedLayer {
                    memory: areas[0].memory.clone(),
                    offset: OFFSET,
                    block_stride: stride,
                };
                let mut seen = BTreeMap::new();
                for group in 0..plan.groups.len() {
                    let which = u32::from(plan.groups[group].area.id == areas[1].id);
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

    /// Maximal runs of consecutive blocks in consecutive slots of one area, counted the slow way.
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
