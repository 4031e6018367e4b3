//! Measures copies from and to host memory that a donor lends (`swiftcache donate --device HOST-0`), which an engine maps and
//! registers with the driver. Each is compared with the same copy of the driver's own pinned memory, in the same run.

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{DeviceLayer, Memory, Piece, cuda::Method, open_host_memory};
use swiftcache_proto::{domain::HandleKind, numa};

use super::{
    Bench, Row, Rows,
    copies::{Pieces, scatter, size, verify},
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The least rate of a large copy, as a part of that of pinned memory.
const LEAST: f64 = 0.9;

/// Sizes of pieces, bytes; the last one is copied as one extent.
const PIECES: [u64; 4] = [32 * KIB, 64 * KIB, 256 * KIB, 16 * MIB];

/// Runs the part.
pub(super) fn run(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let bytes = 4 * bench.scale.bytes;
    let nodes = numa::devices();
    let node = nodes.first().context("no NUMA node has memory")?;
    let donor = open_host_memory(std::slice::from_ref(node))?;
    let donated = donor.allocate(&node.uuid, bytes, HandleKind::PosixFd)?;
    let export = donor.export(&donated)?;
    let lent = bench
        .layer
        .import(&bench.device, &node.uuid, export, bytes)?;
    let pinned = bench.layer.allocate_host(&bench.device, bytes)?;
    let device = &bench.memories[0];
    for piece_bytes in PIECES {
        let piece_bytes = piece_bytes.min(bench.scale.bytes);
        let pieces = Pieces {
            bytes: piece_bytes,
            count: bench.scale.bytes / piece_bytes,
        };
        for (way, out) in [("host to device", true), ("device to host", false)] {
            let time = |host: &Memory| -> Result<f64> {
                let (from, to) = if out { (host, device) } else { (device, host) };
                let stream = bench.layer.stream_by(&bench.device, Method::Pick)?;
                let layouts = scatter(bytes, pieces);
                let seconds = bench.time_stream(&*stream, |number| {
                    let pieces: &[Piece] = &layouts[number as usize % layouts.len()];
                    Ok(stream.copy(from, to, pieces)?)
                })?;
                let first = layouts.first().context("no pieces")?;
                verify(&stream, from, to, first)?;
                Ok(seconds)
            };
            let (plain, seconds) = (time(&pinned)?, time(&lent)?);
            let ratio = plain / seconds;
            let case = format!("{way}, {} x {}", pieces.count, size(piece_bytes));
            // Small measurements only show that everything runs.
            if piece_bytes == PIECES[3] && !bench.scale.time.is_zero() {
                let fast = || {
                    ensure!(
                        ratio >= LEAST,
                        "{ratio:.2} of pinned memory, less than {LEAST}"
                    );
                    Ok(())
                };
                rows.check(&case, fast());
            }
            rows.push(Row {
                group: "lent host memory".to_owned(),
                case,
                bytes: pieces.total(),
                seconds,
                against: "the same of pinned memory".to_owned(),
                ratio: Some(ratio),
            });
        }
    }
    Ok(())
}
