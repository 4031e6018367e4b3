//! Measures the time from a donor's demand until the donor owns its bytes again. Donor and borrower are real, and every
//! slab is mapped. It is measured idle, and while two threads copy out of the slabs without a pause. The memory of the
//! host backend is sparse: 16 GiB are offered, leased and mapped, but only blocks that were stored have pages.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use swiftcache_client::{
    cache::Borrower,
    device::DeviceLayer,
    donor::{Donor, DonorConfig},
};
use swiftcache_tests::{
    engine::{self, Engine, POOL, eventually},
    node::Node,
    rescue,
};

use crate::report::{Latencies, Line, time};

const MIB: u64 = 1 << 20;
/// The budget for any number of bytes.
const BUDGET: Duration = Duration::from_millis(5);
/// The longest a round may take before the bench gives up.
const LIMIT: Duration = Duration::from_secs(60);
/// Blocks that each round stores, and that the copy load loads again and again.
const STORED: u32 = 96;

/// Label, bytes in total, bytes of a slab.
const SIZES: [(&str, u64, u64); 3] = [
    ("64 MiB", 64 * MIB, 64 * MIB),
    ("1 GiB", 1024 * MIB, 256 * MIB),
    ("16 GiB", 16 * 1024 * MIB, 1024 * MIB),
];

pub(crate) fn run(rounds: u32) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (label, bytes, slab_bytes) in SIZES {
        let idle = demand(bytes, slab_bytes, rounds, false)?;
        let busy = demand(bytes, slab_bytes, rounds, true)?;
        for (load, measured) in [("idle", &idle), ("under full copy load", &busy)] {
            lines.push(Line {
                what: format!("demand until the donor owns {label} again, {load}, p99 of {rounds} (host backend, sparse)"),
                measured: time(measured.at(0.99)),
                baseline: format!("idle, median: {}", time(idle.at(0.5))),
                ratio: Some(measured.at(0.99).as_secs_f64() / idle.at(0.5).as_secs_f64()),
                budget: format!("≤ {}", time(BUDGET)),
                kept: Some(measured.at(0.99) <= BUDGET),
            });
        }
    }
    lines.push(surviving()?);
    Ok(lines)
}

fn demand(bytes: u64, slab_bytes: u64, rounds: u32, load: bool) -> Result<Latencies> {
    let node = crate::start()?;
    let layer = node.layer()?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes,
        drain: Duration::from_secs(5),
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, Arc::clone(&layer), config)?;
    let mut config = engine::config(node.device(0), 1);
    config.max_leased_bytes = bytes;
    config.lease_step_bytes = bytes;
    let engine = Engine::new(Some(node.session("engine")?), Arc::clone(&layer), config)?;
    let copies = load
        .then(|| Copies::start(&engine.borrower, layer.as_ref()))
        .transpose()?;
    let sequence: Vec<u32> = (0..STORED).collect();
    let mut latencies = Latencies::new()?;
    for round in 1..=rounds {
        ensure!(donor.grow(bytes)? == bytes, "the device has too little HBM");
        eventually("the lease", || Ok(engine.borrower.reserve(bytes) == bytes))?;
        engine.store(&sequence)?;
        let began = Instant::now();
        ensure!(donor.shrink(bytes)? == bytes);
        ensure!(donor.wait_returned(LIMIT), "the memory never came back");
        latencies.add(began.elapsed());
        ensure!(donor.status().returned == u64::from(round) * (bytes / slab_bytes));
    }
    drop(copies);
    Ok(latencies)
}

/// Threads that load the stored blocks again and again.
struct Copies {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Copies {
    fn start(borrower: &Arc<Borrower>, layer: &dyn DeviceLayer) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for _ in 0..2 {
            let engine = Engine::over(Arc::clone(borrower), layer)?;
            let its_stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || {
                let sequence: Vec<u32> = (0..STORED).collect();
                let blocks: Vec<u32> = (POOL - STORED..POOL).collect();
                while !its_stop.load(Ordering::Relaxed) {
                    let hit = engine.lookup(&sequence);
                    let blocks = &blocks[..hit.blocks() as usize];
                    drop(engine.borrower.load(&hit, blocks, engine.kv()).finish());
                }
            }));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has already printed its message.
            let _ = thread.join();
        }
    }
}

/// The share of the requests' hits that remains when every slab is revoked, with and without moving blocks.
fn surviving() -> Result<Line> {
    let rate = |move_blocks| -> Result<f64> {
        let found = rescue::found_after_revocation(move_blocks)?;
        let weighed = |blocks: &dyn Fn(u32) -> u32| -> f64 {
            let all = (0..rescue::CONVERSATIONS).map(|n| rescue::asked(n) * blocks(n));
            f64::from(all.sum::<u32>())
        };
        let before = weighed(&|_| rescue::BLOCKS);
        Ok(weighed(&|n| found[n as usize]) / before)
    };
    let (moved, dropped) = (rate(true)?, rate(false)?);
    Ok(Line {
        what: "hits that survive the revocation of every slab; room elsewhere for a quarter of the blocks, half of the \
               hits (host backend)"
            .to_owned(),
        measured: format!("{:.0} %", moved * 100.0),
        baseline: format!("dropped at once: {:.0} %", dropped * 100.0),
        ratio: None,
        budget: String::new(),
        kept: None,
    })
}

/// A donor and an engine that has leased all of the donor's 64 MiB, on `node`.
pub(crate) fn reading(node: &Node) -> Result<(Donor, Engine)> {
    let layer = node.layer()?;
    let bytes = 64 * MIB;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: bytes,
        drain: Duration::from_secs(5),
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, Arc::clone(&layer), config)?;
    ensure!(donor.grow(bytes)? == bytes);
    let mut config = engine::config(node.device(0), 1);
    config.max_leased_bytes = bytes;
    config.lease_step_bytes = bytes;
    let engine = Engine::new(Some(node.session("engine")?), layer, config)?;
    eventually("the lease", || Ok(engine.borrower.reserve(bytes) == bytes))?;
    Ok((donor, engine))
}
