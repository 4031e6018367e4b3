//! What lies below HBM, and what outlives its engine: a lookup through three tiers, an engine's restart to its first hit, and copies that
//! replicas keep. Simulated devices: bytes move in shared memory.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use swiftcache_client::cache::Medium;
use swiftcache_tests::{
    crew::{BorrowerProcess, Job, disk_agent, disk_command, donor, host_donor},
    engine::{self, Engine, eventually},
    node::Node,
    operator::Operator,
    programs::program,
};

use crate::report::{Latencies, Line, time};

/// Blocks of a prefix: four slabs of it.
const BLOCKS: u32 = 64;
/// Conversations of an engine before a restart, and blocks of each, as `swiftcache-test-borrower` has them.
const CONVERSATIONS: u32 = 3;
const CONVERSATION: u32 = 20;
/// What engines of this process are called.
const ENGINE: &str = "engine";
/// What engines lease of each kind of memory at most, slabs.
const SLABS: u64 = 16;
/// DESIGN section 9: warm within a second of being ready.
const WARM: Duration = Duration::from_secs(1);
const REPLICAS: u64 = 4;
/// Blocks in each of three tiers: a slab of it.
const THIRD: u32 = 16;
/// Room on the disk for all rounds, bytes.
const DISK: u64 = 64 << 20;

/// All of it.
pub(crate) fn run(rounds: u32) -> Result<Vec<Line>> {
    let mut lines = lookup(rounds)?;
    lines.extend([restart(rounds)?, replicas()?]);
    Ok(lines)
}

/// The first blocks of a conversation.
fn prefix(number: u32, blocks: u32) -> Vec<u32> {
    (0..blocks).map(|n| number * 1000 + n).collect()
}

fn start(node: &Node, slabs: u64, host_slabs: u64) -> Result<Engine> {
    let config = engine::config_with_host(node.device(0), slabs, host_slabs);
    Engine::new(Some(node.session(ENGINE)?), node.layer()?, config)
}

fn store(engine: &Engine, blocks: &[u32]) -> Result<()> {
    eventually("room for a prefix", || {
        Ok(engine.store(blocks)?.unplaced == 0)
    })
}

/// Waits until no engine of this process holds anything.
fn engines_gone(operator: &Operator) -> Result<()> {
    eventually("the engines' leases to be over", || {
        let leases = operator.leases()?;
        Ok(leases.iter().all(|lease| lease.borrower_name != ENGINE))
    })
}

/// A lookup of blocks of which a third each lies in HBM, in host memory and on a disk, and how long the disk's take to come back.
fn lookup(rounds: u32) -> Result<Vec<Line>> {
    let dir = tempfile::tempdir()?;
    // What engines leave goes at once.
    let node = Node::start(&["--estate-ttl-ms", "0", "--pin-ms", "100"])?;
    let operator = Operator::of(&node)?;
    let _host = host_donor(&node, SLABS, &[])?;
    let _disk = disk_agent(&node, disk_command(&node, dir.path(), DISK)?)?;
    let (mut own, mut tiers, mut back) = (Latencies::new()?, Latencies::new()?, Latencies::new()?);
    for round in 0..rounds {
        let blocks = prefix(1 + round, 3 * THIRD);
        let [in_hbm, in_host] = [1, 2].map(|n| n * THIRD as usize);
        let before = operator.disk()?.map_or(0, |disk| disk.blocks);
        let writer = start(&node, 0, SLABS)?;
        store(&writer, &blocks)?;
        operator.on_disk(before + blocks.len() as u64)?;
        drop(writer);
        // What came back from the disk stays in its agent's memory.
        engines_gone(&operator)?;
        let donor = donor(&node, 1, SLABS)?;
        let lower = start(&node, 0, SLABS)?;
        store(&lower, &blocks[in_hbm..in_host])?;
        let upper = start(&node, SLABS, 0)?;
        // Room for all: what finds none would have others' blocks go.
        upper.reserve(4)?;
        store(&upper, &blocks[..in_hbm])?;
        let others = prefix(500 + round, 3 * THIRD);
        store(&upper, &others)?;
        eventually("the host memory's third to be published", || {
            Ok(upper.lookup(&blocks[..in_host]).blocks() as usize == in_host)
        })?;
        let began = Instant::now();
        ensure!(upper.lookup(&others).blocks() == 3 * THIRD);
        own.add(began.elapsed());
        let began = Instant::now();
        let hit = upper.lookup(&blocks);
        tiers.add(began.elapsed());
        let found = hit.runs().iter().map(|run| (run.medium, run.blocks));
        ensure!(
            found.eq([(Medium::Hbm, THIRD), (Medium::Host, THIRD)]),
            "{hit:?}"
        );
        drop(hit);
        eventually("all of it to come back", || {
            Ok(upper.lookup(&blocks).blocks() == 3 * THIRD)
        })?;
        back.add(began.elapsed());
        drop((upper, lower, donor));
        engines_gone(&operator)?;
    }
    let (own, tiers, back) = (own.at(0.5), tiers.at(0.5), back.at(0.5));
    let line = |what: &str, took: Duration| Line {
        what: format!(
            "lookup of {} blocks, a third each in HBM, host memory and on a disk{what}, median (host backend)",
            3 * THIRD
        ),
        measured: time(took),
        baseline: format!("all of them own, in HBM: {}", time(own)),
        ratio: Some(took.as_secs_f64() / own.as_secs_f64()),
        budget: String::new(),
        kept: None,
    };
    Ok(vec![
        line("", tiers),
        line(", until all of them can be loaded", back),
    ])
}

/// From connecting to a lookup that finds all that an engine before has left, beside the first lookup of an engine that finds nothing.
/// The engine before is a process that is killed.
fn restart(rounds: u32) -> Result<Line> {
    // A test's node keeps nothing for heirs unless it is told to.
    let node = Node::start(&["--estate-ttl-ms", "600000"])?;
    let operator = Operator::of(&node)?;
    let _donor = donor(&node, 1, SLABS)?;
    let job = Job {
        slabs: SLABS,
        host_blocks: 0,
        conversations: CONVERSATIONS,
        ..Job::new("before", 1)
    };
    let left: Vec<u32> = (0..CONVERSATIONS)
        .flat_map(|number| prefix(number, CONVERSATION))
        .collect();
    let (mut warm, mut cold) = (Latencies::new()?, Latencies::new()?);
    for _ in 0..rounds {
        for (found, latencies) in [(0, &mut cold), (left.len() as u32, &mut warm)] {
            if found > 0 {
                let mut before = BorrowerProcess::start(&node, 0, &job)?;
                before.run(&format!("reserve {SLABS}"))?;
                before.run("sweep-store")?;
                before.kill()?;
                operator.eventually("an estate", |account| account.estate_bytes > 0)?;
            }
            let began = Instant::now();
            let engine = start(&node, SLABS, 0)?;
            eventually("the first answer", || {
                Ok(engine.lookup(&left).blocks() >= found)
            })?;
            latencies.add(began.elapsed());
            drop(engine);
            engines_gone(&operator)?;
            let mut forget = Command::new(program("swiftcache")?);
            forget
                .args(["forget", "--yes", "--socket"])
                .arg(node.socket());
            ensure!(forget.output()?.status.success(), "nothing was forgotten");
            operator.eventually("memory without a block", |account| {
                account.leased_bytes + account.estate_bytes == 0
            })?;
        }
    }
    let (warm, cold) = (warm.at(0.5), cold.at(0.5));
    Ok(Line {
        what: format!(
            "restart to first hit: connecting until {} blocks of the engine before are found, median (host backend)",
            left.len()
        ),
        measured: time(warm),
        baseline: format!("until it is known that nothing is there: {}", time(cold)),
        ratio: Some(warm.as_secs_f64() / cold.as_secs_f64()),
        budget: format!("< {}", time(WARM)),
        kept: Some(warm < WARM),
    })
}

/// Copies of one prefix in host memory, which replicas of a model compute and store one after the other.
fn replicas() -> Result<Line> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let _host = host_donor(&node, SLABS, &[])?;
    let blocks = prefix(1, BLOCKS);
    let mut engines = Vec::new();
    let mut kept = Vec::new();
    for _ in 0..REPLICAS {
        let engine = start(&node, 0, SLABS)?;
        // As an engine does: what it finds it does not store.
        let found = engine.lookup(&blocks).blocks() as usize;
        store(&engine, &blocks[found..])?;
        eventually("the prefix to be published", || {
            Ok(operator.node()?.indexed_blocks >= u64::from(BLOCKS))
        })?;
        engines.push(engine);
        kept.push(operator.node()?.indexed_blocks);
    }
    let (one, all) = (kept[0], kept[kept.len() - 1]);
    Ok(Line {
        what: format!(
            "blocks of a prefix that {REPLICAS} replicas keep in host memory (host backend)"
        ),
        measured: all.to_string(),
        baseline: format!("one engine alone: {one}"),
        ratio: Some(all as f64 / one as f64),
        budget: "1.00".to_owned(),
        kept: Some(all == one),
    })
}
