//! What a grant, an opening and a revocation cost a process on its GPU.

use std::time::{Duration, Instant};

use anyhow::Result;
use swiftcache_client::device::{DeviceLayer, Piece};

use super::{Bench, Row};
use crate::{peer::Peer, subject::Subject};

const MIB: u64 = 1 << 20;

/// How often each is done; the median is told.
const TIMES: usize = 9;

pub(super) fn run(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    context(bench.subject, bench, rows)?;
    let sizes = [64 * MIB, 1024 * MIB, 16_384 * MIB];
    for &kind in bench.layer.handle_kinds() {
        for bytes in sizes
            .into_iter()
            .filter(|bytes| *bytes <= 4 * bench.scale.memory)
        {
            let mut peer = Peer::start(bench.subject)?;
            let mut spent: [Vec<Duration>; 5] = Default::default();
            let stream = bench.layer.stream(&bench.device)?;
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
                let (number, export) = peer.donate(&bench.device, bytes, kind, None)?;
                let (theirs, spent_here) = timed(|| {
                    let device = &bench.device;
                    Ok(bench.layer.import(device, device, export, bytes)?)
                })?;
                spent[2].push(spent_here);
                // The borrower's part of a revocation: a copy in flight ends, and the mapping with it.
                let piece = Piece {
                    from: 0,
                    to: 0,
                    bytes: bytes.min(bench.memories[0].bytes()),
                };
                stream.copy(&theirs, &bench.memories[0], &[piece])?;
                let ticket = stream.record()?;
                spent[3].push(
                    timed(|| {
                        ticket.wait()?;
                        drop(theirs);
                        Ok(())
                    })?
                    .1,
                );
                peer.ask(crate::peer::Request::Drop { memory: number })?;
            }
            let steps = [
                "allocate and zero",
                "export (grant)",
                "import (open)",
                "drain a whole copy and unmap (revoke)",
                "free",
            ];
            for (step, mut spent) in steps.into_iter().zip(spent) {
                spent.sort();
                rows.push(Row {
                    group: "latency",
                    case: format!("{step}, {kind:?}, {} MiB", bytes / MIB),
                    bytes,
                    seconds: spent[spent.len() / 2].as_secs_f64(),
                    against: String::new(),
                    ratio: None,
                });
            }
        }
    }
    Ok(())
}

/// HBM that a second process costs by being there: its context, beyond the memory it donates.
fn context(subject: &Subject, bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let before = bench.layer.hbm(&bench.device)?.free;
    let mut peer = Peer::start(subject)?;
    let bytes = 64 * MIB;
    let kind = bench.layer.handle_kinds()[0];
    let ((number, export), time) = timed(|| peer.donate(&bench.device, bytes, kind, None))?;
    drop(export);
    peer.ask(crate::peer::Request::Drop { memory: number })?;
    let after = bench.layer.hbm(&bench.device)?.free;
    rows.push(Row {
        group: "latency",
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
