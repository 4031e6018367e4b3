//! A driver that fails for a moment costs the operation that meets it. One that goes on failing makes a route go down: nothing
//! is promised or stored there, and it comes back by itself when copies work again.

use std::{ops::Range, process::Command};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use swiftcache_proto::domain::LinkKind;
use swiftcache_tests::{
    engine::{Engine, eventually},
    programs::program,
    scene::{Scene, begin_load, begin_store, begin_store_by_layer, compute, holds, scattered},
    stub::{Stub, alone},
};

fn sequence(blocks: Range<u32>) -> Vec<u32> {
    blocks.collect()
}

/// Every call that a store or a load makes, failing once.
const ONCE: [&str; 6] = [
    "cuLaunchKernel=701@1",
    "cuLaunchKernel=719@3",
    "cuEventRecord=999@2",
    "cuEventCreate=2@1",
    "cuEventQuery=999@1",
    "cuCtxPushCurrent_v2=999@3",
];

#[test]
fn one_failure_costs_one_operation() -> Result<()> {
    alone("one_failure_costs_one_operation", |stub| {
        for fault in ONCE {
            let scene = Scene::new(stub, 1)?;
            let engine = scene.engine(1, 0)?;
            compute(&engine, &sequence(0..8))?;
            ensure!(begin_store(&engine, &sequence(0..8)).finish().stored == 8);
            let injected = scene.fault(fault)?;
            let failed = begin_load(&engine, &sequence(0..8))?.finish().failed;
            stub.lift(&injected)?;
            let counted = engine.borrower.stats().failed_operations;
            let expected = u64::from(!failed.is_empty());
            ensure!(
                counted == expected,
                "{fault}: {counted} counted, {failed:?} failed"
            );
            for n in 0..8 {
                engine.compute(99, scattered(n))?;
            }
            let again = begin_load(&engine, &sequence(0..8))?.finish().failed;
            ensure!(again.is_empty(), "{fault}: {again:?} failed after it");
            for n in 0..8 {
                ensure!(holds(&engine, n, scattered(n))?, "{fault}");
            }
            let (at_once, by_layer) = (sequence(8..12), sequence(16..20));
            compute(&engine, &at_once)?;
            compute(&engine, &by_layer)?;
            let marks = engine.marks()?;
            let injected = scene.fault(fault)?;
            begin_store(&engine, &at_once).finish();
            stub.lift(&injected)?;
            let injected = scene.fault(fault)?;
            begin_store_by_layer(&engine, &by_layer, &marks).finish();
            stub.lift(&injected)?;
            compute(&engine, &sequence(12..16))?;
            let stored = begin_store(&engine, &sequence(12..16)).finish();
            ensure!(stored.stored == 4, "{fault}: {stored:?} after it");
            ensure!(engine.borrower.stats().routes_down == 0, "{fault}");
        }
        Ok(())
    })
}

#[test]
fn a_mark_that_fails_says_nothing_about_a_route() -> Result<()> {
    alone("a_mark_that_fails_says_nothing_about_a_route", |stub| {
        let scene = Scene::new(stub, 1)?;
        let engine = scene.engine(1, 0)?;
        let blocks = sequence(0..8);
        compute(&engine, &blocks)?;
        ensure!(begin_store(&engine, &blocks).finish().stored == 8);
        let hit = engine.lookup(&blocks);
        let places: Vec<u32> = blocks.iter().map(|n| scattered(*n)).collect();
        // What the engine computes is marked on a stream of its own.
        let computes = scene.layer.stream(&scene.device())?;
        let fault = scene.fault("cuStreamWaitEvent=999")?;
        for failures in 1..=5 {
            let mark = computes.record()?;
            let load = (engine.borrower).load_after(&hit, &places, engine.kv(), &mark);
            ensure!(load.finish().failed.len() == blocks.len());
            let stats = engine.borrower.stats();
            ensure!(
                (stats.failed_operations, stats.routes_down) == (failures, 0),
                "{stats:?}"
            );
        }
        stub.lift(&fault)?;
        ensure!(begin_load(&engine, &blocks)?.finish().failed.is_empty());
        // The twin: copies that fail as often.
        let fault = scene.fault("peer_copies=701")?;
        for _ in 0..3 {
            let failed = engine
                .borrower
                .load(&hit, &places, engine.kv())
                .finish()
                .failed;
            ensure!(failed.len() == blocks.len());
        }
        ensure!(engine.borrower.stats().routes_down == 1);
        stub.lift(&fault)
    })
}

/// How often this process has opened others' memory, and how often it has let go of it.
fn mapped(stub: &Stub) -> Result<(usize, usize)> {
    let calls = stub.calls()?;
    let count = |symbol: &str| {
        let its = calls
            .iter()
            .filter(|call| call.is(std::process::id(), symbol));
        its.filter(|call| call.result == Some(0)).count()
    };
    Ok((count("cuMemImportFromShareableHandle"), count("cuMemUnmap")))
}

#[test]
fn what_a_failed_copy_needed_is_unmapped_when_its_slab_is_acknowledged() -> Result<()> {
    let test = "what_a_failed_copy_needed_is_unmapped_when_its_slab_is_acknowledged";
    alone(test, |stub| {
        stub.trace(&["cuMemImportFromShareableHandle", "cuMemUnmap"])?;
        let mut scene = Scene::new(stub, 1)?;
        let engine = scene.engine(1, 0)?;
        compute(&engine, &sequence(0..8))?;
        let marks = engine.marks()?;
        scene.fault("cuLaunchKernel=701@3")?;
        let store = begin_store_by_layer(&engine, &sequence(0..8), &marks);
        ensure!(store.finish().lost == 8);
        // The twin: as long as the lease is held, it is mapped.
        ensure!(mapped(stub)? == (1, 0));
        scene.donor(0).signal(Signal::TERM)?;
        eventually("the acknowledgement", || {
            Ok(engine.borrower.stats().acknowledge.count == 1)
        })?;
        ensure!(
            mapped(stub)? == (1, 1),
            "still mapped after the acknowledgement"
        );
        Ok(())
    })
}

/// Blocks that fill the slab of the engine's own device, and some in the other one's.
const NEAR: Range<u32> = 0..16;
const FAR: Range<u32> = 100..108;

/// A node whose engine has filled a slab of its own device, and has blocks in one of the other device and room left there.
fn near_and_far(stub: &Stub) -> Result<(Scene<'_>, Engine)> {
    let mut scene = Scene::new(stub, 1)?;
    scene.donate(0, 1)?;
    let engine = scene.engine(2, 0)?;
    for (blocks, link) in [(NEAR, LinkKind::SameDevice), (FAR, LinkKind::Nvlink)] {
        let blocks = sequence(blocks);
        compute(&engine, &blocks)?;
        let stored = begin_store(&engine, &blocks).finish();
        ensure!(stored.bytes[link] == stored.bytes.total(), "{stored:?}");
    }
    Ok((scene, engine))
}

/// Loads a sequence, and says whether it came whole.
fn loads(engine: &Engine, blocks: &[u32]) -> Result<bool> {
    let hit = engine.lookup(blocks);
    if (hit.blocks() as usize) < blocks.len() {
        return Ok(false);
    }
    let places: Vec<u32> = blocks.iter().map(|n| scattered(*n)).collect();
    let load = engine.borrower.load(&hit, &places, engine.kv());
    Ok(load.finish().failed.is_empty())
}

/// What `swiftcache status --json` says: operations failed, and routes down.
fn status(scene: &Scene<'_>) -> Result<(u64, u64)> {
    let output = Command::new(program("swiftcache")?)
        .args(["status", "--json", "--socket"])
        .arg(scene.node.socket())
        .output()?;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let number = |name: &str| status["traffic"][name].as_u64().context("no such number");
    Ok((number("failed_operations")?, number("routes_down")?))
}

#[test]
fn a_route_that_fails_repeatedly_is_down_until_copies_work_again() -> Result<()> {
    alone(
        "a_route_that_fails_repeatedly_is_down_until_copies_work_again",
        |stub| {
            let (scene, engine) = near_and_far(stub)?;
            let (near, far) = (sequence(NEAR), sequence(FAR));
            let stats = || engine.borrower.stats();
            let fault = scene.fault("peer_copies=701")?;
            for failures in 1..=3 {
                ensure!(stats().routes_down == 0, "down after {failures} failures");
                ensure!(begin_load(&engine, &far)?.finish().failed.len() == far.len());
                ensure!(stats().failed_operations == failures);
            }
            ensure!(stats().routes_down == 1);
            ensure!(
                engine.lookup(&far).blocks() == 0,
                "promised behind a route that is down"
            );
            ensure!(loads(&engine, &near)?, "the other route works");
            // It is told where people look.
            eventually("the status", || Ok(status(&scene)? == (3, 1)))?;
            // What is stored goes elsewhere, though there is room.
            let blocks = sequence(1_000..1_004);
            compute(&engine, &blocks)?;
            let stored = begin_store(&engine, &blocks).finish();
            ensure!(
                stored.stored == 4 && stored.bytes[LinkKind::Nvlink] == 0,
                "{stored:?}"
            );
            ensure!(
                (stats().failed_operations, stats().routes_down) == (3, 1),
                "{:?}",
                stats()
            );
            stub.lift(&fault)?;
            eventually("the route to be tried, and to work", || {
                Ok(stats().routes_down == 0)
            })?;
            ensure!(loads(&engine, &far)?);
            for n in FAR {
                ensure!(holds(&engine, n, scattered(n))?);
            }
            ensure!(stores_far(&engine, 2_000)?, "nothing is stored there again");
            eventually("the status", || Ok(status(&scene)?.1 == 0))
        },
    )
}

/// Whether some of what is stored now goes to the other device, where there is room. A slot may be free in the nearer slab: when
/// blocks must go, a little more room is made than is needed.
fn stores_far(engine: &Engine, first: u32) -> Result<bool> {
    let blocks = sequence(first..first + 4);
    compute(engine, &blocks)?;
    let stored = begin_store(engine, &blocks).finish();
    Ok(stored.stored == 4 && stored.bytes[LinkKind::Nvlink] > 0)
}

/// The twin: the same course without the fault.
#[test]
fn a_route_that_works_is_used() -> Result<()> {
    alone("a_route_that_works_is_used", |stub| {
        let (scene, engine) = near_and_far(stub)?;
        for _ in 0..3 {
            ensure!(loads(&engine, &sequence(FAR))? && loads(&engine, &sequence(NEAR))?);
        }
        ensure!(stores_far(&engine, 1_000)?);
        let stats = engine.borrower.stats();
        ensure!(
            (stats.failed_operations, stats.routes_down) == (0, 0),
            "{stats:?}"
        );
        ensure!(status(&scene)? == (0, 0));
        Ok(())
    })
}
