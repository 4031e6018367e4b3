//! An engine captures a graph, and SwiftCache's calls must not spoil the capture.

#![allow(
    unsafe_code,
    reason = "an engine vouches for its own pool; these checks do so in its place"
)]

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use swiftcache_client::device::{Piece, foreign};
use swiftcache_proto::domain::HandleKind;

use crate::{
    engine::{Engine, THREAD_LOCAL},
    pattern,
    peer::Peer,
    subject::{Backend, Subject},
};

const SIZE: u64 = 8 << 20;

/// A thread captures in global mode. Meanwhile, this thread and another one do everything that a cache does.
pub(super) fn captured_while_others_work(subject: &Subject) -> Result<()> {
    if !matches!(subject.backend, Backend::Cuda) {
        return Ok(()); // Only CUDA has graphs.
    }
    let (layer, device) = (&*subject.layer, subject.device()?);
    let engine = Engine::start()?;
    let compute = engine.stream()?;
    let address = engine.allocate(SIZE)?;
    let pool = engine.lend_memory(layer, &device, address, SIZE)?;
    let reads = layer.stream(&device)?;
    pattern::write(&*reads, &pool, 0, SIZE, 1)?;
    let lent = engine.allocate(SIZE)?;

    let usual = engine.exchange_capture_mode(THREAD_LOCAL)?;
    engine.begin_capture(compute)?;
    engine.fill(compute, address, 2, SIZE)?;
    let elsewhere = thread::scope(|scope| {
        let worker = scope.spawn(|| work(subject, lent));
        worker.join().map_err(|_| anyhow!("a thread panicked"))?
    });
    let here = work(subject, lent);
    let marked = engine.mark(layer, &device, compute);
    reads.zero(&pool, 0, 0)?;
    let ticket = reads.record()?;
    engine.gate(layer, &device, compute, std::slice::from_ref(&ticket));
    let passed = ticket.outcome();
    let filled = engine.fill(compute, address, 3, SIZE / 2);
    let graph = (engine.end_capture(compute)).context("the engine's capture was spoiled")?;
    filled?;
    elsewhere.context("on another thread")?;
    here.context("on the thread that captures")?;

    ensure!(
        engine.exchange_capture_mode(usual)? == THREAD_LOCAL,
        "the thread that captures was given another mode"
    );
    let refused = marked.err().context("a captured stream was marked")?;
    ensure!(refused.to_string().contains("CUDA graph"), "{refused}");
    ensure!(
        matches!(passed, Some(Ok(()))),
        "nobody waited for the ticket"
    );
    pattern::verify(&*reads, &pool, 0, SIZE, 1).context("captured work ran before its launch")?;
    for _ in 0..2 {
        reads.zero(&pool, 0, SIZE)?;
        let zeroed = reads.record()?;
        engine.gate(layer, &device, compute, &[zeroed]);
        engine.launch(graph, compute)?;
        let computed = engine.mark(layer, &device, compute)?;
        computed.wait()?;
        let mut found = vec![0; SIZE as usize];
        reads.read(&pool, 0, &mut found)?;
        let half = SIZE as usize / 2;
        let wanted = [vec![3; half], vec![2; half]].concat();
        pattern::expect(&found, &wanted).context("what the graph computed")?;
    }
    a_call_in_the_common_mode_spoils_it(&engine)
}

/// The twin of this check: the driver does forbid such calls to threads that are not relaxed.
fn a_call_in_the_common_mode_spoils_it(engine: &Engine) -> Result<()> {
    let compute = engine.stream()?;
    engine.begin_capture(compute)?;
    let allocated = thread::scope(|scope| {
        let worker = scope.spawn(|| {
            engine.enter()?;
            engine.allocate(SIZE)
        });
        worker.join().map_err(|_| anyhow!("a thread panicked"))?
    });
    let ended = engine.end_capture(compute);
    ensure!(
        allocated.is_err() && ended.is_err(),
        "this driver lets any thread allocate during a capture, so nothing was shown: {allocated:?}, {ended:?}"
    );
    engine.synchronize(compute)
}

/// Does what a cache does: maps exported memory, copies, polls, waits, lends, and drops everything.
fn work(subject: &Subject, lent: u64) -> Result<()> {
    let (layer, device) = (&*subject.layer, subject.device()?);
    let owner = subject.other_device()?;
    let mut peer = Peer::start(subject)?;
    for &kind in layer.handle_kinds() {
        let (_, export) = peer.donate(&owner, SIZE, kind, Some(7))?;
        let theirs = layer.import(&device, &owner, export, SIZE)?;
        let ours = layer.allocate(&device, SIZE, kind)?;
        let stream = layer.stream(&device)?;
        let small: Vec<Piece> = (0..64)
            .map(|block| Piece {
                from: block * SIZE / 64,
                to: block * SIZE / 64,
                bytes: SIZE / 128,
            })
            .collect();
        stream.copy(&theirs, &ours, &small)?;
        let ticket = stream.record()?;
        while !ticket.is_over() {
            thread::yield_now();
        }
        stream.copy(
            &theirs,
            &ours,
            &[Piece {
                from: 0,
                to: 0,
                bytes: SIZE,
            }],
        )?;
        stream.record()?.wait()?;
        pattern::verify(&*stream, &ours, 0, SIZE, 7)?;
        layer.export(&ours)?;
    }
    layer.allocate_host(&device, SIZE)?;
    layer.hbm(&device)?;
    ensure!(layer.handle_kinds().contains(&HandleKind::CudaIpc));
    // SAFETY: the engine never frees what it allocated.
    let pool = unsafe { foreign::adopt_pool(layer, &device, lent, SIZE, Box::new(())) }?;
    // SAFETY: and it does nothing with this part of it.
    unsafe { foreign::lend_pool(layer, &pool, 0, SIZE, Box::new(())) }?;
    Ok(())
}
