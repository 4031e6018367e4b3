//! Measures the rates of copies.

use std::sync::Arc;

use anyhow::{Result, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use swiftcache_client::device::{CopyStream, DeviceLayer, Memory, Piece, cuda::Method};

use super::{Bench, Course, Row, Rows, course::Times};
use crate::pattern;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Models, with the bytes of K (or of V) of a 16-token block in one layer, in bf16: 16 tokens x KV heads x 128 x 2.
const MODELS: [(&str, u64); 4] = [
    ("qwen3-8b (8 KV heads)", 32 * KIB),
    ("llama-3.1-70b (8 KV heads)", 32 * KIB),
    ("qwen3-8b, half the heads (TP 2)", 16 * KIB),
    ("lwm-7b (32 KV heads)", 128 * KIB),
];

/// The most pieces that are measured with the driver's batches and single copies. They are slow for small pieces, and
/// more pieces give the same rate.
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

/// Scattered pieces of one size.
#[derive(Clone, Copy)]
pub(super) struct Pieces {
    /// Bytes of each piece.
    pub(super) bytes: u64,
    /// How many pieces.
    pub(super) count: u64,
}

impl Pieces {
    /// Bytes of all pieces together.
    pub(super) fn total(self) -> u64 {
        self.bytes * self.count
    }
}

/// A measured copy of scattered pieces.
pub(super) struct TimedPieces {
    /// The stream that copied.
    pub(super) stream: Arc<dyn CopyStream>,
    /// One list of pieces that it copied.
    pub(super) pieces: Vec<Piece>,
    /// Time of one copy, seconds.
    pub(super) seconds: f64,
}

/// Measures contiguous copies. The consecutive blocks of a layer are copied like this.
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
        let times = Times { seconds, plain };
        let row = course.row("extent", &size(bytes), bytes, times);
        let verified = verify(&stream, course.from, course.to, &[whole]);
        rows.check(&row.case, verified);
        rows.push(row);
    }
    Ok(())
}

/// Measures pieces of each size, scattered on both sides, by each method.
pub(super) fn scattered(course: &Course<'_>, sizes: &[u64], rows: &mut Rows<'_>) -> Result<()> {
    for &bytes in sizes {
        for method in [Method::Each, Method::Batch, Method::Kernel] {
            let most = match method {
                Method::Each | Method::Batch => MOST_SINGLE_COPIES,
                Method::Pick | Method::Kernel | Method::KernelOn(_) => u64::MAX,
            };
            let count = (course.bench.scale.bytes / bytes).clamp(1, most);
            let case = format!("{count} x {}, {}", size(bytes), name(method));
            let pieces = Pieces { bytes, count };
            measure(course, "scattered", &case, pieces, method, rows)?;
        }
    }
    Ok(())
}

/// Measures what an engine moves for one layer of a prompt: K and V of every block, all scattered.
pub(super) fn models(course: &Course<'_>, rows: &mut Rows<'_>) -> Result<()> {
    for (model, bytes) in MODELS {
        for blocks in [16, 64, 512, 2048] {
            let count = 2 * blocks;
            let pieces = Pieces { bytes, count };
            if pieces.total() > course.size() / 2 {
                continue;
            }
            let case = format!("{model}: {} tokens", blocks * 16);
            measure(course, "16-token blocks", &case, pieces, Method::Pick, rows)?;
        }
    }
    Ok(())
}

/// Measures a copy of scattered pieces, and compares it with a plain copy of the same number of bytes.
fn measure(
    course: &Course<'_>,
    group: &str,
    case: &str,
    pieces: Pieces,
    method: Method,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let plain = course.plain(pieces.total())?;
    let timed = time_pieces(course, pieces, method)?;
    let times = Times {
        seconds: timed.seconds,
        plain,
    };
    let row = course.row(group, case, pieces.total(), times);
    let verified = verify(&timed.stream, course.from, course.to, &timed.pieces);
    rows.check(&row.case, verified);
    rows.push(row);
    Ok(())
}

/// Measures a copy of scattered pieces by one method.
pub(super) fn time_pieces(
    course: &Course<'_>,
    pieces: Pieces,
    method: Method,
) -> Result<TimedPieces> {
    let bench = course.bench;
    let Pieces { bytes, count } = pieces;
    let stream = bench.layer.stream_by(&bench.device, method)?;
    let mut layouts = scatter(course.size(), pieces);
    ensure!(!layouts.is_empty(), "{count} x {bytes} bytes do not fit");
    let seconds = bench.time_stream(&*stream, |number| {
        let pieces = &layouts[number as usize % layouts.len()];
        Ok(stream.copy(course.from, course.to, pieces)?)
    })?;
    Ok(TimedPieces {
        stream,
        pieces: layouts.swap_remove(0),
        seconds,
    })
}

/// Several lists of pieces in a memory of `memory` bytes. Each piece goes from a random place of the source to a random
/// place of the target. Together the lists cover more than the caches hold.
pub(super) fn scatter(memory: u64, Pieces { bytes, count }: Pieces) -> Vec<Vec<Piece>> {
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

/// Writes new bytes, copies them once more, and checks every byte.
pub(super) fn verify(
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

/// Measures copies from and to pinned host memory. This is what PCIe offload costs on this machine.
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
                let pieces = Pieces {
                    bytes: piece_bytes,
                    count,
                };
                let layouts = scatter(host.bytes(), pieces);
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
