//! What lies below HBM, and what outlives its engine: an engine's restart to its first hit, a lookup through three tiers, blocks
//! that come back from a disk, and host memory that replicas share. Simulated devices: bytes move in shared memory.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::cache::{BorrowerConfig, Medium};
use swiftcache_tests::{
    crew::donor,
    engine::{self, Engine, SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    programs::{Program, program},
};

use crate::report::{Latencies, Line, time};

/// Blocks of a prefix: four slabs of it.
const BLOCKS: u32 = 64;
/// What engines lease of each kind of memory at most, slabs.
const SLABS: u64 = 16;
/// DESIGN section 9: warm within a second of being ready.
const WARM: Duration = Duration::from_secs(1);
const REPLICAS: u64 = 4;

/// All of it.
pub(crate) fn run(rounds: u32) -> Result<Vec<Line>> {
    let mut lines = vec![restart(rounds)?];
    lines.extend(ladder(rounds)?);
    lines.push(replicas()?);
    Ok(lines)
}

fn prefix(number: u32) -> Vec<u32> {
    (0..BLOCKS).map(|n| number * 1000 + n).collect()
}

fn settings(node: &Node, slabs: u64, host_slabs: u64) -> BorrowerConfig {
    let mut config = engine::config(node.device(0), slabs);
    config.max_host_leased_bytes = host_slabs * SLAB_BYTES;
    config
}

fn start(node: &Node, slabs: u64, host_slabs: u64) -> Result<Engine> {
    let config = settings(node, slabs, host_slabs);
    Engine::new(Some(node.session("engine")?), node.layer()?, config)
}

fn store(engine: &Engine, blocks: &[u32]) -> Result<()> {
    eventually("room for a prefix", || {
        Ok(engine.store(blocks)?.unplaced == 0)
    })
}

/// Starts `swiftcache donate` with these arguments, and waits until it lends what it has.
fn donate(node: &Node, arguments: &[&str]) -> Result<Program> {
    let mut command = Command::new(program("swiftcache")?);
    command
        .args(["donate", "--socket"])
        .arg(node.socket())
        .args(arguments);
    Ok(Program::start_ready(&mut command)?.0)
}

fn host_memory(node: &Node, slabs: u64) -> Result<Program> {
    let (bytes, slab) = ((slabs * SLAB_BYTES).to_string(), SLAB_BYTES.to_string());
    let arguments = ["--device", "HOST-0", "--bytes", &bytes, "--slab", &slab];
    let donor = donate(node, &arguments)?;
    Operator::of(node)?.eventually("host memory on offer", |account| {
        account.offered_bytes >= slabs * SLAB_BYTES
    })?;
    Ok(donor)
}

/// From connecting to a lookup that finds all that an engine before has left, beside the first lookup of an engine that finds nothing.
fn restart(rounds: u32) -> Result<Line> {
    let node = Node::start(&[])?;
    let _donor = donor(&node, 1, SLABS)?;
    let first = start(&node, SLABS, 0)?;
    store(&first, &prefix(1))?;
    drop(first);
    let (mut warm, mut cold) = (Latencies::new()?, Latencies::new()?);
    for round in 0..rounds {
        for (number, found, latencies) in [(1, BLOCKS, &mut warm), (2 + round, 0, &mut cold)] {
            let blocks = prefix(number);
            let began = Instant::now();
            let engine = start(&node, SLABS, 0)?;
            eventually("the first answer", || {
                Ok(engine.lookup(&blocks).blocks() >= found)
            })?;
            latencies.add(began.elapsed());
        }
    }
    let (warm, cold) = (warm.at(0.5), cold.at(0.5));
    Ok(Line {
        what: format!(
            "restart to first hit: connecting until {BLOCKS} blocks of the engine before are found, median (host backend)"
        ),
        measured: time(warm),
        baseline: format!("until it is known that nothing is there: {}", time(cold)),
        ratio: Some(warm.as_secs_f64() / cold.as_secs_f64()),
        budget: format!("< {}", time(WARM)),
        kept: Some(warm < WARM),
    })
}

/// A lookup of blocks in HBM, in host memory and on a disk, and the way back from the disk.
fn ladder(rounds: u32) -> Result<Vec<Line>> {
    let dir = tempfile::tempdir()?;
    // What engines leave goes at once: then what is found has been on the disk.
    let node = Node::start(&["--estate-ttl-ms", "0", "--pin-ms", "1000"])?;
    let operator = Operator::of(&node)?;
    let _host = host_memory(&node, SLABS)?;
    let path = dir.path().to_str().context("a directory's name")?;
    let memory = (4 * SLAB_BYTES).to_string();
    let _disk = donate(
        &node,
        &[
            "--device", "DISK-0", "--path", path, "--bytes", "64MiB", "--memory", &memory,
        ],
    )?;
    let third = BLOCKS as usize / 3;
    let (mut plain, mut tiers, mut back) =
        (Latencies::new()?, Latencies::new()?, Latencies::new()?);
    for round in 0..rounds {
        let blocks = prefix(round);
        let on_disk = || -> Result<u64> {
            let disk = operator.node()?.disks.into_iter().next();
            Ok(disk.map_or(0, |disk| disk.blocks))
        };
        let before = on_disk()?;
        let writer = start(&node, 0, SLABS)?;
        store(&writer, &blocks)?;
        eventually("all of it on the disk", || {
            Ok(on_disk()? >= before + u64::from(BLOCKS))
        })?;
        drop(writer);
        eventually("memory without a block", || {
            Ok(operator.node()?.indexed_blocks == 0)
        })?;
        let donor = donor(&node, 1, SLABS)?;
        let upper = start(&node, SLABS, 0)?;
        store(&upper, &blocks[..third])?;
        let lower = start(&node, 0, SLABS)?;
        store(&lower, &blocks[..2 * third])?;
        let others = prefix(round + 500_000);
        store(&upper, &others)?;
        let began = Instant::now();
        ensure!(upper.lookup(&others).blocks() == BLOCKS);
        plain.add(began.elapsed());
        let began = Instant::now();
        let hit = upper.lookup(&blocks);
        tiers.add(began.elapsed());
        ensure!(hit.blocks() as usize >= 2 * third, "{hit:?}");
        for medium in [Medium::Hbm, Medium::Host] {
            ensure!(hit.runs().iter().any(|run| run.medium == medium), "{hit:?}");
        }
        eventually("all of it to come back", || {
            Ok(upper.lookup(&blocks).blocks() == BLOCKS)
        })?;
        back.add(began.elapsed());
        drop((hit, upper, lower, donor));
        eventually("memory without a block", || {
            Ok(operator.node()?.indexed_blocks == 0)
        })?;
    }
    let (plain, tiers, back) = (plain.at(0.5), tiers.at(0.5), back.at(0.5));
    let line = |what: &str, took: Duration| Line {
        what: format!("{what}, median (host backend, this machine's disk)"),
        measured: time(took),
        baseline: format!("lookup of {BLOCKS} own blocks in HBM: {}", time(plain)),
        ratio: Some(took.as_secs_f64() / plain.as_secs_f64()),
        budget: "none".to_owned(),
        kept: None,
    };
    let lies = format!("lookup of {BLOCKS} blocks, a third each in HBM, host memory and on a disk");
    Ok(vec![
        line(&lies, tiers),
        line(&format!("{lies}, until all of them can be loaded"), back),
    ])
}

/// Host memory that replicas of a model take for one prefix.
fn replicas() -> Result<Line> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let _host = host_memory(&node, SLABS)?;
    let blocks = prefix(1);
    let mut engines = Vec::new();
    let mut used = Vec::new();
    for _ in 0..REPLICAS {
        let engine = start(&node, 0, SLABS)?;
        // Each computes it, as if it had found nothing, and stores what nobody has.
        store(&engine, &blocks)?;
        engines.push(engine);
        used.push(operator.node()?.indexed_blocks);
    }
    let (one, all) = (used[0], used[used.len() - 1]);
    Ok(Line {
        what: format!(
            "copies of a prefix in host memory that {REPLICAS} replicas keep (host backend)"
        ),
        measured: format!("{all} blocks"),
        baseline: format!("one engine: {one} blocks"),
        ratio: Some(all as f64 / one as f64),
        budget: "1.00".to_owned(),
        kept: Some(all == one),
    })
}
