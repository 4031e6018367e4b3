//! Blocks to and from a disk, compared in the same run with `dd` past the page cache and, where it is installed, with `fio` on the
//! same disk.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::disk::{DiskStore, Put, StoreConfig};
use swiftcache_proto::domain::BlockHash;

use crate::report::Line;

/// Bytes of a block: 16 tokens of an 8B model in bf16.
const BLOCK: u64 = 2 << 20;
const LAYERS: u64 = 32;
/// Blocks that the agent brings back at a time.
const BATCH: usize = 16;
/// How many pieces `fio` has under way.
const DEPTHS: [u32; 2] = [1, 8];

/// Measures `blocks` blocks in a directory of the disk.
pub(crate) fn run(dir: &Path, blocks: u32) -> Result<Vec<Line>> {
    let scratch = tempfile::tempdir_in(dir)?;
    let plain = Plain {
        file: scratch.path().join("plain"),
        blocks,
    };
    let mut baselines = plain.all(Way::Write)?;
    let store = DiskStore::open(&StoreConfig {
        path: scratch.path().join("store"),
        bytes: 2 * plain.bytes() + (64 << 20),
        tenant: "bench".to_owned(),
        direct: true,
    })?;
    let layers = vec![BLOCK / LAYERS; LAYERS as usize];
    let block: Vec<u8> = (0_u8..=250).cycle().take(BLOCK as usize).collect();
    let hashes: Vec<BlockHash> = (0..blocks).map(hash).collect();
    let began = Instant::now();
    for hash in &hashes {
        let put = store.put("bench", &layers, *hash, None, &block);
        ensure!(put == Put::Stored, "a block was not kept: {put:?}");
    }
    let write = plain.rate(began.elapsed());
    let mut lines = compared("written to", write, baselines);
    baselines = plain.all(Way::Read)?;
    let right = AtomicU64::new(0);
    let began = Instant::now();
    for batch in hashes.chunks(BATCH) {
        store.get_all("bench", batch, &|_, bytes| {
            right.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        });
    }
    let read = plain.rate(began.elapsed());
    ensure!(right.into_inner() == plain.bytes(), "blocks were not right");
    lines.extend(compared("read from", read, baselines));
    for hash in &hashes {
        let read = store.get("bench", hash);
        ensure!(read.as_deref() == Some(&block[..]), "a block is not right");
    }
    Ok(lines)
}

fn hash(n: u32) -> BlockHash {
    let mut bytes = [1; 16];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(bytes)
}

#[derive(Clone, Copy)]
enum Way {
    Write,
    Read,
}

/// A file of as many bytes, without anything around them.
struct Plain {
    file: std::path::PathBuf,
    blocks: u32,
}

impl Plain {
    fn bytes(&self) -> u64 {
        u64::from(self.blocks) * BLOCK
    }

    /// GB/s.
    fn rate(&self, took: Duration) -> f64 {
        self.bytes() as f64 / took.as_secs_f64() / 1e9
    }

    /// What programs that do nothing else reach, each by its name, GB/s.
    fn all(&self, way: Way) -> Result<Vec<(String, f64)>> {
        let mut all = vec![("dd".to_owned(), self.dd(way)?)];
        for depth in DEPTHS {
            if let Some(rate) = self.fio(way, depth)? {
                all.push((format!("fio, {depth} at a time"), rate));
            }
        }
        Ok(all)
    }

    fn dd(&self, way: Way) -> Result<f64> {
        let (from, to, flag) = match way {
            Way::Write => (Path::new("/dev/zero"), &*self.file, "oflag=direct"),
            Way::Read => (&*self.file, Path::new("/dev/null"), "iflag=direct"),
        };
        let began = Instant::now();
        let status = Command::new("dd")
            .arg(format!("if={}", from.display()))
            .arg(format!("of={}", to.display()))
            .args([
                &format!("bs={BLOCK}"),
                &format!("count={}", self.blocks),
                flag,
                "conv=notrunc",
            ])
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "dd ended with {status}");
        Ok(self.rate(began.elapsed()))
    }

    /// `None` where it is not installed.
    fn fio(&self, way: Way, depth: u32) -> Result<Option<f64>> {
        let (kind, field) = match way {
            Way::Write => ("write", "/jobs/0/write/bw_bytes"),
            Way::Read => ("read", "/jobs/0/read/bw_bytes"),
        };
        if matches!(way, Way::Write) {
            // A file that is there already is written over faster than one that grows, as the store's does.
            fs::remove_file(&self.file)?;
        }
        let output = Command::new("fio")
            .args(["--name=plain", "--direct=1", "--ioengine=libaio"])
            .arg("--output-format=json")
            .arg(format!("--filename={}", self.file.display()))
            .arg(format!("--rw={kind}"))
            .arg(format!("--bs={BLOCK}"))
            .arg(format!("--size={}", self.bytes()))
            .arg(format!("--iodepth={depth}"))
            .output();
        let output = match output {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            output => output?,
        };
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "fio: {}", said.trim());
        let found: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let rate = found.pointer(field).and_then(serde_json::Value::as_f64);
        Ok(Some(rate.context("fio says no bandwidth")? / 1e9))
    }
}

/// A line for each of the baselines.
fn compared(way: &str, rate: f64, baselines: Vec<(String, f64)>) -> Vec<Line> {
    let lines = baselines.into_iter().map(|(baseline, plain)| Line {
        what: format!(
            "{way} disk, blocks of 2 MiB with checksums (this machine's disk, host backend)"
        ),
        measured: format!("{rate:.2} GB/s"),
        baseline: format!("{baseline}: {plain:.2} GB/s"),
        ratio: Some(rate / plain),
        budget: "none".to_owned(),
        kept: None,
    });
    lines.collect()
}
