//! Rates of copies.

use std::sync::Arc;

use anyhow::{Result, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use swiftcache_client::device::{CopyStream, DeviceLayer, Memory, Piece, cuda::Method};

use super::{Bench, Course, Row, Rows};
use crate::pattern;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Models by the bytes of one side (K or V) of a 16-token block of one layer, as bf16: 16 tokens x KV heads x 128 x 2.
const MODELS: [(&str, u64); 4] = [
    ("qwen3-8b (8 KV heads)", 32 * KIB),
    ("llama-3.1-70b (8 KV heads)", 32 * KIB),
    ("qwen3-8b, half the heads (TP 2)", 16 * KIB),
    ("lwm-7b (32 KV heads)", 128 * KIB),
];

/// The driver's batches and single copies are slow for small pieces; more than this many says nothing new.
const MOST_SINGLE_COPIES: u64 = 4096;

/// Sizes of scattered pieces, bytes.
pub(super) const PIECES: [u64; 11] = [
    4 * KIB,
    8 * KIB,
    16 * KIB,
    32 * KIB,
    64 * KIB,
    128 * KIB,
    256 * KIB,
    512 * KIB,
    MIB,
    2 * MIB,
    4 * MIB,
];

/// Contiguous copies, as a layer of consecutive blocks is.
pub(super) fn extents(course: &Course<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let bench = course.bench;
    let stream = bench.layer.stream(&bench.device)?;
    for bytes in [MIB, 2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB] {
        if bytes > course.size() {
            continue;
        }
        let plain = course.plain(bytes)?;
        let places = course.size() / bytes;
        let seconds = bench.time_stream(&*stream, |number| {
            let offset = (number % places) * bytes;
            let piece = Piece {
                from: offset,
                to: offset,
                bytes,
            };
            Ok(stream.copy(course.from, course.to, &[piece])?)
        })?;
        let whole = Piece {
            from: 0,
            to: 0,
            bytes,
        };
        let row = course.row("extent", &size(bytes), bytes, (seconds, plain));
        let verified = verify(&stream, course.from, course.to, &[whole]);
        rows.check(&row.case, verified);
        rows.push(row);
    }
    Ok(())
}

/// Pieces of each size, scattered on both sides, by each method.
pub(super) fn scattered(course: &Course<'_>, sizes: &[u64], rows: &mut Rows<'_>) -> Result<()> {
    for &bytes in sizes {
        for method in [Method::Each, Method::Batch, Method::Kernel] {
            let most = match method {
                Method::Each | Method::Batch => MOST_SINGLE_COPIES,
                Method::Pick | Method::Kernel | Method::KernelOn(_) => u64::MAX,
            };
            let count = (course.bench.scale.bytes / bytes).clamp(1, most);
            let case = format!("{count} x {}, {}", size(bytes), name(method));
            let what = ("scattered", case.as_str());
            measure(course, what, (bytes, count), method, rows)?;
        }
    }
    Ok(())
}

/// What an engine moves per layer: K and V of every block of a prompt, each scattered.
pub(super) fn models(course: &Course<'_>, rows: &mut Rows<'_>) -> Result<()> {
    for (model, bytes) in MODELS {
        for blocks in [16, 64, 512, 2048] {
            let count = 2 * blocks;
            if count * bytes > course.size() / 2 {
                continue;
            }
            let case = format!("{model}: {} tokens", blocks * 16);
            let what = ("16-token blocks", case.as_str());
            measure(course, what, (bytes, count), Method::Pick, rows)?;
        }
    }
    Ok(())
}

/// So many pieces of so many bytes, beside a plain copy of them all.
fn measure(
    course: &Course<'_>,
    (group, case): (&str, &str),
    (bytes, count): (u64, u64),
    method: Method,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let plain = course.plain(bytes * count)?;
    let (stream, pieces, seconds) = time_pieces(course, (bytes, count), method)?;
    let row = course.row(group, case, bytes * count, (seconds, plain));
    let verified = verify(&stream, course.from, course.to, &pieces);
    rows.check(&row.case, verified);
    rows.push(row);
    Ok(())
}

/// Seconds for `count` scattered pieces of `bytes` by one method, and the stream that copied which pieces.
pub(super) fn time_pieces(
    course: &Course<'_>,
    (bytes, count): (u64, u64),
    method: Method,
) -> Result<(Arc<dyn CopyStream>, Vec<Piece>, f64)> {
    let bench = course.bench;
    let stream = bench.layer.stream_by(&bench.device, method)?;
    let mut layouts = scatter(course.size(), bytes, count);
    ensure!(!layouts.is_empty(), "{count} x {bytes} bytes do not fit");
    let seconds = bench.time_stream(&*stream, |number| {
        let pieces = &layouts[number as usize % layouts.len()];
        Ok(stream.copy(course.from, course.to, pieces)?)
    })?;
    Ok((stream, layouts.swap_remove(0), seconds))
}

/// Several lists of `count` pieces: blocks of the source in random order to random blocks of the target. Together they
/// cover more than the caches hold.
fn scatter(memory: u64, bytes: u64, count: u64) -> Vec<Vec<Piece>> {
    let mut random = StdRng::seed_from_u64(bytes);
    let mut shuffled = || {
        let mut blocks: Vec<u64> = (0..memory / bytes).collect();
        blocks.shuffle(&mut random);
        blocks
    };
    let (from, to) = (shuffled(), shuffled());
    let lists = from
        .chunks_exact(count as usize)
        .zip(to.chunks_exact(count as usize));
    lists
        .take(16)
        .map(|(from, to)| {
            let pair = from.iter().zip(to);
            pair.map(|(from, to)| Piece {
                from: from * bytes,
                to: to * bytes,
                bytes,
            })
            .collect()
        })
        .collect()
}

/// Copies once more, from fresh bytes, and looks at every one of them.
fn verify(
    stream: &Arc<dyn CopyStream>,
    from: &Memory,
    to: &Memory,
    pieces: &[Piece],
) -> Result<()> {
    ensure!(!pieces.is_empty(), "nothing was copied");
    for piece in pieces {
        pattern::write(&**stream, from, piece.from, piece.bytes, piece.from)?;
        stream.zero(to, piece.to, piece.bytes)?;
    }
    stream.copy(from, to, pieces)?;
    for piece in pieces {
        pattern::verify(&**stream, to, piece.to, piece.bytes, piece.from)?;
    }
    Ok(())
}

/// Pinned host memory, both ways: what PCIe offload costs on this machine.
pub(super) fn host(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let bytes = bench.scale.bytes;
    let host = bench.layer.allocate_host(&bench.device, 4 * bytes)?;
    let device = &bench.memories[0];
    let mut rate = |case: &str, from: &Memory, to: &Memory, plain: Option<f64>| {
        let stream = bench.layer.stream(&bench.device)?;
        let seconds = bench.time_stream(&*stream, |number| {
            let offset = (number % 4) * bytes;
            let piece = Piece {
                from: offset,
                to: offset,
                bytes,
            };
            Ok(stream.copy(from, to, &[piece])?)
        })?;
        rows.push(Row {
            group: "pinned host memory".to_owned(),
            case: case.to_owned(),
            bytes,
            seconds,
            against: "plain device-to-device copy".to_owned(),
            ratio: plain.map(|plain| plain / seconds),
        });
        Ok::<f64, anyhow::Error>(seconds)
    };
    let plain = Course::within(bench).plain(bytes)?;
    let fetch = rate("host to device, one extent", &host, device, Some(plain))?;
    let back = rate("device to host, one extent", device, &host, Some(plain))?;
    for (way, from, to, whole) in [
        ("host to device", &host, device, fetch),
        ("device to host", device, &host, back),
    ] {
        for kib in [16, 32, 64, 256] {
            for method in [Method::Each, Method::Batch, Method::Kernel] {
                let piece_bytes = kib * KIB;
                let count = bytes / piece_bytes;
                let stream = bench.layer.stream_by(&bench.device, method)?;
                let layouts = scatter(host.bytes(), piece_bytes, count);
                let seconds = bench.time_stream(&*stream, |number| {
                    let pieces = &layouts[number as usize % layouts.len()];
                    Ok(stream.copy(from, to, pieces)?)
                })?;
                verify(&stream, from, to, &layouts[0])?;
                rows.push(Row {
                    group: "pinned host memory".to_owned(),
                    case: format!("{way}, {count} x {}, {}", size(piece_bytes), name(method)),
                    bytes,
                    seconds,
                    against: format!("{way}, one extent"),
                    ratio: Some(whole / seconds),
                });
            }
        }
    }
    Ok(())
}

pub(super) fn name(method: Method) -> String {
    let name = match method {
        Method::Pick => "picked",
        Method::Each => "one by one",
        Method::Batch => "batched",
        Method::Kernel => "kernel",
        Method::KernelOn(blocks) => return format!("kernel on {blocks} blocks"),
    };
    name.to_owned()
}

pub(super) fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(MIB) {
        format!("{} MiB", bytes / MIB)
    } else {
        format!("{} KiB", bytes / KIB)
    }
}
