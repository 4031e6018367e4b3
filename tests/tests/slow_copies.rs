//! A copy that is slow holds up what it touches, and nothing else: other slabs are given back, other copies are settled, and
//! a borrower that closes does not wait for ever. Each test shows too that the copy really was held.

use std::{ops::Range, sync::Arc};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use swiftcache_client::cache::Claim;
use swiftcache_tests::{
    engine::{BLOCK_BYTES, Engine, SLAB_BYTES, eventually, hash},
    scene::{Scene, begin_load, begin_store, compute, holds, scattered},
    stub::{Held, Stub, alone},
};

/// The client's draining thread, as far as the kernel knows its name.
const DRAIN: &str = "swiftcache-drai";

/// Blocks that fill the slab of the first device, which has the better link, and those that fill the other one's.
const FIRST: Range<u32> = 0..16;
const OTHER: Range<u32> = 100..116;
/// Blocks of a slab.
const SLOTS: u64 = 16;

fn acknowledged(engine: &Engine) -> u64 {
    engine.borrower.stats().acknowledge.count
}

/// A donor on each device with a slab of its own, and an engine that has filled them one after another: so each is moved
/// by plain copies, from consecutive slots to consecutive slots.
struct Two<'a> {
    scene: Scene<'a>,
    engine: Engine,
    /// The donors' numbers.
    first: usize,
    other: usize,
}

impl<'a> Two<'a> {
    fn new(stub: &'a Stub, host_blocks: u64) -> Result<Self> {
        let mut scene = Scene::new(stub, 1)?;
        let first = scene.donate(0, 1)?;
        let engine = scene.engine(2, host_blocks)?;
        for blocks in [FIRST, OTHER] {
            let blocks: Vec<u32> = blocks.collect();
            compute(&engine, &blocks)?;
            ensure!(begin_store(&engine, &blocks).finish().stored as usize == blocks.len());
        }
        scene.listen()?;
        Ok(Self {
            scene,
            engine,
            first,
            other: 0,
        })
    }

    /// Has a donor ask for its slab back, and waits until the engine knows.
    fn revoke(&mut self, donor: usize) -> Result<()> {
        let before = self.engine.borrower.stats().revocations;
        self.scene.donor(donor).signal(Signal::TERM)?;
        eventually("the revocation", || {
            Ok(self.engine.borrower.stats().revocations > before)
        })
    }

    /// Waits until a donor has got its slab back, which it leaves with.
    fn is_back(&mut self, donor: usize) -> Result<()> {
        eventually("the donor to get its slab back", || {
            self.scene.donor(donor).has_ended()
        })?;
        self.scene.donor(donor).finish()
    }
}

#[test]
fn a_slab_that_is_copied_holds_up_no_other_slab() -> Result<()> {
    alone("a_slab_that_is_copied_holds_up_no_other_slab", |stub| {
        for host_blocks in [0, 2 * SLOTS] {
            let mut two = Two::new(stub, host_blocks)?;
            let (first, other) = (two.first, two.other);
            let hold = two.scene.hold(Held::Kernels)?;
            let load = begin_load(&two.engine, &FIRST.collect::<Vec<_>>())?;
            two.revoke(first)?;
            two.revoke(other)?;
            two.is_back(other)?;
            let moved = two.engine.borrower.stats().moved_to_host;
            ensure!(moved == host_blocks, "{moved} blocks were moved");
            // The twin: the first one is held.
            two.scene.asked(DRAIN, || {
                ensure!(acknowledged(&two.engine) == 1 && !load.is_done());
                Ok(())
            })?;
            ensure!(
                !two.scene.donor(first).has_ended()?,
                "a slab under a copy was given back"
            );
            hold.release()?;
            two.is_back(first)?;
            ensure!(load.finish().failed.is_empty());
            for n in FIRST {
                ensure!(holds(&two.engine, n, scattered(n))?);
            }
        }
        Ok(())
    })
}

#[test]
fn what_was_promised_is_there_whatever_becomes_of_the_lease() -> Result<()> {
    alone(
        "what_was_promised_is_there_whatever_becomes_of_the_lease",
        |stub| {
            for promised in [true, false] {
                let mut scene = Scene::new(stub, 1)?;
                let engine = scene.engine(1, 0)?;
                let blocks: Vec<u32> = FIRST.collect();
                compute(&engine, &blocks)?;
                ensure!(begin_store(&engine, &blocks).finish().stored as usize == blocks.len());
                let hold = scene.hold(Held::Kernels)?;
                let load = begin_load(&engine, &blocks)?;
                ensure!(!load.promise(0), "nothing of it is there");
                ensure!(!promised || load.promise(u64::MAX));
                scene.forget_everything()?;
                eventually("the lease to be refused", || {
                    Ok(engine.borrower.stats().refused_leases == 1)
                })?;
                // Another tenant fills the slab that the donor offers in place of this one.
                let mut rival = scene.rival()?;
                ensure!(rival.run("sweep-store")?.stored > 0);
                ensure!(!load.is_done(), "the copy was not held");
                hold.release()?;
                // The twin: who was promised nothing is told to compute the blocks.
                let failed = load.finish().failed.len();
                ensure!(
                    failed == if promised { 0 } else { blocks.len() },
                    "{failed}"
                );
                for n in FIRST {
                    ensure!(holds(&engine, n, scattered(n))?);
                }
                rival.finish()?;
            }
            Ok(())
        },
    )
}

/// What becomes of what an engine has found, while its donor wants the slab back.
#[derive(Clone, Copy, PartialEq)]
enum Found {
    /// Claimed, and loaded then.
    Loaded,
    /// Claimed, and not needed after all.
    Dropped,
    /// Only found: the twin.
    NotClaimed,
}

/// Pool blocks with other bytes in them, for a sequence to be loaded to.
fn spoiled(engine: &Engine, blocks: &[u32]) -> Result<Vec<u32>> {
    let places: Vec<u32> = blocks.iter().map(|n| scattered(*n)).collect();
    for place in &places {
        engine.compute(u32::MAX, *place)?;
    }
    Ok(places)
}

#[test]
fn a_slab_with_a_claim_is_given_back_when_the_claim_is_loaded_or_dropped() -> Result<()> {
    alone(
        "a_slab_with_a_claim_is_given_back_when_the_claim_is_loaded_or_dropped",
        |stub| {
            for (found, host_blocks) in [
                (Found::Loaded, 0),
                // The blocks are moved out of the slab meanwhile, and read where they were.
                (Found::Loaded, 2 * SLOTS),
                (Found::Dropped, 0),
                (Found::NotClaimed, 0),
            ] {
                let mut two = Two::new(stub, host_blocks)?;
                let (first, other) = (two.first, two.other);
                let blocks: Vec<u32> = FIRST.collect();
                let keys: Vec<_> = blocks.iter().map(|n| hash(*n)).collect();
                let borrower = Arc::clone(&two.engine.borrower);
                ensure!(borrower.claim(&keys, SLOTS * BLOCK_BYTES - 1).is_none());
                ensure!(borrower.claim(&[hash(u32::MAX)], u64::MAX).is_none());
                let hit = two.engine.lookup(&blocks);
                let claim = match found {
                    Found::NotClaimed => None,
                    _ => borrower.claim(&keys, SLOTS * BLOCK_BYTES),
                };
                let claimed = claim.as_ref().map_or(0, Claim::blocks);
                ensure!(
                    claimed
                        == if found == Found::NotClaimed {
                            0
                        } else {
                            SLOTS as u32
                        }
                );
                // The draining thread looks at the first one before it gives the other one back.
                two.revoke(first)?;
                two.revoke(other)?;
                two.is_back(other)?;
                let places = spoiled(&two.engine, &blocks)?;
                if let Some(claim) = claim {
                    ensure!(acknowledged(&two.engine) == 1 && !two.scene.donor(first).has_ended()?);
                    let moved = borrower.stats().moved_to_host;
                    ensure!(moved == host_blocks, "{moved} blocks were moved");
                    if found == Found::Loaded {
                        let load = claim.load(&places, two.engine.kv(), None);
                        ensure!(load.promise(0) && load.finish().failed.is_empty());
                        for n in FIRST {
                            ensure!(holds(&two.engine, n, scattered(n))?);
                        }
                    }
                } else {
                    two.is_back(first)?;
                    let load = borrower.load(&hit, &places, two.engine.kv());
                    ensure!(!load.promise(u64::MAX) && load.finish().failed.len() == blocks.len());
                    continue;
                }
                two.is_back(first)?;
            }
            Ok(())
        },
    )
}

#[test]
fn what_is_claimed_is_there_whatever_becomes_of_the_lease() -> Result<()> {
    alone(
        "what_is_claimed_is_there_whatever_becomes_of_the_lease",
        |stub| {
            let mut scene = Scene::new(stub, 1)?;
            let engine = scene.engine(1, 0)?;
            let blocks: Vec<u32> = FIRST.collect();
            compute(&engine, &blocks)?;
            ensure!(begin_store(&engine, &blocks).finish().stored as usize == blocks.len());
            let keys: Vec<_> = blocks.iter().map(|n| hash(*n)).collect();
            let claim = engine.borrower.claim(&keys, u64::MAX);
            let claim = claim.context("nothing could be claimed")?;
            scene.forget_everything()?;
            eventually("the lease to be refused", || {
                Ok(engine.borrower.stats().refused_leases == 1)
            })?;
            // The twin: what is not claimed yet is lost.
            ensure!(engine.borrower.claim(&keys, u64::MAX).is_none());
            // Another tenant fills the slab that the donor offers in place of this one.
            let mut rival = scene.rival()?;
            ensure!(rival.run("sweep-store")?.stored > 0);
            let places = spoiled(&engine, &blocks)?;
            let load = claim.load(&places, engine.kv(), None);
            ensure!(load.promise(0) && load.finish().failed.is_empty());
            for n in FIRST {
                ensure!(holds(&engine, n, scattered(n))?);
            }
            rival.finish()?;
            Ok(())
        },
    )
}

#[test]
fn blocks_that_are_slow_to_move_hold_up_no_other_slab() -> Result<()> {
    alone(
        "blocks_that_are_slow_to_move_hold_up_no_other_slab",
        |stub| {
            // There is room for the first one's blocks only, so the other's are dropped.
            let mut two = Two::new(stub, SLOTS)?;
            let (first, other) = (two.first, two.other);
            let hold = two.scene.hold(Held::Copies)?;
            two.revoke(first)?;
            let held = |two: &Two<'_>, acknowledgements| {
                two.scene.asked(DRAIN, || {
                    ensure!(acknowledged(&two.engine) == acknowledgements);
                    Ok(())
                })
            };
            held(&two, 0)?;
            two.revoke(other)?;
            two.is_back(other)?;
            // The twin: the first one's blocks are held on their way.
            held(&two, 1)?;
            hold.release()?;
            two.is_back(first)?;
            let moved = two.engine.borrower.stats().moved_to_host;
            ensure!(moved == SLOTS, "{moved} blocks were moved");
            let fetched = two.engine.fetch(&FIRST.collect::<Vec<_>>())?;
            ensure!(fetched.served == FIRST.len() as u32, "{fetched:?}");
            Ok(())
        },
    )
}

#[test]
fn copies_that_nobody_waits_for_do_not_wait_for_each_other() -> Result<()> {
    alone(
        "copies_that_nobody_waits_for_do_not_wait_for_each_other",
        |stub| {
            let two = Two::new(stub, 0)?;
            let hold = two.scene.hold(Held::Kernels)?;
            let load = begin_load(&two.engine, &FIRST.collect::<Vec<_>>())?;
            ensure!(!load.is_done());
            drop(load);
            // Blocks side by side are one plain copy a layer, which is not held.
            let blocks: Vec<u32> = (200..204).collect();
            for (n, block) in blocks.iter().zip(0..) {
                two.engine.compute(*n, block)?;
            }
            let keys: Vec<_> = (blocks.iter())
                .map(|n| swiftcache_tests::engine::hash(*n))
                .zip(0..)
                .collect();
            let marks = two.engine.marks()?;
            let ready = |layer: usize| marks.get(layer).cloned();
            drop(two.engine.borrower.store(&keys, two.engine.kv(), &ready));
            eventually("the store to be settled", || {
                Ok(two.engine.lookup(&blocks).blocks() == 4)
            })?;
            hold.release()
        },
    )
}

#[test]
fn a_borrower_closes_though_its_copies_are_stuck_and_keeps_their_lease() -> Result<()> {
    alone(
        "a_borrower_closes_though_its_copies_are_stuck_and_keeps_their_lease",
        |stub| {
            let two = Two::new(stub, 0)?;
            let (first, other) = (two.first, two.other);
            let hold = two.scene.hold(Held::Kernels)?;
            let load = begin_load(&two.engine, &FIRST.collect::<Vec<_>>())?;
            let Two {
                mut scene, engine, ..
            } = two;
            drop(engine);
            ensure!(!load.is_done(), "nothing was held");
            // The lease that nothing touches is given up, and the other one is kept by this process.
            eventually("the other lease to be released", || {
                let leases = scene.operator.leases()?;
                Ok(leases.len() == 1)
            })?;
            scene.donor(other).signal(Signal::TERM)?;
            eventually("the other donor", || scene.donor(other).has_ended())?;
            scene.donor(first).signal(Signal::TERM)?;
            scene.asked(DRAIN, || {
                let held = scene.operator.node()?.total.unwrap_or_default();
                let kept = held.draining_bytes + held.zombie_bytes + held.leased_bytes;
                ensure!(kept == SLAB_BYTES, "{held:?}");
                Ok(())
            })?;
            ensure!(!scene.donor(first).has_ended()?);
            hold.release()?;
            eventually("the first donor", || scene.donor(first).has_ended())?;
            load.finish();
            Ok(())
        },
    )
}
