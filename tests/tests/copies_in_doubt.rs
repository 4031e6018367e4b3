//! Copies that are not known to be over count as running. Whatever the driver answers, a slab or a block of the engine
//! is not released for another use before. Each test has a twin: the same steps without the fault, or with a party that
//! does not wait.

use std::{sync::mpsc, thread};

use anyhow::{Context, Result, ensure};
use swiftcache_client::cache::{Load, Loaded};
use swiftcache_tests::{
    PATIENCE,
    crew::BorrowerProcess,
    engine::{Engine, eventually},
    scene::{Hold, Scene, begin_load, begin_store, compute, holds, scattered},
    stub::{Held, Stub, alone},
};

/// The name of the client's draining thread, cut to the 15 bytes that the kernel keeps.
const DRAIN: &str = "swiftcache-drai";

/// Ways in which the driver fails while copies are queued or waited for. A store has four layers. Each is a launch on
/// one stream, and the end of the stream is marked once. The code of a dead context (719) proves nothing if only one
/// call returns it.
const FAULTS: [&str; 8] = [
    "cuLaunchKernel=701@3",
    "cuLaunchKernel=719@3",
    "cuEventRecord=999@1",
    "cuEventRecord=999",
    "cuEventQuery=999@1",
    "cuEventQuery=719@1",
    "cuEventQuery=999",
    "cuCtxPushCurrent_v2=999@9-12",
];

/// A fault that nothing meets, for twins.
const NONE: &str = "cuGetErrorName=999@1";

fn sequence(blocks: u32) -> Vec<u32> {
    (0..blocks).collect()
}

fn revoked(engine: &Engine) -> Result<()> {
    eventually("a revocation", || {
        Ok(engine.borrower.stats().revocations == 1)
    })
}

fn acknowledged(engine: &Engine) -> u64 {
    engine.borrower.stats().acknowledge.count
}

/// Checks that the other tenant has a slab, stores blocks there, and reads them back.
fn thrives(mut rival: BorrowerProcess) -> Result<()> {
    let stored = rival.run("sweep-store")?.stored;
    ensure!(stored > 0, "the rival stored nothing");
    let fetched = rival.run("sweep-fetch")?;
    let right = fetched.served == fetched.found && fetched.served > 0;
    ensure!(right, "{fetched:?}");
    rival.finish().map(|_| ())
}

/// While a store to two slabs is in flight, the driver fails, and another tenant wants one of the slabs.
fn store_and_revoke(stub: &Stub, fault: &str) -> Result<()> {
    let scene = Scene::new(stub, 2)?;
    let engine = scene.engine(2, 0)?;
    compute(&engine, &sequence(32))?;
    scene.listen()?;
    let hold = scene.hold(Held::Kernels)?;
    let fault = scene.fault(fault)?;
    let store = begin_store(&engine, &sequence(32));
    let rival = scene.rival()?;
    revoked(&engine)?;
    scene.asked(DRAIN, || {
        ensure!(!store.is_done(), "the store counts as done");
        ensure!(acknowledged(&engine) == 0, "acknowledged under a copy");
        let got = rival.report()?.done;
        ensure!(got == 0, "the rival has a slab that is written");
        Ok(())
    })?;
    hold.release()?;
    let stored = store.finish();
    eventually("the acknowledgement", || Ok(acknowledged(&engine) == 1))?;
    stub.lift(&fault)?;
    ensure!(stored.stored + stored.lost == 32, "{stored:?}");
    thrives(rival)
}

#[test]
fn a_slab_is_not_let_go_of_under_a_store() -> Result<()> {
    alone("a_slab_is_not_let_go_of_under_a_store", |stub| {
        for fault in [NONE].iter().chain(&FAULTS) {
            store_and_revoke(stub, fault).context(*fault)?;
        }
        Ok(())
    })
}

/// The twin: if no copies are held, a failed store does not keep the slab.
#[test]
fn a_slab_is_let_go_of_after_a_failed_store_that_nothing_holds() -> Result<()> {
    alone(
        "a_slab_is_let_go_of_after_a_failed_store_that_nothing_holds",
        |stub| {
            for fault in FAULTS {
                let scene = Scene::new(stub, 2)?;
                let engine = scene.engine(2, 0)?;
                compute(&engine, &sequence(32))?;
                let fault = scene.fault(fault)?;
                let store = begin_store(&engine, &sequence(32));
                let rival = scene.rival()?;
                eventually("the acknowledgement", || Ok(acknowledged(&engine) == 1))?;
                stub.lift(&fault)?;
                store.finish();
                thrives(rival)?;
            }
            Ok(())
        },
    )
}

/// Waits for a load in another thread.
struct Finish {
    outcome: mpsc::Receiver<Loaded>,
}

impl Finish {
    const THREAD: &str = "finish";

    fn of(load: Load) -> Result<Self> {
        let (send, outcome) = mpsc::channel();
        let thread = thread::Builder::new().name(Self::THREAD.to_owned());
        thread.spawn(move || send.send(load.finish()))?;
        Ok(Self { outcome })
    }

    fn is_over(&self) -> bool {
        !matches!(self.outcome.try_recv(), Err(mpsc::TryRecvError::Empty))
    }

    fn wait(&self) -> Result<Loaded> {
        Ok(self.outcome.recv_timeout(PATIENCE)?)
    }
}

/// Begins a load that meets a fault, into blocks that hold other bytes. Returns the load, and the hold on its copies.
fn begin_failing_load<'a>(
    scene: &Scene<'a>,
    engine: &Engine,
    fault: &str,
) -> Result<(Load, Hold<'a>)> {
    compute(engine, &sequence(8))?;
    ensure!(begin_store(engine, &sequence(8)).finish().stored == 8);
    for n in sequence(8) {
        engine.compute(99, scattered(n))?;
    }
    let hold = scene.hold(Held::Kernels)?;
    let fault = scene.fault(fault)?;
    let load = begin_load(engine, &sequence(8))?;
    scene.stub.lift(&fault)?;
    Ok((load, hold))
}

/// The engine computes the blocks that a load could not deliver, and after that no copy of the load overwrites them.
#[test]
fn an_engine_gets_its_blocks_back_after_the_last_copy_of_a_failed_load() -> Result<()> {
    let test = "an_engine_gets_its_blocks_back_after_the_last_copy_of_a_failed_load";
    alone(test, |stub| {
        // A load marks each layer.
        for fault in [
            "cuLaunchKernel=701@3",
            "cuLaunchKernel=719@3",
            "cuEventRecord=999@3",
        ] {
            let scene = Scene::new(stub, 1)?;
            let engine = scene.engine(1, 0)?;
            let (load, hold) = begin_failing_load(&scene, &engine, fault)?;
            scene.listen()?;
            ensure!(!load.is_done(), "{fault}: the load counts as done");
            let finish = Finish::of(load)?;
            scene.asked(Finish::THREAD, || {
                ensure!(!finish.is_over(), "{fault}: finished under a copy");
                Ok(())
            })?;
            hold.release()?;
            ensure!(finish.wait()?.failed == sequence(8), "{fault}");
            for n in sequence(8) {
                engine.compute(n + 50, scattered(n))?;
            }
            // Any copy that is still in flight arrives before this store is done.
            ensure!(begin_store(&engine, &[200]).finish().lost == 0);
            for n in sequence(8) {
                ensure!(
                    holds(&engine, n + 50, scattered(n))?,
                    "{fault}: block {n} was overwritten"
                );
            }
        }
        Ok(())
    })
}

/// The twin: copies overwrite the blocks of an engine that does not wait.
#[test]
fn an_engine_that_does_not_wait_for_a_failed_load_is_overwritten() -> Result<()> {
    alone(
        "an_engine_that_does_not_wait_for_a_failed_load_is_overwritten",
        |stub| {
            let scene = Scene::new(stub, 1)?;
            let engine = scene.engine(1, 0)?;
            let (load, hold) = begin_failing_load(&scene, &engine, "cuLaunchKernel=701@3")?;
            // The hold does not affect plain copies, by which the engine computes.
            for n in sequence(8) {
                engine.compute(n + 50, scattered(n))?;
                ensure!(holds(&engine, n + 50, scattered(n))?);
            }
            hold.release()?;
            load.finish();
            for n in sequence(8) {
                let survived = |layer| engine.holds(n + 50, layer, scattered(n));
                ensure!(!survived(0)? && !survived(1)?, "nothing was in flight");
                ensure!(
                    survived(2)? && survived(3)?,
                    "more was queued than the fault let through"
                );
            }
            Ok(())
        },
    )
}

/// A query that fails is repeated.
#[test]
fn a_load_is_over_when_its_copies_are_and_not_when_a_question_fails() -> Result<()> {
    alone(
        "a_load_is_over_when_its_copies_are_and_not_when_a_question_fails",
        |stub| {
            for fault in [
                "cuEventQuery=999@1-3",
                "cuEventQuery=719@1",
                "cuStreamQuery=999",
            ] {
                let scene = Scene::new(stub, 1)?;
                let engine = scene.engine(1, 0)?;
                let (load, hold) = begin_failing_load(&scene, &engine, NONE)?;
                scene.listen()?;
                let fault = scene.fault(fault)?;
                ensure!(!load.is_done(), "the load counts as done");
                let finish = Finish::of(load)?;
                scene.asked(Finish::THREAD, || {
                    ensure!(!finish.is_over(), "finished under a copy");
                    Ok(())
                })?;
                hold.release()?;
                ensure!(
                    finish.wait()?.failed.is_empty(),
                    "nothing was wrong with the copies"
                );
                stub.lift(&fault)?;
                for n in sequence(8) {
                    ensure!(holds(&engine, n, scattered(n))?);
                }
            }
            Ok(())
        },
    )
}

/// Blocks are being moved out of a revoked slab to the host tier.
#[test]
fn a_slab_is_not_let_go_of_while_its_blocks_are_moved() -> Result<()> {
    alone(
        "a_slab_is_not_let_go_of_while_its_blocks_are_moved",
        |stub| {
            for fault in [
                NONE,
                "cuMemcpyAsync=701@3",
                "cuEventRecord=999@1",
                "cuEventQuery=999@1-3",
            ] {
                let scene = Scene::new(stub, 2)?;
                let engine = scene.engine(2, 32)?;
                compute(&engine, &sequence(32))?;
                ensure!(begin_store(&engine, &sequence(32)).finish().stored == 32);
                scene.listen()?;
                let hold = scene.hold(Held::Copies)?;
                let fault = scene.fault(fault)?;
                let rival = scene.rival()?;
                revoked(&engine)?;
                scene.asked(DRAIN, || {
                    ensure!(acknowledged(&engine) == 0, "acknowledged under a copy");
                    let got = rival.report()?.done;
                    ensure!(got == 0, "the rival has a slab that is read");
                    Ok(())
                })?;
                hold.release()?;
                eventually("the acknowledgement", || Ok(acknowledged(&engine) == 1))?;
                stub.lift(&fault)?;
                thrives(rival)?;
                // Blocks that were moved are right, and the others are not found.
                let fetched = engine.fetch(&sequence(32))?;
                ensure!(fetched.served == fetched.found, "{fetched:?}");
            }
            Ok(())
        },
    )
}
