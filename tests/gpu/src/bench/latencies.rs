//! Measures how long a process takes on its GPU to export (grant), to import (open) and to give up (revoke) memory.

use std::time::{Duration, Instant};

use anyhow::Result;
use swiftcache_client::device::{DeviceLayer, Piece};
use swiftcache_proto::domain::{DeviceUuid, HandleKind};

use super::{Bench, Row, Rows};
use crate::{
    peer::{Peer, Request},
    subject::Subject,
};

const MIB: u64 = 1 << 20;

/// How often each step is measured. The row has the median.
const TIMES: usize = 9;

pub(super) fn run(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    context(bench.subject, bench, rows)?;
    let sizes = [64 * MIB, 1024 * MIB, 16_384 * MIB];
    for &kind in bench.layer.handle_kinds() {
        for bytes in sizes
            .into_iter()
            .filter(|bytes| *bytes <= 4 * bench.scale.memory)
        {
            let mut peer = Peer::start(bench.subject)?;
            let mut spent: [Vec<Duration>; 5] = Default::default();
            for _ in 0..TIMES {
                let (memory, spent_here) =
                    timed(|| Ok(bench.layer.allocate(&bench.device, bytes, kind)?))?;
                spent[0].push(spent_here);
                spent[1].push(timed(|| Ok(bench.layer.export(&memory)?))?.1);
                let give_back = || {
                    drop(memory);
                    Ok(())
                };
                spent[4].push(timed(give_back)?.1);
                let [open, revoke] = borrow(bench, &mut peer, &bench.device, kind, bytes)?;
                spent[2].push(open);
                spent[3].push(revoke);
            }
            let steps = ["allocate and zero", "export (grant)", OPEN, REVOKE, "free"];
            for (step, spent) in steps.into_iter().zip(spent) {
                rows.push(row("latency", step, kind, bytes, spent));
            }
        }
    }
    Ok(())
}

/// Measures opening and revoking memory of a donor on another device.
pub(super) fn across(
    bench: &Bench<'_>,
    owner: &DeviceUuid,
    kind: HandleKind,
    rows: &mut Rows<'_>,
) -> Result<()> {
    for bytes in [64 * MIB, 1024 * MIB] {
        if bytes > 4 * bench.scale.memory {
            continue;
        }
        let mut peer = Peer::start(bench.subject)?;
        let mut spent: [Vec<Duration>; 2] = Default::default();
        for _ in 0..TIMES {
            let [open, revoke] = borrow(bench, &mut peer, owner, kind, bytes)?;
            spent[0].push(open);
            spent[1].push(revoke);
        }
        let steps = [OPEN, REVOKE];
        for (step, spent) in steps.into_iter().zip(spent) {
            rows.push(row("peer latency", step, kind, bytes, spent));
        }
    }
    Ok(())
}

const OPEN: &str = "import (open)";
const REVOKE: &str = "drain a whole copy and unmap (revoke)";

/// Borrows memory on `owner` once. Returns the time to open it, and the borrower's time for a revocation.
fn borrow(
    bench: &Bench<'_>,
    donor: &mut Peer,
    owner: &DeviceUuid,
    kind: HandleKind,
    bytes: u64,
) -> Result<[Duration; 2]> {
    let (number, export) = donor.donate(owner, bytes, kind, None)?;
    let (theirs, open) = timed(|| Ok(bench.layer.import(&bench.device, owner, export, bytes)?))?;
    // The borrower's part of a revocation: it waits for a copy in flight, and unmaps the memory.
    let ours = &bench.memories[0];
    let piece = Piece {
        from: 0,
        to: 0,
        bytes: bytes.min(ours.bytes()),
    };
    let stream = bench.layer.stream(&bench.device)?;
    stream.copy(&theirs, ours, &[piece])?;
    let ticket = stream.record()?;
    let let_go = || {
        ticket.wait()?;
        drop(theirs);
        Ok(())
    };
    let revoke = timed(let_go)?.1;
    donor.ask(Request::Drop { memory: number })?;
    Ok([open, revoke])
}

/// The row with the median of `spent`.
fn row(group: &str, step: &str, kind: HandleKind, bytes: u64, mut spent: Vec<Duration>) -> Row {
    spent.sort();
    Row {
        group: group.to_owned(),
        case: format!("{step}, {kind:?}, {} MiB", bytes / MIB),
        bytes,
        seconds: spent[spent.len() / 2].as_secs_f64(),
        against: String::new(),
        ratio: None,
    }
}

/// Measures the first allocation of a second process, and the HBM that the process's CUDA context takes beyond the
/// memory that it donates.
fn context(subject: &Subject, bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let before = bench.layer.hbm(&bench.device)?.free;
    let mut peer = Peer::start(subject)?;
    let bytes = 64 * MIB;
    let kind = bench.layer.handle_kinds()[0];
    let ((number, export), time) = timed(|| peer.donate(&bench.device, bytes, kind, None))?;
    drop(export);
    peer.ask(Request::Drop { memory: number })?;
    let after = bench.layer.hbm(&bench.device)?.free;
    rows.push(Row {
        group: "latency".to_owned(),
        case: "a process's first allocation (its context's HBM under bytes)".to_owned(),
        bytes: before.saturating_sub(after),
        seconds: time.as_secs_f64(),
        against: String::new(),
        ratio: None,
    });
    Ok(())
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let result = work()?;
    Ok((result, start.elapsed()))
}
