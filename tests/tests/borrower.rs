//! Borrowers with a real broker over real sockets. Whatever happens, no wrong byte is served.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use swiftcache_client::cache::{Borrower, BorrowerConfig, Hold, Medium};
use swiftcache_proto::domain::LinkKind;
use swiftcache_tests::{
    PATIENCE,
    crew::{donor, donor_process},
    engine::{self, BLOCK_BYTES, Engine, Fetched, POOL, SLAB_BYTES, eventually},
    node::Node,
};

/// Slots of a slab.
const SLOTS: u32 = 16;

fn sequence(conversation: u32, blocks: u32) -> Vec<u32> {
    (0..blocks).map(|n| conversation * 1_000 + n).collect()
}

fn borrower(node: &Node, name: &str, slabs: u64, host_blocks: u64) -> Result<Engine> {
    let mut config = engine::config(node.device(0), slabs);
    config.host_tier_bytes = host_blocks * BLOCK_BYTES;
    Engine::new(Some(node.session(name)?), node.layer()?, config)
}

fn all(blocks: u32) -> Fetched {
    Fetched {
        found: blocks,
        served: blocks,
    }
}

#[test]
fn blocks_come_back_from_a_donor_byte_for_byte() -> Result<()> {
    let node = Node::start(&[])?;
    let _donor = donor(&node, 1, 2)?;
    let engine = borrower(&node, "engine", 2, 0)?;
    engine.reserve(2)?;
    let conversation = sequence(1, 20);
    ensure!(engine.fetch(&conversation)? == all(0));
    let stored = engine.store(&conversation)?;
    ensure!(stored.stored == 20, "{stored:?}");
    ensure!(stored.bytes[LinkKind::Nvlink] == 20 * BLOCK_BYTES);
    let hit = engine.lookup(&conversation);
    ensure!(hit.runs().len() == 1 && hit.runs()[0].medium == Medium::Hbm);
    ensure!(hit.runs()[0].link == LinkKind::Nvlink);
    ensure!(engine.fetch(&conversation)? == all(20));
    Ok(())
}

#[test]
fn a_byte_changed_on_the_way_is_caught() -> Result<()> {
    let node = Node::start(&[])?;
    let _donor = donor(&node, 1, 1)?;
    let engine = borrower(&node, "engine", 1, 0)?;
    engine.reserve(1)?;
    let conversation = sequence(1, 4);
    for (n, block) in conversation.iter().zip(0..) {
        engine.compute(*n, block)?;
    }
    engine.corrupt(2, 3)?;
    ensure!(engine.store_computed(&conversation).stored == 4);
    let error = engine.fetch(&conversation).err().context("not caught")?;
    ensure!(error.to_string().contains("block 1003, layer 2"), "{error}");
    Ok(())
}

#[test]
fn the_best_link_is_leased_first() -> Result<()> {
    let node = Node::start(&[])?;
    let _far = donor(&node, 2, 1)?;
    let _near = donor(&node, 1, 1)?;
    let engine = borrower(&node, "engine", 1, 0)?;
    engine.reserve(1)?;
    engine.store(&sequence(1, 4))?;
    let hit = engine.lookup(&sequence(1, 4));
    ensure!(hit.runs()[0].link == LinkKind::Nvlink, "{:?}", hit.runs());
    Ok(())
}

#[test]
fn without_room_at_donors_blocks_go_to_the_host_tier() -> Result<()> {
    let node = Node::start(&[])?;
    let engine = borrower(&node, "engine", 4, 8)?;
    let stored = engine.store(&sequence(1, 6))?;
    ensure!(stored.stored == 6, "{stored:?}");
    ensure!(engine.lookup(&sequence(1, 6)).runs()[0].medium == Medium::Host);
    ensure!(engine.fetch(&sequence(1, 6))? == all(6));
    Ok(())
}

#[test]
fn under_pressure_the_coldest_go_to_the_host_tier_and_then_away() -> Result<()> {
    let node = Node::start(&["--pin-ms", "50"])?;
    let _donor = donor(&node, 1, 2)?;
    let engine = borrower(&node, "engine", 2, 8)?;
    engine.reserve(2)?;
    for conversation in 0..12 {
        let blocks = sequence(conversation, 8);
        let stored = engine.store(&blocks)?;
        ensure!(stored.unplaced == 0, "{stored:?}");
        ensure!(engine.fetch(&blocks)? == all(8));
    }
    let mut found = Vec::new();
    for conversation in 0..12 {
        found.push(engine.fetch(&sequence(conversation, 8))?.served);
    }
    let stats = engine.borrower.stats();
    ensure!(found[11] == 8, "{found:?}");
    ensure!(found.iter().sum::<u32>() <= 2 * SLOTS + 8, "{found:?}");
    ensure!(
        stats.demoted_blocks > 0 && stats.evicted_blocks > 0,
        "{stats:?}"
    );
    ensure!(stats.failed_blocks == 0, "{stats:?}");
    Ok(())
}

#[test]
fn replicas_read_each_others_blocks() -> Result<()> {
    let node = Node::start(&[])?;
    let _donor = donor(&node, 1, 4)?;
    let writer = borrower(&node, "writer", 2, 0)?;
    let reader = borrower(&node, "reader", 2, 0)?;
    writer.reserve(2)?;
    let conversation = sequence(1, 20);
    writer.store(&conversation)?;
    ensure!(reader.fetch(&conversation)? == all(20));
    ensure!(reader.lookup(&conversation).runs()[0].hold == Hold::Shared);
    // The reader's own blocks are the prefix, and the writer's blocks are the rest.
    reader.reserve(2)?;
    let mine = sequence(2, 6);
    reader.store(&mine)?;
    let both: Vec<u32> = mine.iter().chain(&sequence(3, 6)).copied().collect();
    writer.store(&both)?;
    ensure!(reader.fetch(&both)? == all(12));
    let stats = reader.borrower.stats();
    ensure!(
        stats.shared_leases >= 1 && stats.shared_leases <= 2,
        "{stats:?}"
    );
    ensure!(stats.hits.donor == 6, "{stats:?}");
    // The writer did not keep the blocks that the reader had published first.
    ensure!(writer.borrower.stats().duplicate_blocks == 6);
    Ok(())
}

#[test]
fn a_read_that_outlasts_its_pin_is_a_miss() -> Result<()> {
    let node = Node::start(&["--pin-ms", "1"])?;
    let _donor = donor(&node, 1, 2)?;
    let writer = borrower(&node, "writer", 1, 0)?;
    let reader = borrower(&node, "reader", 1, 0)?;
    writer.reserve(1)?;
    let conversation = sequence(1, 8);
    writer.store(&conversation)?;
    // The first lookup also maps the slab, so that the second one is quick.
    drop(reader.lookup(&conversation));
    let hit = reader.lookup(&conversation);
    ensure!(hit.blocks() == 8);
    // This sleep synchronises with nothing: it makes the pin expire.
    std::thread::sleep(Duration::from_millis(5));
    let fetched = reader.load(&hit, &conversation)?;
    ensure!(
        fetched
            == Fetched {
                found: 8,
                served: 0
            },
        "{fetched:?}"
    );
    // The lessee itself needs no pin.
    let hit = writer.lookup(&conversation);
    std::thread::sleep(Duration::from_millis(5));
    ensure!(writer.load(&hit, &conversation)? == all(8));
    Ok(())
}

#[test]
fn hot_blocks_survive_a_revocation_and_the_donor_gets_its_bytes() -> Result<()> {
    let node = Node::start(&[])?;
    let first = donor(&node, 1, 1)?;
    let engine = borrower(&node, "engine", 3, 4)?;
    engine.reserve(1)?;
    engine.store(&sequence(1, 12))?;
    engine.store(&sequence(2, 4))?;
    let _second = donor(&node, 2, 1)?;
    engine.reserve(2)?;
    // Eight of the second donor's sixteen slots are used. So half of the sixteen blocks can move there, and four more
    // to the host tier.
    engine.store(&sequence(3, 8))?;
    ensure!(first.close(PATIENCE), "the slab did not come back");
    let stats = engine.borrower.stats();
    ensure!(stats.leases == 1 && stats.revocations == 1, "{stats:?}");
    ensure!(
        (stats.moved_to_donor, stats.moved_to_host) == (8, 4),
        "{stats:?}"
    );
    ensure!(
        stats.dropped_blocks == 4 && stats.acknowledge.count == 1,
        "{stats:?}"
    );
    // The most recently used conversation survived as a whole, and the beginning of the other one.
    ensure!(engine.fetch(&sequence(2, 4))? == all(4));
    ensure!(engine.fetch(&sequence(1, 12))? == all(8));
    // The moved blocks are published at their new place: a replica finds those at the second donor.
    let reader = borrower(&node, "reader", 0, 0)?;
    ensure!(reader.fetch(&sequence(2, 4))? == all(4));
    Ok(())
}

#[test]
fn revocations_under_load_serve_no_wrong_byte() -> Result<()> {
    let node = Node::start(&["--pin-ms", "100"])?;
    let donors = [donor(&node, 1, 4)?, donor(&node, 2, 4)?];
    let engines = [
        borrower(&node, "one", 4, 16)?,
        borrower(&node, "two", 4, 16)?,
    ];
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        // Two threads on each borrower.
        let busy: Vec<_> = (engines.iter().chain(&engines).zip([0, 3, 5, 6]))
            .map(|(engine, start)| {
                let engine = Engine::over(Arc::clone(&engine.borrower), node.layer()?.as_ref());
                let over = &over;
                Ok(scope.spawn(move || -> Result<u64> {
                    let engine = engine?;
                    let mut served = 0;
                    for round in start.. {
                        if over.load(Ordering::Relaxed) {
                            break;
                        }
                        let blocks = sequence(round % 7, 3 + round % 11);
                        engine.store(&blocks)?;
                        served += u64::from(engine.fetch(&blocks)?.served);
                    }
                    Ok(served)
                }))
            })
            .collect::<Result<_>>()?;
        for round in 0..20 {
            // Everything is leased, so that the next demand must take slabs away from a borrower.
            for engine in &engines {
                engine.reserve(4)?;
            }
            let donor = &donors[round % 2];
            donor.shrink(2 * SLAB_BYTES)?;
            ensure!(donor.wait_returned(PATIENCE), "not given back");
            donor.grow(2 * SLAB_BYTES)?;
        }
        over.store(true, Ordering::Relaxed);
        for engine in busy {
            let served = engine.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(served > 0);
        }
        Ok(())
    })?;
    let revocations: u64 = (engines.iter())
        .map(|engine| engine.borrower.stats().revocations)
        .sum();
    ensure!(revocations >= 40, "{revocations}");
    Ok(())
}

#[test]
fn the_broker_is_never_on_the_data_path() -> Result<()> {
    let mut node = Node::start(&[])?;
    let _donor = donor(&node, 1, 2)?;
    let engine = borrower(&node, "engine", 2, 0)?;
    engine.reserve(2)?;
    engine.store(&sequence(1, 8))?;
    node.kill_broker()?;
    ensure!(engine.fetch(&sequence(1, 8))? == all(8));
    ensure!(engine.store(&sequence(2, 8))?.stored == 8);
    ensure!(engine.fetch(&sequence(2, 8))? == all(8));
    ensure!(engine.fetch(&sequence(3, 8))? == all(0));
    node.start_broker()?;
    // Everything is published again, also the blocks that were stored meanwhile.
    let reader = borrower(&node, "reader", 0, 0)?;
    for conversation in [1, 2] {
        eventually("blocks published again", || {
            Ok(reader.fetch(&sequence(conversation, 8))? == all(8))
        })?;
    }
    let stats = engine.borrower.stats();
    ensure!(stats.leases == 2 && stats.refused_leases == 0, "{stats:?}");
    Ok(())
}

#[test]
fn a_lost_ledger_costs_the_leases_and_nothing_else() -> Result<()> {
    let mut node = Node::start(&[])?;
    let donor = donor(&node, 1, 2)?;
    let engine = borrower(&node, "engine", 2, 0)?;
    engine.reserve(2)?;
    engine.store(&sequence(1, 8))?;
    node.kill_broker()?;
    node.lose_ledger()?;
    node.start_broker()?;
    eventually("the old leases to be dropped", || {
        Ok(engine.borrower.stats().refused_leases == 2)
    })?;
    ensure!(engine.fetch(&sequence(1, 8))? == all(0));
    // The donor offers new memory, and everything works again.
    engine.reserve(2)?;
    engine.store(&sequence(1, 8))?;
    ensure!(engine.fetch(&sequence(1, 8))? == all(8));
    ensure!(donor.status().offered_bytes == 2 * SLAB_BYTES);
    Ok(())
}

#[test]
fn a_stopped_broker_is_a_miss_and_no_hang() -> Result<()> {
    let node = Node::start(&[])?;
    let _donor = donor(&node, 1, 1)?;
    let mut config = engine::config(node.device(0), 1);
    config.lookup_limit = BorrowerConfig::LOOKUP_LIMIT;
    let engine = Engine::new(Some(node.session("engine")?), node.layer()?, config)?;
    engine.reserve(1)?;
    engine.store(&sequence(1, 8))?;
    node.broker()?.signal(Signal::STOP)?;
    ensure!(engine.fetch(&sequence(1, 8))? == all(8));
    ensure!(engine.fetch(&sequence(9, 8))? == all(0));
    ensure!(engine.borrower.stats().broker_misses >= 1);
    node.broker()?.signal(Signal::CONT)?;
    Ok(())
}

#[test]
fn a_donor_that_dies_takes_no_byte_with_it() -> Result<()> {
    let node = Node::start(&[])?;
    let mut doomed = donor_process(&node, 1, 1)?;
    let engine = borrower(&node, "engine", 2, 16)?;
    engine.reserve(1)?;
    let blocks = sequence(1, 12);
    engine.store(&blocks)?;
    let hit = engine.lookup(&blocks);
    doomed.kill()?;
    eventually("the revocation", || {
        Ok(engine.borrower.stats().acknowledge.count == 1)
    })?;
    // The blocks were moved to the host tier, and the hit finds them there.
    ensure!(engine.load(&hit, &blocks)? == all(12));
    ensure!(engine.fetch(&blocks)? == all(12));
    ensure!(engine.borrower.stats().leases == 0);
    Ok(())
}

#[test]
fn closing_gives_leases_back() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = donor(&node, 1, 2)?;
    let engine = borrower(&node, "engine", 2, 0)?;
    engine.reserve(2)?;
    engine.store(&sequence(1, 8))?;
    drop(engine);
    // No borrower is left that could hold the slabs.
    ensure!(donor.close(PATIENCE));
    Ok(())
}

#[test]
fn settings_that_cannot_work_are_named() -> Result<()> {
    let node = Node::start(&[])?;
    let refusal = |change: &dyn Fn(&mut swiftcache_client::cache::BorrowerConfig)| {
        let mut config = engine::config(node.device(0), 1);
        change(&mut config);
        let opened = Borrower::open(None, node.layer()?, config);
        Ok::<_, anyhow::Error>(opened.err().context("was accepted")?.to_string())
    };
    let text = refusal(&|config| config.layout.layer_bytes.clear())?;
    ensure!(text.contains("layout.layer_bytes"), "{text}");
    let text = refusal(&|config| config.layout.namespace.clear())?;
    ensure!(text.contains("layout.namespace"), "{text}");
    let text = refusal(&|config| config.lease_step_bytes = 0)?;
    ensure!(text.contains("lease_step_bytes"), "{text}");
    let text = refusal(&|config| {
        if let Ok(uuid) = "SIM-9".parse() {
            config.device = uuid;
        }
    })?;
    ensure!(text.contains("SIM-9"), "{text}");
    ensure!(POOL > 2 * SLOTS);
    Ok(())
}
