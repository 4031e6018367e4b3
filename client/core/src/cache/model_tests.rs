use proptest::prelude::*;
use swiftcache_proto::domain::BlockHash;

use super::{CacheModel, Medium, ModelRun, Retention};

fn hashes(ids: impl IntoIterator<Item = u16>) -> Vec<BlockHash> {
    let hash = |id: u16| {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&id.to_le_bytes());
        BlockHash(bytes)
    };
    ids.into_iter().map(hash).collect()
}

fn found(model: &mut CacheModel, ids: impl IntoIterator<Item = u16>) -> u32 {
    let runs = model.lookup(&hashes(ids));
    runs.iter().map(|run| run.blocks).sum()
}

#[test]
fn donors_come_before_host_memory_and_the_best_link_before_others() {
    let mut model = CacheModel::new(4, Retention::Value);
    model.lend(7, 1, 2);
    model.lend(3, 0, 2);
    assert_eq!(model.store(&hashes(0..6)), 0);
    let run = |donor, blocks| ModelRun { donor, blocks };
    let runs = model.lookup(&hashes(0..9));
    assert_eq!(runs, [run(Some(3), 2), run(Some(7), 2), run(None, 2)]);
}

#[test]
fn what_is_evicted_from_donors_is_found_in_host_memory_as_long_as_it_has_room() {
    for (host, kept) in [(8, 4), (0, 0)] {
        let mut model = CacheModel::new(host, Retention::Value);
        model.lend(0, 0, 4);
        model.store(&hashes(0..4));
        model.store(&hashes(100..104));
        assert_eq!(found(&mut model, 0..4), kept, "host tier of {host}");
        assert_eq!(found(&mut model, 100..104), 4);
    }
}

#[test]
fn a_slab_taken_back_costs_nothing_while_others_have_room_and_everything_without_a_rescue() {
    for (rescue, kept) in [(true, 4), (false, 0)] {
        let mut model = CacheModel::new(0, Retention::Value);
        model.lend(0, 0, 4);
        model.store(&hashes(0..4));
        model.lend(1, 0, 4);
        assert_eq!(model.take_back(0, 1, rescue), 1);
        assert_eq!((model.slabs_of(0), model.lent_slots()), (0, 4));
        assert_eq!(found(&mut model, 0..4), kept, "rescue: {rescue}");
    }
}

#[test]
fn what_was_found_outlives_what_is_newer_unless_only_age_counts() {
    for (retention, kept) in [(Retention::Value, 4), (Retention::Age, 0)] {
        let mut model = CacheModel::new(0, retention);
        model.lend(0, 0, 12);
        model.store(&hashes(0..4));
        assert_eq!(found(&mut model, 0..4), 4);
        model.store(&hashes(100..104));
        model.store(&hashes(200..204));
        model.store(&hashes(300..304));
        assert_eq!(found(&mut model, 0..4), kept, "{retention:?}");
    }
}

#[test]
fn the_cheapest_slab_goes_first() {
    let mut model = CacheModel::new(0, Retention::Value);
    model.lend(0, 0, 4);
    model.lend(0, 0, 4);
    model.store(&hashes(0..4));
    assert_eq!(model.take_back(0, 1, false), 0, "an empty one");
    assert_eq!(found(&mut model, 0..4), 4);
}

proptest! {
    /// No slot has two blocks, none is lost, and what is found is a prefix of what was stored.
    #[test]
    fn slots_and_blocks_add_up(
        host in 0_u32..12,
        steps in prop::collection::vec((0_u8..4, 0_u16..6, 1_u16..10), 1..120),
    ) {
        let mut model = CacheModel::new(host, Retention::Value);
        let mut lent = [0_usize; 3];
        for (step, a, b) in steps {
            let donor = usize::from(a) % 3;
            match step {
                0 => {
                    model.lend(donor, 0, 4);
                    lent[donor] += 1;
                }
                1 => {
                    let count = usize::from(b) % (lent[donor] + 1);
                    model.take_back(donor, count, b % 2 == 0);
                    lent[donor] -= count;
                }
                _ => {
                    let prompt = hashes((0..b).map(|at| a * 100 + at));
                    let before: u32 = model.lookup(&prompt).iter().map(|run| run.blocks).sum();
                    let unplaced = model.store(&prompt);
                    let after: u32 = model.lookup(&prompt).iter().map(|run| run.blocks).sum();
                    prop_assert!(after >= before);
                    prop_assert_eq!(after + unplaced, u32::from(b));
                }
            }
            for (donor, lent) in lent.iter().enumerate() {
                prop_assert_eq!(model.slabs_of(donor), *lent);
            }
            let mut held = 0;
            let mut free = [0; 2];
            let mut slots = [0; 2];
            for (key, slab) in &model.slabs {
                let taken = slab.occupants.iter().flatten().count();
                held += taken;
                prop_assert_eq!(taken + slab.free.len(), slab.occupants.len());
                prop_assert_eq!(model.roomy.contains(key), !slab.free.is_empty());
                free[key.medium as usize] += slab.free.len() as u32;
                slots[key.medium as usize] += slab.occupants.len() as u32;
                for (slot, id) in slab.occupants.iter().enumerate() {
                    let Some(id) = id else { continue };
                    let block = &model.blocks[*id as usize];
                    prop_assert_eq!((block.slab, block.slot as usize), (Some(*key), slot));
                }
            }
            prop_assert_eq!(held, model.held());
            prop_assert_eq!((free, slots), (model.free, model.slots));
            let listed = |medium| model.value.newest(medium).count();
            prop_assert_eq!(listed(Medium::Hbm) + listed(Medium::Host), held);
        }
    }
}
