//! Measures how much slower a donor's own work is while a neighbour reads the donor's memory. On the host backend, both
//! use the same memory controllers and cores. So the result is about sharing memory bandwidth, and says nothing about HBM
//! or NVLink.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use swiftcache_tests::engine::{BLOCK_BYTES, POOL};

use crate::{
    ownership::reading,
    report::{Latencies, Line},
};

/// Bytes of each of the donor's own buffers: more than any cache holds.
const BYTES: usize = 64 << 20;
/// Sequences that the neighbour reads in turn, and blocks of each.
const SEQUENCES: u32 = 32;
const BLOCKS: u32 = 96;

pub(crate) fn run(rounds: u32) -> Result<Vec<Line>> {
    let node = crate::start()?;
    let (_donor, engine) = reading(&node)?;
    let sequence = |n: u32| -> Vec<u32> { (0..BLOCKS).map(|block| n * 1_000 + block).collect() };
    for n in 0..SEQUENCES {
        ensure!(engine.store(&sequence(n))?.stored == BLOCKS);
    }
    let reads = Arc::new(AtomicBool::new(false));
    let over = Arc::new(AtomicBool::new(false));
    let read_bytes = Arc::new(AtomicU64::new(0));
    let (its_reads, its_over, its_bytes) = (
        Arc::clone(&reads),
        Arc::clone(&over),
        Arc::clone(&read_bytes),
    );
    let neighbour = thread::spawn(move || {
        let blocks: Vec<u32> = (POOL - BLOCKS..POOL).collect();
        while !its_over.load(Ordering::Relaxed) {
            if !its_reads.load(Ordering::Relaxed) {
                thread::park_timeout(Duration::from_millis(1));
                continue;
            }
            for n in 0..SEQUENCES {
                let hit = engine.lookup(&sequence(n));
                let blocks = &blocks[..hit.blocks() as usize];
                drop(engine.borrower.load(&hit, blocks, engine.kv()).finish());
                its_bytes.fetch_add(u64::from(hit.blocks()) * BLOCK_BYTES, Ordering::Relaxed);
            }
        }
    });
    let (from, mut to) = (vec![1_u8; BYTES], vec![0_u8; BYTES]);
    let mut alone = Latencies::new()?;
    let mut beside = Latencies::new()?;
    let mut reading_for = Duration::ZERO;
    // Alternate between the two, so that other work on the machine slows both alike.
    for round in 0..2 * rounds {
        let reading = round % 2 == 1;
        reads.store(reading, Ordering::Relaxed);
        let before = read_bytes.load(Ordering::Relaxed);
        while reading && read_bytes.load(Ordering::Relaxed) == before {
            thread::yield_now();
        }
        let began = Instant::now();
        for _ in 0..4 {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
        }
        let took = began.elapsed();
        if reading {
            beside.add(took);
            reading_for += took;
        } else {
            alone.add(took);
        }
    }
    over.store(true, Ordering::Relaxed);
    let joined = neighbour.join();
    ensure!(joined.is_ok(), "the neighbour panicked");
    let rate = |took: Duration| 4.0 * BYTES as f64 / took.as_secs_f64() / 1e9;
    let read = read_bytes.load(Ordering::Relaxed) as f64 / reading_for.as_secs_f64() / 1e9;
    let (alone, beside) = (alone.at(0.5), beside.at(0.5));
    Ok(vec![Line {
        what: format!(
            "a donor's own memcpy while a neighbour reads from it at {read:.1} GB/s, median (host backend: shared \
             memory bandwidth)"
        ),
        measured: format!("{:.2} GB/s", rate(beside)),
        baseline: format!("alone: {:.2} GB/s", rate(alone)),
        ratio: Some(rate(beside) / rate(alone)),
        budget: String::new(),
        kept: None,
    }])
}
