//! A borrower without a broker: its host tier, byte for byte.

use std::{collections::HashMap, sync::Arc};

use proptest::prelude::*;
use swiftcache_proto::domain::{BlockHash, Device, DeviceUuid};

use super::*;
use crate::device::{
    CopyStream, DeviceLayer,
    host::{HostLayer, HostOptions},
    testing::Gate,
};

const LAYERS: [u64; 3] = [512, 256, 1024];
const BLOCK: u64 = 512 + 256 + 1024;
const POOL: u32 = 64;

pub(super) fn device() -> DeviceUuid {
    "SIM-0".parse().unwrap()
}

pub(super) fn layer() -> Arc<dyn DeviceLayer> {
    let device = Device {
        uuid: device(),
        name: "simulated GPU".to_owned(),
        hbm_bytes: 1 << 30,
        ordinal: 0,
    };
    Arc::new(HostLayer::new(vec![device], Vec::new(), HostOptions::default()).unwrap())
}

/// An engine: a paged pool whose bytes are a function of block hash and layer.
struct Engine {
    stream: Arc<dyn CopyStream>,
    kv: PagedKv,
    borrower: Arc<Borrower>,
}

fn hash(n: u32) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(bytes)
}

fn pattern(n: u32, layer: usize) -> Vec<u8> {
    let seed = n
        .wrapping_mul(2_654_435_761)
        .wrapping_add(layer as u32 * 97);
    (0..LAYERS[layer] as u32)
        .map(|at| (seed.wrapping_add(at.wrapping_mul(40_503)) >> 7) as u8)
        .collect()
}

impl Engine {
    fn new(host_slots: u64) -> Self {
        let layer = layer();
        let layers = LAYERS.iter().map(|bytes| PagedLayer {
            memory: layer
                .allocate_host(&device(), 64 + u64::from(POOL) * (bytes + 32))
                .unwrap(),
            offset: 64,
            block_stride: bytes + 32,
        });
        let kv = PagedKv {
            layers: layers.collect(),
            blocks: POOL,
        };
        let layout = Layout {
            namespace: "test".to_owned(),
            layer_bytes: LAYERS.to_vec(),
        };
        let mut config = BorrowerConfig::new(device(), layout, 0);
        config.host_tier_bytes = host_slots * BLOCK;
        Self {
            stream: layer.stream(&device()).unwrap(),
            kv,
            borrower: Borrower::open(None, layer, config).unwrap(),
        }
    }

    fn at(&self, layer: usize, block: u32) -> u64 {
        64 + u64::from(block) * self.kv.layers[layer].block_stride
    }

    fn compute(&self, n: u32, block: u32) {
        for (layer, kv) in self.kv.layers.iter().enumerate() {
            let bytes = pattern(n, layer);
            self.stream
                .write(&kv.memory, self.at(layer, block), &bytes)
                .unwrap();
        }
    }

    fn holds(&self, n: u32, layer: usize, block: u32) -> bool {
        let mut bytes = vec![0; LAYERS[layer] as usize];
        let memory = &self.kv.layers[layer].memory;
        self.stream
            .read(memory, self.at(layer, block), &mut bytes)
            .unwrap();
        bytes == pattern(n, layer)
    }

    fn store(&self, sequence: &[u32]) -> Stored {
        let blocks: Vec<_> = sequence.iter().map(|n| hash(*n)).zip(0..).collect();
        for (n, block) in sequence.iter().zip(0..) {
            self.compute(*n, block);
        }
        self.borrower.store(&blocks, &self.kv, &|_| None).finish()
    }

    /// Looks a sequence up, loads what is found into the pool's upper half, and checks every byte.
    fn fetch(&self, sequence: &[u32]) -> u32 {
        let hashes: Vec<_> = sequence.iter().map(|n| hash(*n)).collect();
        let hit = self.borrower.lookup(&hashes);
        let blocks: Vec<u32> = (POOL / 2..).take(hit.blocks() as usize).collect();
        let load = self.borrower.load(&hit, &blocks, &self.kv);
        for layer in 0..LAYERS.len() {
            load.wait_layer(layer).unwrap();
            for (n, block) in sequence.iter().zip(&blocks) {
                assert!(self.holds(*n, layer, *block), "block {n}, layer {layer}");
            }
        }
        assert!(load.finish().failed.is_empty());
        hit.blocks()
    }
}

#[test]
fn what_is_stored_comes_back_byte_for_byte() {
    let engine = Engine::new(16);
    let sequence: Vec<u32> = (0..10).collect();
    assert_eq!(engine.fetch(&sequence), 0);
    let stored = engine.store(&sequence);
    assert_eq!((stored.stored, stored.known, stored.unplaced), (10, 0, 0));
    assert_eq!(stored.bytes.total(), 10 * BLOCK);
    assert_eq!(engine.fetch(&sequence), 10);
    assert_eq!(engine.fetch(&[0, 1, 2, 99, 4]), 3);
    assert_eq!(engine.store(&sequence).known, 10);
    let stats = engine.borrower.stats();
    assert_eq!((stats.host_blocks, stats.hits.host), (10, 13));
}

#[test]
fn a_corrupted_byte_is_noticed() {
    let engine = Engine::new(16);
    engine.store(&[1, 2]);
    let hit = engine.borrower.lookup(&[hash(1), hash(2)]);
    let load = engine.borrower.load(&hit, &[40, 41], &engine.kv);
    assert!(load.finish().failed.is_empty());
    assert!(engine.holds(2, 1, 41));
    let kv = &engine.kv.layers[1];
    let mut byte = [0];
    let at = engine.at(1, 41) + 100;
    engine.stream.read(&kv.memory, at, &mut byte).unwrap();
    engine.stream.write(&kv.memory, at, &[byte[0] ^ 1]).unwrap();
    assert!(!engine.holds(2, 1, 41));
}

#[test]
fn the_coldest_go_first_and_a_sequence_from_its_end() {
    let engine = Engine::new(8);
    engine.store(&[1, 2, 3, 4]);
    engine.store(&[11, 12, 13, 14]);
    assert_eq!(engine.fetch(&[1, 2, 3, 4]), 4);
    engine.store(&[21, 22]);
    // 11 to 14 is the colder sequence, 13 and 14 its end.
    assert_eq!(engine.fetch(&[11, 12, 13, 14]), 2);
    assert_eq!(engine.fetch(&[1, 2, 3, 4]), 4);
    assert_eq!(engine.fetch(&[21, 22]), 2);
    assert_eq!(engine.borrower.stats().evicted_blocks, 2);
}

#[test]
fn a_sequence_too_long_keeps_its_beginning() {
    let engine = Engine::new(4);
    let sequence: Vec<u32> = (0..7).collect();
    let stored = engine.store(&sequence);
    assert_eq!((stored.stored, stored.unplaced), (4, 3));
    assert_eq!(engine.fetch(&sequence), 4);
    // Its own beginning is not evicted for its end.
    assert_eq!(engine.store(&sequence).unplaced, 3);
    assert_eq!(engine.fetch(&sequence), 4);
}

#[test]
fn what_a_hit_holds_is_not_evicted() {
    let engine = Engine::new(4);
    engine.store(&[1, 2]);
    let hit = engine.borrower.lookup(&[hash(1), hash(2)]);
    assert_eq!(engine.store(&[11, 12, 13, 14]).stored, 2);
    let load = engine.borrower.load(&hit, &[40, 41], &engine.kv);
    assert!(load.finish().failed.is_empty());
    assert!(engine.holds(1, 0, 40) && engine.holds(2, 2, 41));
    drop(hit);
    // Its twin: let go, they make room.
    assert_eq!(engine.store(&[21, 22, 23, 24]).stored, 4);
    assert_eq!(engine.fetch(&[1]), 0);
}

#[test]
fn layers_can_be_loaded_a_few_at_a_time_and_again() {
    let engine = Engine::new(8);
    engine.store(&[1, 2, 3]);
    let hit = engine.borrower.lookup(&[hash(1), hash(2), hash(3)]);
    for _ in 0..2 {
        for layer in 0..LAYERS.len() {
            let blocks = [50, 40, 41];
            let layers = layer..layer + 1;
            let load = engine
                .borrower
                .load_layers(&hit, layers, &blocks, &engine.kv);
            load.wait_layer(layer).unwrap();
            assert!(engine.holds(1, layer, 50) && engine.holds(3, layer, 41));
            engine.compute(99, 50);
        }
    }
}

#[test]
fn a_load_can_be_told_to_wait() {
    let engine = Engine::new(8);
    engine.store(&[1, 2]);
    let hit = engine.borrower.lookup(&[hash(1), hash(2)]);
    let gate = Arc::<Gate>::default();
    engine.compute(99, 40);
    let load = (engine.borrower).load_after(&hit, &[40, 41], &engine.kv, &gate.ticket());
    assert!(!load.is_done());
    assert!(engine.holds(99, 0, 40), "a copy overtook the mark");
    gate.open();
    assert!(load.finish().failed.is_empty());
    assert!(engine.holds(1, 0, 40) && engine.holds(2, 2, 41));
}

#[test]
fn closing_waits_for_copies_of_the_host_tier() {
    let mut engine = Engine::new(8);
    engine.store(&[1, 2]);
    let hit = engine.borrower.lookup(&[hash(1), hash(2)]);
    let load = engine.borrower.load(&hit, &[40, 41], &engine.kv);
    drop(std::mem::replace(
        &mut engine.borrower,
        Engine::new(0).borrower,
    ));
    assert!(load.is_done());
    assert!(engine.holds(1, 0, 40) && engine.holds(2, 2, 41));
    assert!(load.finish().failed.is_empty());
}

#[test]
fn a_pool_that_does_not_fit_loads_and_stores_nothing() {
    let engine = Engine::new(8);
    engine.store(&[1]);
    let mut kv = engine.kv.clone();
    kv.blocks = 1_000;
    let hit = engine.borrower.lookup(&[hash(1)]);
    assert_eq!(engine.borrower.load(&hit, &[0], &kv).finish().failed, [0]);
    let stored = engine.borrower.store(&[(hash(2), 0)], &kv, &|_| None);
    assert_eq!(stored.finish().unplaced, 1);
    // A block number outside a good pool is refused alone.
    let load = engine.borrower.load(&hit, &[POOL], &engine.kv);
    assert_eq!(load.finish().failed, [0]);
}

#[test]
fn dropped_loads_and_stores_end_in_the_background() {
    let mut engine = Engine::new(8);
    engine.compute(7, 0);
    let store = engine
        .borrower
        .store(&[(hash(7), 0)], &engine.kv, &|_| None);
    drop(store);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(180);
    while engine.fetch(&[7]) == 0 {
        assert!(std::time::Instant::now() < until, "never became readable");
        std::thread::yield_now();
    }
    let hit = engine.borrower.lookup(&[hash(7)]);
    drop(engine.borrower.load(&hit, &[40], &engine.kv));
    drop(hit);
    // Closing waits for it.
    drop(std::mem::replace(
        &mut engine.borrower,
        Engine::new(0).borrower,
    ));
    assert!(engine.holds(7, 0, 40) && engine.holds(7, 2, 40));
}

#[test]
fn a_leftover_that_is_stuck_holds_up_no_other() {
    let mut engine = Engine::new(8);
    engine.store(&[1]);
    let hit = engine.borrower.lookup(&[hash(1)]);
    let gate = Arc::<Gate>::default();
    let stuck = (engine.borrower).load_after(&hit, &[40], &engine.kv, &gate.ticket());
    drop(stuck);
    engine.compute(7, 0);
    let store = (engine.borrower).store(&[(hash(7), 0)], &engine.kv, &|_| None);
    drop(store);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(180);
    while engine.borrower.lookup(&[hash(7)]).blocks() == 0 {
        assert!(std::time::Instant::now() < until, "never became readable");
        std::thread::yield_now();
    }
    // Its twin: the load really was stuck, and closing waits for it.
    assert!(!engine.holds(1, 0, 40));
    drop(hit);
    gate.open();
    drop(std::mem::replace(
        &mut engine.borrower,
        Engine::new(0).borrower,
    ));
    assert!(engine.holds(1, 0, 40) && engine.holds(1, 2, 40));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random stores and lookups of prefixes of a few conversations, against the rule that whatever is found holds
    /// its own bytes, and that nothing is lost while there is room for everything.
    #[test]
    fn whatever_is_found_holds_its_own_bytes(
        slots in 4_u64..40,
        steps in prop::collection::vec((0_u32..4, 1_u32..12, any::<bool>()), 1..60),
    ) {
        let engine = Engine::new(slots);
        let mut stored: HashMap<u32, u32> = HashMap::new();
        for (conversation, length, store) in steps {
            let sequence: Vec<u32> = (0..length).map(|n| conversation * 100 + n).collect();
            if store {
                engine.store(&sequence);
                let known = stored.entry(conversation).or_default();
                *known = (*known).max(length);
            } else {
                let found = engine.fetch(&sequence);
                let most = stored.get(&conversation).copied().unwrap_or(0).min(length);
                prop_assert!(found <= most);
                if u64::from(stored.values().sum::<u32>()) <= slots {
                    prop_assert_eq!(found, most);
                }
            }
        }
        let stats = engine.borrower.stats();
        prop_assert!(stats.host_blocks <= slots);
        prop_assert_eq!(stats.failed_blocks, 0);
    }
}
