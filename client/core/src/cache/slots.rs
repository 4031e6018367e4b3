//! Which slots of a slab are free. Takes runs: consecutive slots make one extent a layer.

/// A bitmap of free slots.
#[derive(Debug)]
pub(super) struct Slots {
    /// One bit a slot; set: free. Bits past the last slot are never set.
    words: Vec<u64>,
    slots: u32,
    free: u32,
}

/// Consecutive slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u32,
    pub(super) count: u32,
}

impl Slots {
    /// All free.
    pub(super) fn new(slots: u32) -> Self {
        let mut words = vec![u64::MAX; slots.div_ceil(64) as usize];
        if let Some(last) = words.last_mut()
            && !slots.is_multiple_of(64)
        {
            *last = (1 << (slots % 64)) - 1;
        }
        Self {
            words,
            slots,
            free: slots,
        }
    }

    pub(super) fn free(&self) -> u32 {
        self.free
    }

    /// Takes up to `want` consecutive slots: from `near` on if that one is free, else the first run that is long
    /// enough, else the longest.
    pub(super) fn take(&mut self, want: u32, near: Option<u32>) -> Option<Run> {
        if want == 0 || self.free == 0 {
            return None;
        }
        let run = match near {
            Some(near) if self.is_free(near) => Run {
                first: near,
                count: self.run_end(near) - near,
            },
            _ => self.best_run(want)?,
        };
        let taken = Run {
            first: run.first,
            count: run.count.min(want),
        };
        for slot in taken.first..taken.first + taken.count {
            self.words[slot as usize / 64] &= !(1 << (slot % 64));
        }
        self.free -= taken.count;
        Some(taken)
    }

    /// Gives one slot back. Giving back a free slot changes nothing.
    pub(super) fn give(&mut self, slot: u32) {
        debug_assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        debug_assert!(!self.is_free(slot), "slot {slot} given back twice");
        let word = &mut self.words[slot as usize / 64];
        let bit = 1 << (slot % 64);
        if *word & bit == 0 {
            *word |= bit;
            self.free += 1;
        }
    }

    fn is_free(&self, slot: u32) -> bool {
        slot < self.slots && self.words[slot as usize / 64] & (1 << (slot % 64)) != 0
    }

    fn best_run(&self, want: u32) -> Option<Run> {
        let mut best: Option<Run> = None;
        let mut from = 0;
        while let Some(first) = self.next(from, true) {
            let end = self.run_end(first);
            let run = Run {
                first,
                count: end - first,
            };
            if run.count >= want {
                return Some(run);
            }
            if best.is_none_or(|best| run.count > best.count) {
                best = Some(run);
            }
            from = end;
        }
        best
    }

    /// Where the free run that `first` is in ends.
    fn run_end(&self, first: u32) -> u32 {
        self.next(first, false).unwrap_or(self.slots)
    }

    /// The first slot at or after `from` that is free, or that is not.
    fn next(&self, from: u32, free: bool) -> Option<u32> {
        let mut index = from as usize / 64;
        let mut mask = u64::MAX << (from % 64);
        while let Some(word) = self.words.get(index) {
            let bits = (if free { *word } else { !*word }) & mask;
            if bits != 0 {
                let slot = index as u32 * 64 + bits.trailing_zeros();
                return (slot < self.slots).then_some(slot);
            }
            mask = u64::MAX;
            index += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Free slots as a set: slow and obvious.
    struct Naive(BTreeSet<u32>);

    impl Naive {
        fn longest(&self, slots: u32) -> u32 {
            let mut longest = 0;
            let mut current = 0;
            for slot in 0..slots {
                current = if self.0.contains(&slot) {
                    current + 1
                } else {
                    0
                };
                longest = longest.max(current);
            }
            longest
        }
    }

    proptest! {
        #[test]
        fn takes_only_free_slots_and_the_longest_run_there_is(
            slots in 1_u32..200,
            steps in prop::collection::vec((any::<bool>(), 1_u32..40, 0_u32..200), 1..100),
        ) {
            let mut tested = Slots::new(slots);
            let mut naive = Naive((0..slots).collect());
            for (take, want, slot) in steps {
                if take {
                    let near = (slot % 2 == 0).then_some(slot);
                    let longest = naive.longest(slots);
                    let near_is_free = near.is_some_and(|near| naive.0.contains(&near));
                    match tested.take(want, near) {
                        None => prop_assert!(naive.0.is_empty()),
                        Some(run) => {
                            prop_assert!(run.count >= 1 && run.count <= want);
                            if near_is_free {
                                prop_assert_eq!(Some(run.first), near);
                            } else {
                                prop_assert_eq!(run.count, want.min(longest));
                            }
                            for slot in run.first..run.first + run.count {
                                prop_assert!(naive.0.remove(&slot), "slot {} was taken", slot);
                            }
                        }
                    }
                } else if slot < slots && !naive.0.contains(&slot) {
                    tested.give(slot);
                    naive.0.insert(slot);
                }
                prop_assert_eq!(tested.free() as usize, naive.0.len());
            }
        }
    }

    #[test]
    fn consecutive_blocks_get_consecutive_slots() {
        let mut slots = Slots::new(100);
        assert_eq!(
            slots.take(10, None),
            Some(Run {
                first: 0,
                count: 10
            })
        );
        assert_eq!(
            slots.take(5, None),
            Some(Run {
                first: 10,
                count: 5
            })
        );
        slots.give(3);
        // A run of one is no place for four.
        assert_eq!(
            slots.take(4, None),
            Some(Run {
                first: 15,
                count: 4
            })
        );
        assert_eq!(slots.take(4, Some(3)), Some(Run { first: 3, count: 1 }));
    }
}
