//! What goes first, against plain LRU.

use std::collections::HashSet as Set;

use proptest::prelude::*;

use super::*;

fn hash(n: u32) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(bytes)
}

/// A cache of so many slots.
trait Cache {
    /// How many leading blocks of a sequence are there.
    fn lookup(&mut self, sequence: &[u32]) -> usize;
    /// Keeps a sequence.
    fn store(&mut self, sequence: &[u32]);
}

/// By value.
struct Valued {
    value: Value,
    index: HashMap<BlockHash, BlockId>,
    added: u32,
    slots: usize,
}

impl Valued {
    fn new(slots: usize) -> Self {
        Self {
            value: Value::default(),
            index: HashMap::new(),
            added: 0,
            slots,
        }
    }

    fn find(&self, n: u32) -> Option<BlockId> {
        self.index.get(&hash(n)).copied()
    }

    fn lose(&mut self, id: BlockId) {
        self.index.remove(&self.value.get(id).hash);
        self.value.lose(id);
    }

    fn is_stray(&self, n: u32) -> bool {
        self.value.get(self.find(n).unwrap()).stray
    }
}

impl Cache for Valued {
    fn lookup(&mut self, sequence: &[u32]) -> usize {
        let found: Vec<_> = sequence.iter().map_while(|n| self.find(*n)).collect();
        for id in found.iter().rev() {
            self.value.find_again(*id);
        }
        found.len()
    }

    fn store(&mut self, sequence: &[u32]) {
        let known: Set<_> = sequence.iter().filter_map(|n| self.find(*n)).collect();
        let want = sequence.len() - known.len();
        let short = (self.index.len() + want).saturating_sub(self.slots);
        let victims = (self.value).victims(Medium::Hbm, short, |id| !known.contains(&id));
        for id in victims {
            self.lose(id);
        }
        let mut before = None;
        let mut ids = Vec::new();
        for n in sequence {
            let id = match self.find(*n) {
                Some(id) => id,
                None if self.index.len() == self.slots => break,
                None => {
                    let id = BlockId(self.added);
                    self.added += 1;
                    self.value.add(id, hash(*n), Medium::Hbm);
                    self.index.insert(hash(*n), id);
                    id
                }
            };
            if let Some(before) = before {
                self.value.follow(id, before);
            }
            before = Some(id);
            ids.push(id);
        }
        ids.iter().rev().for_each(|id| self.value.touch(*id));
    }
}

/// The twin: by recency alone, the newest last.
struct Lru {
    blocks: Vec<u32>,
    slots: usize,
}

impl Lru {
    fn touch(&mut self, n: u32) {
        self.blocks.retain(|other| *other != n);
        self.blocks.push(n);
    }
}

impl Cache for Lru {
    fn lookup(&mut self, sequence: &[u32]) -> usize {
        let there: Set<u32> = self.blocks.iter().copied().collect();
        let found = sequence.iter().take_while(|n| there.contains(n)).count();
        for n in sequence[..found].iter().rev() {
            self.touch(*n);
        }
        found
    }

    fn store(&mut self, sequence: &[u32]) {
        for n in sequence.iter().rev() {
            self.touch(*n);
        }
        let beyond = self.blocks.len().saturating_sub(self.slots);
        self.blocks.drain(..beyond);
    }
}

/// Conversations that go on, turn by turn, each behind a system prompt that some share, among requests that come once
/// and never again. Returns blocks found.
fn serve(cache: &mut dyn Cache, draws: &[(u8, u8)]) -> usize {
    let mut turns = [0_u32; 8];
    let mut once = 1_000_000;
    let mut found = 0;
    for (kind, who) in draws {
        let sequence: Vec<u32> = if kind % 3 == 0 {
            // Skewed: half of all turns are of the first two.
            let who = usize::from(if *who < 128 { who % 2 } else { who % 8 });
            turns[who] = (turns[who] + 1).min(12);
            let prompt = (who as u32 % 2) * 100;
            let own = (who as u32 + 1) * 10_000;
            let shared = (0..4).map(|n| prompt + n);
            shared.chain((0..turns[who] * 2).map(|n| own + n)).collect()
        } else {
            once += 100;
            (once..once + 16).collect()
        };
        found += cache.lookup(&sequence);
        cache.store(&sequence);
    }
    found
}

fn draws(seed: u64, count: usize) -> Vec<(u8, u8)> {
    let mut word = seed;
    let draw = |_| {
        word = word
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((word >> 40) as u8, (word >> 52) as u8)
    };
    (0..count).map(draw).collect()
}

#[test]
fn value_finds_more_than_recency_on_skewed_conversations() {
    let (mut value, mut recency) = (0, 0);
    for seed in 0..8 {
        let draws = draws(seed, 600);
        let valued = serve(&mut Valued::new(160), &draws);
        let lru = serve(
            &mut Lru {
                blocks: Vec::new(),
                slots: 160,
            },
            &draws,
        );
        assert!(valued > lru, "seed {seed}: {valued} against {lru}");
        value += valued;
        recency += lru;
    }
    assert!(value * 10 > recency * 11, "{value} against {recency}");
}

#[test]
fn what_cannot_be_reached_goes_first() {
    let mut cache = Valued::new(8);
    cache.store(&[1, 2, 3, 4]);
    cache.store(&[11, 12, 13, 14]);
    // 1 to 4 are the hottest; then a revocation takes 2.
    for _ in 0..4 {
        assert_eq!(cache.lookup(&[1, 2, 3, 4]), 4);
    }
    let lost = cache.find(2).unwrap();
    cache.lose(lost);
    cache.store(&[21, 22, 23]);
    assert_eq!(cache.lookup(&[11, 12, 13, 14]), 4);
    assert_eq!(cache.lookup(&[21, 22, 23]), 3);
    assert!(cache.find(3).is_none() && cache.find(4).is_none());
    assert_eq!(cache.lookup(&[1]), 1);
}

#[test]
fn what_comes_back_makes_its_followers_worth_something() {
    let mut cache = Valued::new(16);
    cache.store(&[1, 2, 3, 4]);
    let lost = cache.find(2).unwrap();
    cache.lose(lost);
    assert!(!cache.is_stray(1) && cache.is_stray(3) && cache.is_stray(4));
    cache.store(&[1, 2]);
    assert!(!cache.is_stray(3) && !cache.is_stray(4));
    assert_eq!(cache.lookup(&[1, 2, 3, 4]), 4);
    // One that a replica holds is no loss to what follows it.
    let duplicate = cache.find(2).unwrap();
    cache.value.lose_duplicate(duplicate);
    assert!(!cache.is_stray(3));
}

proptest! {
    /// Whatever is stored, found and lost: strays are just those whose way from a beginning is broken, and the tree
    /// is one.
    #[test]
    fn strays_are_those_that_cannot_be_reached(
        steps in prop::collection::vec((0_u8..3, 0_u32..4, 1_u32..8), 1..80),
    ) {
        let mut cache = Valued::new(64);
        // 0 1 2 ..., with branches at 2: two conversations behind one prompt.
        let sequence = |branch: u32, length: u32| -> Vec<u32> {
            (0..length).map(|n| if n < 2 { n } else { branch * 100 + n }).collect()
        };
        for (what, branch, length) in steps {
            let sequence = sequence(branch, length);
            match what {
                0 => cache.store(&sequence),
                1 => { cache.lookup(&sequence); }
                _ => {
                    if let Some(id) = cache.find(sequence[sequence.len() - 1]) {
                        cache.lose(id);
                    }
                }
            }
            for branch in 0..4 {
                let mut reachable = true;
                for n in self::sequence_of(branch) {
                    match cache.find(n) {
                        None => reachable = false,
                        Some(_) => prop_assert_eq!(cache.is_stray(n), !reachable),
                    }
                }
            }
        }
    }
}

fn sequence_of(branch: u32) -> Vec<u32> {
    (0..8)
        .map(|n| if n < 2 { n } else { branch * 100 + n })
        .collect()
}

#[test]
fn what_comes_back_was_missed_and_outlives_what_came_once() {
    // The twin: without the departure nothing is known of the first two.
    for missed in [true, false] {
        let mut cache = Valued::new(4);
        let once = |cache: &mut Valued, from: u32| {
            for n in from..from + 4 {
                cache.store(&[n]);
            }
        };
        if missed {
            cache.store(&[1, 2]);
            once(&mut cache, 10);
            assert_eq!(cache.lookup(&[1, 2]), 0, "they went");
        }
        cache.store(&[1, 2]);
        once(&mut cache, 20);
        assert_eq!(cache.lookup(&[1, 2]), if missed { 2 } else { 0 });
    }
}

#[test]
fn blocks_that_went_are_forgotten_in_the_order_in_which_they_went() {
    let mut departed = Departed::default();
    for n in 0..10 {
        departed.remember(&hash(n), 1, 4);
    }
    assert_eq!(departed.found.len(), 4);
    assert_eq!(departed.take(&hash(5)), None);
    assert_eq!(departed.take(&hash(6)), Some(1));
    // One that comes back and goes again counts from its last departure.
    departed.remember(&hash(7), 2, 4);
    departed.remember(&hash(11), 0, 4);
    departed.remember(&hash(12), 0, 4);
    assert_eq!(departed.take(&hash(7)), Some(2));
    assert_eq!(departed.take(&hash(8)), None);
    assert!(departed.order.len() <= 4);
}
