//! The broker as a process: how soon it is ready, and how much memory it uses.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::report::{Line, time};

/// The most resident memory of an idle broker, bytes.
const IDLE_RSS: u64 = 30 << 20;
/// The longest time from spawn to the first answer.
const READY: Duration = Duration::from_millis(100);
/// The most memory of one indexed block, bytes.
const BLOCK: f64 = 100.0;

/// Resident memory of the process, bytes.
pub(crate) fn rss(pid: u32) -> Result<u64> {
    let path = Path::new("/proc").join(pid.to_string()).join("status");
    let status = fs::read_to_string(&path)?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .context("no VmRSS")?;
    Ok(kib.trim().parse::<u64>()? << 10)
}

/// Times a process that only starts and exits. This is the baseline for starting a broker.
pub(crate) fn bare_start(program: &Path) -> Result<Duration> {
    let began = Instant::now();
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()?;
    anyhow::ensure!(
        output.status.success(),
        "{} --version failed",
        program.display()
    );
    Ok(began.elapsed())
}

/// The line for the time from spawn to the first answer.
pub(crate) fn ready_line(ready: Duration, bare: Duration) -> Line {
    Line {
        what: "broker: spawn to first answered RPC, median".to_owned(),
        measured: time(ready),
        baseline: format!("the same binary's --version: {}", time(bare)),
        ratio: Some(ready.as_secs_f64() / bare.as_secs_f64()),
        budget: format!("< {}", time(READY)),
        kept: Some(ready < READY),
    }
}

/// The line for the resident memory of an idle broker.
pub(crate) fn idle_line(idle: u64, own: u64) -> Line {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    Line {
        what: "broker: resident memory, idle".to_owned(),
        measured: mib(idle),
        baseline: format!("this bench process: {}", mib(own)),
        ratio: Some(idle as f64 / own as f64),
        budget: "≤ 30 MB".to_owned(),
        kept: Some(idle <= IDLE_RSS),
    }
}

/// The line for the growth of resident memory per block in the index.
pub(crate) fn block_line(before: u64, after: u64, blocks: u64) -> Line {
    let each = after.saturating_sub(before) as f64 / blocks as f64;
    Line {
        what: format!("broker: memory per indexed block, {blocks} blocks"),
        measured: format!("{each:.0} B"),
        baseline: "its 16-byte hash".to_owned(),
        ratio: Some(each / 16.0),
        budget: "≤ 100 B".to_owned(),
        kept: Some(each <= BLOCK),
    }
}
