//! Compares copies of the host backend with plain memory copies of the same bytes.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use swiftcache_client::device::{DeviceLayer, Piece};
use swiftcache_proto::domain::HandleKind;

use super::Row;
use crate::subject::simulated;

const MIB: usize = 1 << 20;

/// Measures extents from 1 to 256 MiB. It takes the best of `rounds` rounds of each, because other work on the machine
/// can only make a copy slower.
///
/// # Errors
/// When the backend fails or a copy is wrong.
pub fn run(usage_dir: std::path::PathBuf, rounds: usize) -> Result<Vec<Row>> {
    let layer = simulated(usage_dir)?;
    let device = layer.devices()[0].uuid.clone();
    let stream = layer.stream(&device)?;
    let mut rows = Vec::new();
    for size in [MIB, 8 * MIB, 64 * MIB, 256 * MIB] {
        let bytes = size as u64;
        let allocate = || layer.allocate(&device, bytes, HandleKind::PosixFd);
        let (from, to) = (allocate()?, allocate()?);
        let (source, mut target) = (vec![1_u8; size], vec![2_u8; size]);
        let piece = Piece {
            from: 0,
            to: 0,
            bytes,
        };
        stream.write(&from, 0, &source)?;
        stream.write(&to, 0, &target)?;
        let (mut plain, mut ours) = (Duration::MAX, Duration::MAX);
        for _ in 0..rounds {
            let start = Instant::now();
            target.copy_from_slice(std::hint::black_box(&source));
            plain = plain.min(start.elapsed());
            let start = Instant::now();
            stream.copy(&from, &to, &[piece])?;
            stream.record()?.wait()?;
            ours = ours.min(start.elapsed());
        }
        stream.read(&to, 0, &mut target)?;
        ensure!(target == source, "the copy is wrong");
        rows.push(Row {
            group: "host extent".to_owned(),
            case: format!("{} MiB", size / MIB),
            bytes,
            seconds: ours.as_secs_f64(),
            against: "memcpy".to_owned(),
            ratio: Some(plain.as_secs_f64() / ours.as_secs_f64()),
        });
    }
    Ok(rows)
}
