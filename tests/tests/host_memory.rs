//! Host memory as a donor: engines lease it where HBM falls short, share it, and get every byte back.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use swiftcache_client::cache::{Hold, Medium};
use swiftcache_proto::domain::{DeviceUuid, LinkKind};
use swiftcache_tests::{
    PATIENCE,
    crew::{donor, host_donor},
    engine::{self, BLOCK_BYTES, Engine, Fetched, SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    programs::{Program, program},
    scene::{Scene, begin_load, begin_store, compute, holds, scattered},
    stub::{Held, Stub, alone},
};

/// Slots of a slab.
const SLOTS: u32 = 16;

fn host() -> DeviceUuid {
    DeviceUuid::of_host(0)
}

fn sequence(conversation: u32, blocks: u32) -> Vec<u32> {
    (0..blocks).map(|n| conversation * 1_000 + n).collect()
}

fn all(blocks: u32) -> Fetched {
    Fetched {
        found: blocks,
        served: blocks,
    }
}

/// `swiftcache donate` with host memory.
fn donate(node: &Node, slabs: u64) -> Result<Program> {
    let drain = format!("{}s", PATIENCE.as_secs());
    host_donor(node, slabs, &["--drain", &drain])
}

fn borrower(node: &Node, name: &str, slabs: u64, host_slabs: u64) -> Result<Engine> {
    let config = engine::config_with_host(node.device(0), slabs, host_slabs);
    Engine::new(Some(node.session(name)?), node.layer()?, config)
}

/// Waits until the engine has leased so many slabs of host memory.
fn leased_in_host(engine: &Engine, slabs: u64) -> Result<()> {
    eventually("leased host memory", || {
        Ok(engine.borrower.stats().host_leased_bytes == slabs * SLAB_BYTES)
    })
}

#[test]
fn without_hbm_blocks_lie_in_host_memory_and_come_back_byte_for_byte() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let names = |operator: &Operator| -> Result<Vec<String>> {
        let devices = operator.node()?.devices.into_iter();
        Ok(devices.filter_map(|its| Some(its.device?.uuid)).collect())
    };
    ensure!(!names(&operator)?.contains(&"HOST-0".to_owned()));
    let _donor = donate(&node, 4)?;
    ensure!(names(&operator)?.contains(&"HOST-0".to_owned()));
    let engine = borrower(&node, "engine", 2, 2)?;
    leased_in_host(&engine, 1)?;
    let conversation = sequence(1, 20);
    eventually("room for all of it", || {
        Ok(engine.store(&conversation)?.unplaced == 0)
    })?;
    let hit = engine.lookup(&conversation);
    for run in hit.runs() {
        let at = (run.medium, run.link, run.hold);
        ensure!(at == (Medium::Host, LinkKind::Host, Hold::Own), "{at:?}");
    }
    ensure!(engine.fetch(&conversation)? == all(20));
    let stats = engine.borrower.stats();
    ensure!(
        stats.host_blocks == 20 && stats.leased_bytes == 0,
        "{stats:?}"
    );
    let shown = node.status(&[])?;
    ensure!(shown.contains("HOST-0"), "{shown}");
    // The twin asks for no host memory, and has none.
    let twin = borrower(&node, "twin", 2, 0)?;
    let stored = twin.store(&sequence(2, 20))?;
    ensure!(stored.unplaced == 20, "{stored:?}");
    ensure!(twin.borrower.stats().host_leased_bytes == 0);
    Ok(())
}

#[test]
fn hbm_comes_before_host_memory_and_blocks_move_up_when_there_is_some() -> Result<()> {
    let node = Node::start(&["--pin-ms", "50"])?;
    let _hbm = donor(&node, 1, 1)?;
    let _host = donate(&node, 4)?;
    let engine = borrower(&node, "engine", 4, 4)?;
    engine.reserve(1)?;
    let first = sequence(1, 8);
    ensure!(engine.store(&first)?.stored == 8);
    let hit = engine.lookup(&first);
    ensure!(
        hit.runs().iter().all(|run| run.medium == Medium::Hbm),
        "{hit:?}"
    );
    // More than HBM has slots for. What makes room is lost unless there is host memory for it.
    leased_in_host(&engine, 1)?;
    for conversation in 2..5 {
        let blocks = sequence(conversation, 8);
        eventually("room", || Ok(engine.store(&blocks)?.unplaced == 0))?;
        ensure!(engine.fetch(&blocks)? == all(8));
        if conversation == 3 {
            leased_in_host(&engine, 2)?;
        }
    }
    ensure!(engine.borrower.stats().evicted_blocks == 0);
    ensure!(engine.fetch(&first)? == all(8));
    let in_host = engine.borrower.stats().host_blocks;
    ensure!(in_host > 0, "{:?}", engine.borrower.stats());
    // HBM that comes later is leased, and what lies in host memory goes there.
    let _more = donor(&node, 2, 3)?;
    eventually("blocks to move up", || {
        Ok(engine.borrower.stats().host_blocks == 0)
    })?;
    for conversation in 1..5 {
        let fetched = engine.fetch(&sequence(conversation, 8))?;
        ensure!(
            fetched == all(8),
            "{fetched:?}: {:?}",
            engine.borrower.stats()
        );
        let hit = engine.lookup(&sequence(conversation, 8));
        ensure!(
            hit.runs().iter().all(|run| run.medium == Medium::Hbm),
            "{hit:?}"
        );
    }
    ensure!(engine.borrower.stats().failed_blocks == 0);
    Ok(())
}

#[test]
fn blocks_that_leave_host_memory_make_room_and_never_come_back_wrong() -> Result<()> {
    let node = Node::start(&["--pin-ms", "50"])?;
    let _hbm = donor(&node, 1, 1)?;
    let _host = donate(&node, 2)?;
    let engine = borrower(&node, "engine", 1, 2)?;
    let reader = borrower(&node, "reader", 0, 0)?;
    engine.reserve(1)?;
    for conversation in 1..16 {
        let blocks = sequence(conversation, 8);
        eventually("room", || Ok(engine.store(&blocks)?.unplaced == 0))?;
        ensure!(engine.fetch(&blocks)? == all(8));
        if conversation == 1 {
            leased_in_host(&engine, 1)?;
        }
        // Another engine's reads hold slots up, which must not be written meanwhile.
        let read = reader.fetch(&sequence(conversation.max(3) - 2, 8))?;
        ensure!(read.served == read.found, "{read:?}");
    }
    let stats = engine.borrower.stats();
    ensure!(
        stats.demoted_blocks > 0 && stats.evicted_blocks > 0,
        "{stats:?}"
    );
    ensure!(stats.failed_blocks == 0, "{stats:?}");
    Ok(())
}

#[test]
fn two_engines_of_one_model_use_one_copy() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 4)?;
    let writer = borrower(&node, "writer", 2, 2)?;
    let reader = borrower(&node, "reader", 2, 2)?;
    let conversation = sequence(1, 12);
    for engine in [&writer, &reader] {
        leased_in_host(engine, 1)?;
    }
    ensure!(writer.store(&conversation)?.stored == 12);
    let hit = reader.lookup(&conversation);
    ensure!(hit.blocks() == 12, "{hit:?}");
    for run in hit.runs() {
        ensure!(
            (run.medium, run.hold) == (Medium::Host, Hold::Shared),
            "{run:?}"
        );
    }
    ensure!(reader.load(&hit, &conversation)? == all(12));
    drop(hit);
    // What the other one has is not kept twice.
    let stored = reader.store(&conversation)?;
    ensure!((stored.stored, stored.lost) == (0, 12), "{stored:?}");
    ensure!(reader.borrower.stats().host_blocks == 0);
    ensure!(operator.node()?.indexed_blocks == 12);
    // The twin: another model's blocks are its own.
    let mut config = engine::config_with_host(node.device(0), 2, 2);
    config.layout.namespace = "another model".to_owned();
    let other = Engine::new(Some(node.session("other")?), node.layer()?, config)?;
    leased_in_host(&other, 1)?;
    ensure!(other.fetch(&conversation)? == all(0));
    ensure!(other.store(&conversation)?.stored == 12);
    ensure!(operator.node()?.indexed_blocks == 24);
    Ok(())
}

#[test]
fn a_numa_node_that_is_not_there_is_refused_by_the_names_of_those_that_are() -> Result<()> {
    let node = Node::start(&[])?;
    let refused = |args: &[&str]| -> Result<String> {
        let output = Command::new(program("swiftcache")?)
            .arg("donate")
            .args(args)
            .arg("--socket")
            .arg(node.socket())
            .output()?;
        ensure!(output.status.code() == Some(2), "{output:?}");
        Ok(String::from_utf8(output.stderr)?)
    };
    let said = refused(&["--device", "HOST-4000", "--bytes", "1MiB", "--slab", "1MiB"])?;
    ensure!(
        said.contains("no HOST-4000") && said.contains("HOST-0"),
        "{said}"
    );
    let said = refused(&["--device", "HOST-0", "--elastic"])?;
    ensure!(
        said.contains("--elastic") && said.contains("--bytes"),
        "{said}"
    );
    let said = refused(&["--device", "HOST-0", "--bytes", "1000TiB"])?;
    ensure!(said.contains("less than"), "{said}");
    Ok(())
}

/// An engine on the stub driver that has leased host memory only.
fn on_cuda(scene: &Scene<'_>) -> Result<Engine> {
    let config = engine::config_with_host(scene.node.device(0), 0, 2);
    let engine = Engine::new(
        Some(scene.session("engine")?),
        std::sync::Arc::clone(&scene.layer),
        config,
    )?;
    Ok(engine)
}

#[test]
fn an_engine_on_cuda_registers_host_memory_and_a_donor_that_leaves_in_mid_load_costs_hits_only()
-> Result<()> {
    alone(
        "an_engine_on_cuda_registers_host_memory_and_a_donor_that_leaves_in_mid_load_costs_hits_only",
        |stub: &Stub| {
            let mut scene = Scene::new(stub, 1)?;
            // One slab: what is let go of is the one that is read.
            let donor = scene.donate_on(&host(), 1)?;
            let engine = on_cuda(&scene)?;
            leased_in_host(&engine, 1)?;
            let conversation: Vec<u32> = (0..12).collect();
            compute(&engine, &conversation)?;
            let stored = begin_store(&engine, &conversation).finish();
            ensure!(stored.stored == 12, "{stored:?}");
            for n in &conversation {
                engine.compute(u32::MAX, scattered(*n))?;
            }
            let hold = scene.hold(Held::All)?;
            let load = begin_load(&engine, &conversation)?;
            scene.donor(donor).signal(Signal::TERM)?;
            eventually("the revocation", || {
                Ok(engine.borrower.stats().revocations > 0)
            })?;
            ensure!(
                engine.borrower.stats().acknowledge.count == 0,
                "let go of under a copy"
            );
            hold.release()?;
            let loaded = load.finish();
            for (n, index) in conversation.iter().zip(0..) {
                let failed = loaded.failed.contains(&index);
                ensure!(
                    failed || holds(&engine, *n, scattered(*n))?,
                    "wrong bytes: {n}"
                );
            }
            ensure!(loaded.failed.is_empty(), "{loaded:?}");
            eventually("the donor to end", || scene.donor(donor).has_ended())?;
            eventually("nothing to be leased", || {
                Ok(engine.borrower.stats().host_leased_bytes == 0)
            })?;
            ensure!(engine.lookup(&conversation).blocks() == 0);
            Ok(())
        },
    )
}

#[test]
fn host_memory_that_the_driver_does_not_register_is_not_used_and_its_donor_hears_of_it()
-> Result<()> {
    alone(
        "host_memory_that_the_driver_does_not_register_is_not_used_and_its_donor_hears_of_it",
        |stub: &Stub| {
            let mut scene = Scene::new(stub, 1)?;
            scene.donate_on(&host(), 2)?;
            let fault = scene.fault("cuMemHostRegister_v2=2")?;
            let engine = on_cuda(&scene)?;
            let known = |scene: &Scene<'_>| -> Result<u32> {
                let mut devices = scene.operator.node()?.devices.into_iter();
                let named = |its: &swiftcache_proto::v1::DeviceStatus| {
                    its.device
                        .as_ref()
                        .is_some_and(|device| device.uuid == "HOST-0")
                };
                Ok(devices.find(named).context("no HOST-0")?.unmappable_regions)
            };
            eventually(
                "both regions to be known for it",
                || Ok(known(&scene)? == 2),
            )?;
            ensure!(engine.store(&[1, 2, 3])?.unplaced == 3);
            ensure!(engine.borrower.stats().host_leased_bytes == 0);
            scene.stub.lift(&fault)?;
            // The twin: another session, and a driver that registers.
            let twin = on_cuda(&scene)?;
            leased_in_host(&twin, 1)?;
            ensure!(twin.store(&[1, 2, 3])?.stored == 3);
            ensure!(twin.fetch(&[1, 2, 3])? == all(3));
            // What the first one cannot map is no hit for it.
            ensure!(engine.fetch(&[1, 2, 3])? == all(0));
            Ok(())
        },
    )
}

#[test]
fn what_is_registered_is_unregistered_when_it_is_given_back() -> Result<()> {
    alone(
        "what_is_registered_is_unregistered_when_it_is_given_back",
        |stub: &Stub| {
            let mut scene = Scene::new(stub, 1)?;
            scene.donate_on(&host(), 1)?;
            stub.trace(&["cuMemHostRegister_v2", "cuMemHostUnregister"])?;
            let engine = on_cuda(&scene)?;
            leased_in_host(&engine, 1)?;
            let counted = |symbol: &str| -> Result<usize> {
                let calls = stub.calls()?;
                let its = calls
                    .iter()
                    .filter(|call| call.is(std::process::id(), symbol));
                Ok(its.count())
            };
            ensure!(counted("cuMemHostRegister_v2")? == 1 && counted("cuMemHostUnregister")? == 0);
            drop(engine);
            ensure!(counted("cuMemHostUnregister")? == 1);
            Ok(())
        },
    )
}

#[test]
fn the_sizes_of_these_tests_are_what_they_say() {
    assert_eq!(u64::from(SLOTS) * BLOCK_BYTES, SLAB_BYTES);
}
