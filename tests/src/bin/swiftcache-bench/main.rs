//! `swiftcache-bench` measures DESIGN's budgets that need no GPU. Each figure is compared, as a ratio, with a baseline
//! measured in the same run.

mod broker;
mod control;
mod copies;
mod disk;
mod floods;
mod index;
mod machine;
mod ownership;
mod pipeline;
mod report;
mod slowdown;
mod tiers;

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use clap::Parser;
use swiftcache_tests::{
    node::{Node, Setup},
    programs::program,
};

use crate::report::{Latencies, Line};

/// HBM of each simulated device, bytes. It has room for every offered region, and nothing touches it.
const HBM: u64 = 1 << 40;
/// A tmpfs that every Linux has.
const TMPFS: &str = "/dev/shm";

/// Measures SwiftCache's budgets on this machine, and compares each with a baseline from the same run.
/// Exits with 0 when it could measure, also when a budget is missed, and with 1 when it could not measure.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// Repetitions of each control message and copy.
    #[arg(long, default_value_t = 1000)]
    rounds: u32,
    /// Write the table into this document, between its two markers.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Measure only what lookups take while others flood the broker.
    #[arg(long, conflicts_with = "write")]
    floods: bool,
    /// Measure only what donors' demands take.
    #[arg(long, conflicts_with_all = ["write", "floods"])]
    demands: bool,
    /// Measure only blocks to and from a disk, in this directory of it.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["write", "floods", "demands"])]
    disk: Option<PathBuf>,
    /// Measure only restarts, and copies that replicas keep.
    #[arg(long, conflicts_with_all = ["write", "floods", "demands", "disk"])]
    tiers: bool,
    /// Flood the broker at `--socket` until killed. The bench starts processes that do.
    #[arg(long, hide = true, requires = "socket")]
    flood: Option<floods::Flood>,
    #[arg(long, hide = true)]
    socket: Option<PathBuf>,
}

#[allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command: it prints"
)]
fn main() -> ExitCode {
    let flags = Flags::parse();
    match run(&flags) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("swiftcache-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<String> {
    // An engine calls from one thread. A current-thread runtime has the same tail latencies as an engine.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    if let (Some(flood), Some(socket)) = (flags.flood, &flags.socket) {
        floods::flood(flood, socket, &runtime)?;
        return Ok(String::new());
    }
    if let Some(dir) = &flags.disk {
        return Ok(text(flags, &disk::run(dir, flags.rounds.min(256))?));
    }
    if flags.tiers {
        return Ok(text(flags, &tiers::run(flags.rounds.min(20))?));
    }
    if flags.demands {
        return Ok(text(flags, &ownership::run(flags.rounds.min(200))?));
    }
    if flags.floods {
        return Ok(text(flags, &flooded(flags.rounds, &runtime)?));
    }
    if let Some(path) = &flags.write {
        report::check_markers(path)?;
    }
    let mut lines = process(flags.rounds, &runtime)?;
    lines.extend(flooded(flags.rounds, &runtime)?);
    lines.extend(copies::run(flags.rounds.min(25))?);
    lines.extend(pipeline::run(9)?);
    lines.extend(ownership::run(flags.rounds.min(20))?);
    lines.extend(slowdown::run(flags.rounds.min(15))?);
    lines.extend(tiers::run(flags.rounds.min(20))?);
    if let Some(path) = &flags.write {
        let text = format!("{}\n\n{}", machine::describe(), report::markdown(&lines));
        report::write_between_markers(path, &text)?;
    }
    Ok(text(flags, &lines))
}

/// The lines as a table, or as JSON.
fn text(flags: &Flags, lines: &[Line]) -> String {
    let machine = machine::describe();
    match flags.json {
        true => {
            let document = serde_json::json!({ "machine": machine, "lines": lines });
            format!("{document:#}")
        }
        false => format!("{machine}\n{}", report::table(lines)),
    }
}

/// Lookups while others flood a new broker, which lets everybody in.
fn flooded(rounds: u32, runtime: &tokio::runtime::Runtime) -> Result<Vec<Line>> {
    let node = floods::node(HBM)?;
    floods::run(rounds, runtime, &node)
}

/// Starts a new broker, with its ledger on tmpfs as on a node.
fn start() -> Result<Node> {
    Node::start_with(Setup {
        hbm_bytes: Some(HBM),
        parent: Some(TMPFS.into()),
        ..Setup::default()
    })
}

/// All measurements on a broker process.
fn process(rounds: u32, runtime: &tokio::runtime::Runtime) -> Result<Vec<Line>> {
    let mut ready = Latencies::new()?;
    let mut bare = Latencies::new()?;
    for _ in 0..15 {
        let began = Instant::now();
        let node = start().context("cannot start a broker")?;
        runtime.block_on(control::connect(&node.socket()))?;
        ready.add(began.elapsed());
        bare.add(broker::bare_start(&program("swiftcache-broker")?)?);
    }
    let node = start()?;
    let idle = broker::rss(node.broker()?.pid())?;
    let own = broker::rss(std::process::id())?;
    let mut lines = vec![
        broker::ready_line(ready.at(0.5), bare.at(0.5)),
        broker::idle_line(idle, own),
    ];
    lines.extend(runtime.block_on(async {
        let channel = control::connect(&node.socket()).await?;
        control::run(channel, rounds).await
    })?);
    lines.push(runtime.block_on(index::run(&start()?))?);
    Ok(lines)
}
