//! Blocks to and from a disk, compared with `dd` past the page cache on the same disk in the same run.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use swiftcache_client::disk::{DiskStore, Put, StoreConfig};
use swiftcache_proto::domain::BlockHash;

use crate::report::Line;

/// Bytes of a block: 16 tokens of an 8B model in bf16.
const BLOCK: u64 = 2 << 20;
const LAYERS: u64 = 32;

/// Measures `blocks` blocks in a directory of the disk.
pub(crate) fn run(dir: &Path, blocks: u32) -> Result<Vec<Line>> {
    let scratch = tempfile::tempdir_in(dir)?;
    let total = u64::from(blocks) * BLOCK;
    let plain = scratch.path().join("dd");
    let dd = |from: &Path, to: &Path, flag: &str| -> Result<Duration> {
        let began = Instant::now();
        let status = Command::new("dd")
            .arg(format!("if={}", from.display()))
            .arg(format!("of={}", to.display()))
            .args([
                &format!("bs={BLOCK}"),
                &format!("count={blocks}"),
                flag,
                "conv=notrunc",
            ])
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "dd ended with {status}");
        Ok(began.elapsed())
    };
    let plain_write = dd(Path::new("/dev/zero"), &plain, "oflag=direct")?;
    let store = DiskStore::open(&StoreConfig {
        path: scratch.path().join("store"),
        bytes: 2 * total + (64 << 20),
        tenant: "bench".to_owned(),
        direct: true,
    })?;
    let layers = vec![BLOCK / LAYERS; LAYERS as usize];
    let block: Vec<u8> = (0_u8..=250).cycle().take(BLOCK as usize).collect();
    let hash = |n: u32| {
        let mut bytes = [1; 16];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        BlockHash(bytes)
    };
    let began = Instant::now();
    for n in 0..blocks {
        let put = store.put("bench", &layers, hash(n), None, &block);
        ensure!(put == Put::Stored, "block {n} was not kept");
    }
    let write = began.elapsed();
    let plain_read = dd(&plain, Path::new("/dev/null"), "iflag=direct")?;
    let began = Instant::now();
    for n in 0..blocks {
        let read = store.get("bench", &hash(n));
        ensure!(
            read.as_deref() == Some(&block[..]),
            "block {n} is not right"
        );
    }
    let read = began.elapsed();
    Ok(vec![
        line(
            "written to disk, blocks of 2 MiB with checksums",
            total,
            write,
            plain_write,
            "dd oflag=direct",
        ),
        line(
            "read from disk, blocks of 2 MiB with checksums",
            total,
            read,
            plain_read,
            "dd iflag=direct",
        ),
    ])
}

fn line(what: &str, bytes: u64, took: Duration, plain: Duration, baseline: &str) -> Line {
    let rate = |took: Duration| bytes as f64 / took.as_secs_f64() / 1e9;
    Line {
        what: format!("{what} (this machine's disk, host backend)"),
        measured: format!("{:.2} GB/s", rate(took)),
        baseline: format!("{baseline}: {:.2} GB/s", rate(plain)),
        ratio: Some(rate(took) / rate(plain)),
        budget: "none".to_owned(),
        kept: None,
    }
}
