//! Copies on the host backend. Each is compared with a plain copy of the same bytes in the same run.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{CopyStream, DeviceLayer, Memory, Piece, host::HostLayer};
use swiftcache_proto::{domain::HandleKind, topology::Topology};

use crate::report::{Latencies, Line};

const MIB: u64 = 1 << 20;
/// Enough bytes that memory is measured, not caches.
const BYTES: u64 = 256 * MIB;

/// Two devices with an NVLink between them, which the copies cross.
const TOPOLOGY: &str = r#"
name = "bench"
[[device]]
uuid = "SIM-0"
name = "simulated"
hbm_gib = 4
[[device]]
uuid = "SIM-1"
name = "simulated"
hbm_gib = 4
[all_pairs]
kind = "nvlink"
gigabytes_per_second = 1.0
"#;

/// Measures one extent, and the same bytes as scattered pieces, against memcpy.
pub(crate) fn run(rounds: u32) -> Result<Vec<Line>> {
    let topology = Topology::parse(TOPOLOGY, "bench")?;
    let layer = HostLayer::from_topology(&topology, false)?;
    let [donor, own] = [&topology.devices[1].uuid, &topology.devices[0].uuid];
    let slab = layer.allocate(donor, BYTES, HandleKind::PosixFd)?;
    let pool = layer.allocate(own, BYTES, HandleKind::PosixFd)?;
    let stream = layer.stream(own)?;

    // Write every page. Pages that were never touched are all the same page of zeros, which a copy reads from cache.
    let from: Vec<u8> = (0_u8..=250).cycle().take(BYTES as usize).collect();
    let mut to = vec![1_u8; BYTES as usize];
    stream.write(&slab, 0, &from)?;
    stream.zero(&pool, 0, BYTES)?;
    stream.record()?.wait()?;
    // Alternate between the measurements, so that other work on the machine slows all of them alike.
    let mut plain = Latencies::new()?;
    let mut plain_pieces = Latencies::new()?;
    let mut extent = Latencies::new()?;
    let mut scattered = Latencies::new()?;
    let whole = [Piece {
        from: 0,
        to: 0,
        bytes: BYTES,
    }];
    let blocks = scatter(64 << 10);
    for _ in 0..rounds {
        let began = Instant::now();
        to.copy_from_slice(black_box(&from));
        black_box(&to);
        plain.add(began.elapsed());
        let began = Instant::now();
        for piece in &blocks {
            let [source, target] = [piece.from, piece.to].map(|at| at as usize);
            let bytes = piece.bytes as usize;
            to[target..target + bytes].copy_from_slice(&black_box(&from)[source..source + bytes]);
        }
        black_box(&to);
        plain_pieces.add(began.elapsed());
        scattered.add(timed(stream.as_ref(), &slab, &pool, &blocks)?);
        extent.add(timed(stream.as_ref(), &slab, &pool, &whole)?);
    }
    stream.read(&pool, 0, &mut to)?;
    ensure!(to == from, "an extent's copy differs from its source");
    Ok(vec![
        line(
            "host copy, one 256 MiB extent",
            &extent,
            "memcpy of the same bytes",
            &plain,
            Some(0.95),
        ),
        line(
            "host copy, 4,096 scattered pieces of 64 KiB",
            &scattered,
            "memcpy of the same pieces",
            &plain_pieces,
            None,
        ),
    ])
}

/// The same bytes in pieces of `piece` bytes, in an order that no prefetcher can guess.
fn scatter(piece: u64) -> Vec<Piece> {
    let pieces = BYTES / piece;
    (0..pieces)
        .map(|index| Piece {
            from: index * piece,
            // 2,654,435,761 is odd and the number of pieces is 2^n, so each target is used once.
            to: (index.wrapping_mul(2_654_435_761) % pieces) * piece,
            bytes: piece,
        })
        .collect()
}

fn timed(
    stream: &dyn CopyStream,
    from: &Memory,
    to: &Memory,
    pieces: &[Piece],
) -> Result<Duration> {
    let began = Instant::now();
    stream.copy(from, to, pieces)?;
    stream.record()?.wait().context("the copy failed")?;
    Ok(began.elapsed())
}

fn line(
    what: &str,
    took: &Latencies,
    baseline: &str,
    plain: &Latencies,
    floor: Option<f64>,
) -> Line {
    let [took, plain] = [took.at(0.5), plain.at(0.5)];
    let rate = |took: Duration| format!("{:.2} GB/s", BYTES as f64 / took.as_secs_f64() / 1e9);
    let ratio = plain.as_secs_f64() / took.as_secs_f64();
    Line {
        what: format!("{what}, median"),
        measured: rate(took),
        baseline: format!("{baseline}: {}", rate(plain)),
        ratio: Some(ratio),
        budget: floor.map_or(String::new(), |floor| format!("≥ {:.0} %", floor * 100.0)),
        kept: floor.map(|floor| ratio >= floor),
    }
}
