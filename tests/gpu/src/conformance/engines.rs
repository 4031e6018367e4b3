//! An engine's own memory and streams.

#![allow(
    unsafe_code,
    reason = "an engine vouches for its own pool; these checks do so in its place"
)]

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{Base, DeviceError, Export, Piece, foreign};
use swiftcache_proto::domain::{DeviceUuid, HandleKind};

use crate::{
    engine::Engine,
    pattern,
    peer::{Peer, Request},
    subject::{Backend, Subject},
};

const SIZE: u64 = 8 << 20;
const ALL: [Piece; 1] = [Piece {
    from: 0,
    to: 0,
    bytes: SIZE,
}];

pub(super) fn streams_and_memory(subject: &Subject) -> Result<()> {
    let (layer, device) = (&*subject.layer, subject.device()?);
    if !matches!(subject.backend, Backend::Cuda) {
        return Ok(()); // Only on CUDA do engines have their own streams.
    }
    let engine = Engine::start()?;
    let compute = engine.stream()?;
    let address = engine.allocate(SIZE)?;
    let pool = engine.lend_memory(layer, &device, address, SIZE)?;
    let compute_stream = engine.lend_stream(layer, &device, compute)?;
    let slab = layer.allocate(&device, SIZE, HandleKind::CudaIpc)?;
    let copies = layer.stream(&device)?;
    for round in 0..8 {
        // Compute writes a layer, its write-back waits for that, and the next compute on the pool waits for the
        // write-back.
        let byte = round + 1;
        for _ in 0..4 {
            engine.fill(compute, address, 0xff, SIZE)?;
        }
        engine.fill(compute, address, byte, SIZE)?;
        let computed = compute_stream.record()?;
        copies.wait_for(&computed)?;
        copies.copy(&pool, &slab, &ALL)?;
        let written_back = copies.record()?;
        compute_stream.wait_for(&written_back)?;
        engine.fill(compute, address, 0xee, SIZE)?;
        // The fetch of the same layer waits for compute too, and compute waits for the fetch.
        copies.wait_for(&compute_stream.record()?)?;
        copies.copy(&slab, &pool, &ALL)?;
        let fetched = copies.record()?;
        compute_stream.wait_for(&fetched)?;
        let all = compute_stream.record()?;
        all.wait()?;
        for ticket in [&computed, &written_back, &fetched] {
            ensure!(matches!(ticket.outcome(), Some(Ok(()))));
        }
        let mut found = vec![0; SIZE as usize];
        compute_stream.read(&pool, 0, &mut found)?;
        pattern::expect(&found, &vec![byte; SIZE as usize])?;
    }
    // Dropping the wrapper does not end the engine's stream, which still computes.
    drop(compute_stream);
    engine.fill(compute, address, 0x77, SIZE)?;
    engine.synchronize(compute)?;
    let mut found = vec![0; SIZE as usize];
    copies.read(&pool, 0, &mut found)?;
    pattern::expect(&found, &vec![0x77; SIZE as usize])
}

/// The same through `foreign`, which engines in other languages use.
pub(super) fn foreign_pool_and_stream(subject: &Subject) -> Result<()> {
    let (layer, device) = (&*subject.layer, subject.device()?);
    if !matches!(subject.backend, Backend::Cuda) {
        return Ok(());
    }
    let engine = Engine::start()?;
    let compute = engine.stream()?;
    let address = engine.allocate(SIZE)?;
    let owner = Arc::new(());
    let adopt = |bytes| {
        let owner = Box::new(Arc::clone(&owner));
        // SAFETY: the engine never frees what it allocated, and what it did not is refused.
        unsafe { foreign::adopt_pool(layer, &device, address, bytes, owner) }
    };
    ensure!(adopt(1 << 60).is_err() && adopt(0).is_err() && Arc::strong_count(&owner) == 1);
    let pool = adopt(SIZE)?;
    let slab = layer.allocate(&device, SIZE, HandleKind::CudaIpc)?;
    let copies = layer.stream(&device)?;
    for byte in 1..8 {
        for _ in 0..4 {
            engine.fill(compute, address, 0xff, SIZE)?;
        }
        engine.fill(compute, address, byte, SIZE)?;
        let computed = engine.mark(layer, &device, compute)?;
        copies.wait_for(&computed)?;
        copies.copy(&pool, &slab, &ALL)?;
        engine.gate(layer, &device, compute, &[copies.record()?]);
        engine.fill(compute, address, 0xee, SIZE)?;
        let computed = engine.mark(layer, &device, compute)?;
        copies.wait_for(&computed)?;
        copies.copy(&slab, &pool, &ALL)?;
        let fetched = copies.record()?;
        engine.gate(layer, &device, compute, &[fetched]);
        engine.synchronize(compute)?;
        let mut found = vec![0; SIZE as usize];
        copies.read(&pool, 0, &mut found)?;
        pattern::expect(&found, &vec![byte; SIZE as usize])?;
    }
    copies.copy(&pool, &slab, &ALL)?;
    let last = copies.record()?;
    drop(pool);
    last.wait()?;
    ensure!(
        Arc::strong_count(&owner) == 1,
        "an owner outlived the copies"
    );
    Ok(())
}

pub(super) fn pool_on_offer(subject: &Subject) -> Result<()> {
    let (layer, device) = (&*subject.layer, subject.device()?);
    if !matches!(subject.backend, Backend::Cuda) {
        return Ok(());
    }
    let engine = Engine::start()?;
    // A region inside a larger allocation. The whole allocation is exported, with the place of the region in it.
    let address = engine.allocate(4 * SIZE)?;
    let part = engine.lend_memory(layer, &device, address + SIZE, SIZE)?;
    let whole = engine.lend_memory(layer, &device, address, 4 * SIZE)?;
    let base = layer.base(&part)?;
    let expected = Base {
        offset: SIZE,
        bytes: 4 * SIZE,
    };
    ensure!(base == expected, "{base:?} is not {expected:?}");
    let stream = layer.stream(&device)?;
    pattern::write(&*stream, &whole, 0, 4 * SIZE, 1)?;
    let Export::Opaque(handle) = layer.export(&part)? else {
        anyhow::bail!("an engine's pool is exported by a legacy handle");
    };
    let mut peer = Peer::start(subject)?;
    let memory = peer.import(&device, &device, Export::Opaque(handle), base.bytes)?;
    peer.ask(Request::Verify { memory, seed: 1 })?;
    drop(part);
    pattern::verify(&*stream, &whole, 0, 4 * SIZE, 1).context("dropping a loan freed it")?;

    let beyond = engine.lend_memory(layer, &device, address + 3 * SIZE, 1 << 60);
    ensure!(beyond.is_err(), "memory that nobody allocated was adopted");
    let unknown: DeviceUuid = "GPU-nowhere".parse().map_err(anyhow::Error::msg)?;
    let error = engine.lend_memory(layer, &unknown, address, SIZE).err();
    let error = error.context("an unknown device was accepted")?;
    let unknown = matches!(
        error.downcast_ref(),
        Some(DeviceError::UnknownDevice { .. })
    );
    ensure!(unknown, "{error}");
    Ok(())
}

/// A part of an engine's pool is lent. Others use it in place, and it is zero before and after.
pub(super) fn part_of_a_pool_lent(subject: &Subject) -> Result<()> {
    let (layer, device) = (&*subject.layer, subject.device()?);
    let bytes = 4 * SIZE;
    // The engine's own memory: on CUDA an allocation of the driver, otherwise memory of the allocator.
    let (engine, tensor);
    let address = match subject.backend {
        Backend::Cuda => {
            engine = Engine::start()?;
            engine.allocate(bytes)?
        }
        Backend::Host { .. } => {
            tensor = vec![0_u8; bytes as usize + 4096];
            (tensor.as_ptr() as u64).next_multiple_of(4096)
        }
    };
    // SAFETY: the engine never frees what it allocated, and the tensor outlives the pool and the stream.
    let pool = unsafe { foreign::adopt_pool(layer, &device, address, bytes, Box::new(())) }?;
    // SAFETY: no kernel runs here, and the copies below are meant to see what others write.
    let lend =
        |pool, offset, bytes, back| unsafe { foreign::lend_pool(layer, pool, offset, bytes, back) };
    let stream = layer.stream(&device)?;
    pattern::write(&*stream, &pool, 0, bytes, 1)?;
    let mut own = vec![0; bytes as usize];
    stream.read(&pool, 0, &mut own)?;
    let zero = vec![0; SIZE as usize];
    let part = SIZE as usize..2 * SIZE as usize;
    for seed in 2..4 {
        let back = Arc::new(());
        let lent = lend(&pool, SIZE, SIZE, Box::new(Arc::clone(&back)))?;
        ensure!(lent.bytes() == SIZE);
        own[part.clone()].fill(0);
        let mut found = vec![1; bytes as usize];
        stream.read(&pool, 0, &mut found)?;
        pattern::expect(&found, &own).context("lent with what the engine had there")?;
        let base = layer.base(&lent)?;
        let mut peer = Peer::start(subject)?;
        let memory = peer.import(&device, &device, layer.export(&lent)?, base.bytes)?;
        peer.ask(Request::Fill { memory, seed })?;
        let theirs = pattern::bytes(seed, base.bytes as usize);
        let at = base.offset as usize;
        let mut found = zero.clone();
        stream.read(&pool, SIZE, &mut found)?;
        pattern::expect(&found, &theirs[at..at + SIZE as usize]).context("not in place")?;
        drop(peer);
        // On CUDA a handle opens the whole allocation, and this peer has written all of it.
        stream.read(&pool, 0, &mut own)?;
        drop(lent);
        ensure!(Arc::strong_count(&back) == 1);
        own[part.clone()].fill(0);
        let mut found = vec![1; bytes as usize];
        stream.read(&pool, 0, &mut found)?;
        pattern::expect(&found, &own).context("given back with what others left")?;
    }
    for (offset, bytes) in [(0, 0), (bytes, 1), (0, bytes + 1), (u64::MAX, 2)] {
        let refused = lend(&pool, offset, bytes, Box::new(()));
        ensure!(refused.is_err(), "{bytes} bytes at {offset} were lent");
    }
    let elsewhere = layer.allocate_host(&device, SIZE)?;
    let refused = lend(&elsewhere, 0, SIZE, Box::new(()));
    ensure!(refused.is_err(), "the layer's own memory was lent in place");
    Ok(())
}
