//! Blocks that are to be read, merged where they lie side by side: a disk reads few long pieces faster than many short ones.

use super::room::Spot;

/// The most that is read at a time, bytes, unless one block is larger.
const RUN_BYTES: u64 = 4 << 20;

/// A block that is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Which of those that were asked for it is.
    pub(super) index: usize,
    pub(super) id: u32,
    pub(super) spot: Spot,
    pub(super) checksum: u64,
    /// Of its extent.
    pub(super) generation: u64,
}

/// Blocks in consecutive slots of one extent.
pub(super) type Run = Vec<Wanted>;

/// Merges blocks that follow one another both in what was asked for and in the file.
pub(super) fn runs(wanted: Vec<Wanted>, slot_bytes: u64) -> Vec<Run> {
    let most = (RUN_BYTES / slot_bytes.max(1)).max(1) as usize;
    let mut runs: Vec<Run> = Vec::new();
    for block in wanted {
        let next = |last: &Wanted| {
            last.spot.extent == block.spot.extent && last.spot.slot + 1 == block.spot.slot
        };
        match runs.last_mut() {
            Some(run) if run.len() < most && run.last().is_some_and(next) => run.push(block),
            _ => runs.push(vec![block]),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_block_is_in_one_run_in_its_place(
            spots in prop::collection::vec((0_u32..2, 0_u32..6), 0..40), slot_bytes in 1_u64..(3 << 20),
        ) {
            let wanted: Vec<Wanted> = spots
                .iter()
                .enumerate()
                .map(|(index, (extent, slot))| Wanted {
                    index,
                    id: index as u32,
                    spot: Spot { extent: *extent, slot: *slot },
                    checksum: 0,
                    generation: 0,
                })
                .collect();
            let made = runs(wanted.clone(), slot_bytes);
            prop_assert_eq!(made.concat(), wanted);
            for run in &made {
                let first = run[0].spot;
                for (at, block) in run.iter().enumerate() {
                    prop_assert_eq!(block.spot.extent, first.extent);
                    prop_assert_eq!(block.spot.slot, first.slot + at as u32);
                }
                prop_assert!(run.len() == 1 || run.len() as u64 * slot_bytes <= RUN_BYTES);
            }
        }
    }
}
