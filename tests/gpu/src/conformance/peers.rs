//! Memory of another process on another device, which is reached over the link between the two.

use std::{process::Command, sync::Arc};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{
    CopyStream, DeviceLayer, Memory, Piece,
    cuda::{CudaLayer, Method},
};
use swiftcache_proto::domain::{DeviceUuid, HandleKind};

use crate::{
    pattern,
    peer::{Peer, Request},
    subject::{Backend, Subject},
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

/// A context takes more HBM than this many bytes. A mapping takes no HBM on the device whose memory it maps.
const CONTEXT_BYTES: u64 = 32 * MIB;

/// A way to copy: the size of the pieces, and a stream that copies them by one method.
struct Way {
    name: &'static str,
    piece: u64,
    stream: Arc<dyn CopyStream>,
}

/// All ways to copy on the first device, and the device layer that their streams belong to.
fn ways(subject: &Subject) -> Result<(Arc<dyn DeviceLayer>, Vec<Way>)> {
    let device = subject.device()?;
    let way = |name, piece, stream| Way {
        name,
        piece,
        stream,
    };
    if let Backend::Host { .. } = subject.backend {
        let pieces = [("an extent", SIZE), ("pieces", 16 * KIB)];
        let ways = pieces.map(|(name, piece)| Ok(way(name, piece, subject.stream()?)));
        let ways = ways.into_iter().collect::<Result<_>>()?;
        return Ok((Arc::clone(&subject.layer), ways));
    }
    let layer = CudaLayer::open()?;
    let by = |method| layer.stream_by(&device, method);
    let ways = vec![
        way("an extent", SIZE, by(Method::Pick)?),
        way("picked, 16 KiB", 16 * KIB, by(Method::Pick)?),
        way("picked, 4 MiB", 4 * MIB, by(Method::Pick)?),
        way("kernel, 16 KiB", 16 * KIB, by(Method::Kernel)?),
        way("kernel, 1 MiB", MIB, by(Method::Kernel)?),
        way("batched, 1 MiB", MIB, by(Method::Batch)?),
        way("one by one, 1 MiB", MIB, by(Method::Each)?),
    ];
    Ok((Arc::new(layer), ways))
}

/// Pieces of one size in the opposite order: the first piece of the source goes to the last place of the target.
fn mirrored(bytes: u64) -> Vec<Piece> {
    let count = SIZE / bytes;
    (0..count)
        .map(|index| Piece {
            from: index * bytes,
            to: (count - 1 - index) * bytes,
            bytes,
        })
        .collect()
}

fn neighbour(subject: &Subject) -> Result<DeviceUuid> {
    Ok(subject.neighbour()?.0)
}

pub(super) fn copies(subject: &Subject) -> Result<()> {
    let (device, owner) = (subject.device()?, neighbour(subject)?);
    let (layer, ways) = ways(subject)?;
    for &kind in layer.handle_kinds() {
        let mut peer = Peer::start(subject)?;
        let mut seed = 1;
        let (number, export) = peer.donate(&owner, SIZE, kind, Some(seed))?;
        let theirs = layer.import(&device, &owner, export, SIZE)?;
        let ours = layer.allocate(&device, SIZE, kind)?;
        for way in &ways {
            let what = format!("{kind:?}, {}", way.name);
            fetch(way, &theirs, &ours, seed).context(what.clone())?;
            seed += 1;
            write_back(way, &ours, &theirs, seed).context(what.clone())?;
            let verify = Request::Verify {
                memory: number,
                seed,
            };
            // The donor checks its own memory with its own device.
            peer.ask(verify).context(what)?;
        }
    }
    Ok(())
}

fn fetch(way: &Way, theirs: &Memory, ours: &Memory, seed: u64) -> Result<()> {
    let pieces = mirrored(way.piece);
    way.stream.zero(ours, 0, SIZE)?;
    way.stream.copy(theirs, ours, &pieces)?;
    pattern::verify_pieces(&*way.stream, ours, &pieces, seed).context("fetching")
}

/// Copies the pattern of `seed` to `theirs`. In `ours` its pieces are in the opposite order.
fn write_back(way: &Way, ours: &Memory, theirs: &Memory, seed: u64) -> Result<()> {
    let pieces = mirrored(way.piece);
    let wanted = pattern::bytes(seed, SIZE as usize);
    let blocks = wanted.chunks(way.piece as usize);
    let turned: Vec<u8> = blocks.rev().flatten().copied().collect();
    way.stream.write(ours, 0, &turned)?;
    way.stream.copy(ours, theirs, &pieces)?;
    Ok(way.stream.record()?.wait()?)
}

pub(super) fn direct(subject: &Subject) -> Result<()> {
    let (layer, device, owner) = (&subject.layer, subject.device()?, neighbour(subject)?);
    let stream = subject.stream()?;
    for &kind in layer.handle_kinds() {
        let mut peer = Peer::start(subject)?;
        let (number, export) = peer.donate(&owner, SIZE, kind, Some(1))?;
        let theirs = layer.import(&device, &owner, export, SIZE)?;
        pattern::verify(&*stream, &theirs, 0, SIZE, 1).with_context(|| format!("{kind:?}"))?;
        pattern::write(&*stream, &theirs, 0, SIZE, 2)?;
        peer.ask(Request::Verify {
            memory: number,
            seed: 2,
        })?;
        stream.zero(&theirs, 0, SIZE)?;
        stream.record()?.wait()?;
        let still = peer.ask(Request::Verify {
            memory: number,
            seed: 2,
        });
        ensure!(still.is_err(), "{kind:?}: zeroing did not reach the donor");
    }
    Ok(())
}

pub(super) fn donor_killed(subject: &Subject) -> Result<()> {
    let (device, owner) = (subject.device()?, neighbour(subject)?);
    let (layer, ways) = ways(subject)?;
    for &kind in layer.handle_kinds() {
        let mut peer = Peer::start(subject)?;
        let (_, export) = peer.donate(&owner, SIZE, kind, Some(1))?;
        let theirs = layer.import(&device, &owner, export, SIZE)?;
        let ours = layer.allocate(&device, SIZE, kind)?;
        peer.kill()?;
        let mut seed = 1;
        for way in &ways {
            let what = format!("{kind:?}, {}, its donor dead", way.name);
            fetch(way, &theirs, &ours, seed).context(what.clone())?;
            seed += 1;
            write_back(way, &ours, &theirs, seed).context(what)?;
        }
        fetch(&ways[0], &theirs, &ours, seed)?;
    }
    Ok(())
}

pub(super) fn no_context(subject: &Subject) -> Result<()> {
    if let Backend::Host { .. } = subject.backend {
        return Ok(()); // Only CUDA has contexts.
    }
    let (device, owner) = (subject.device()?, neighbour(subject)?);
    for &kind in subject.layer.handle_kinds() {
        let (mut donor, mut borrower) = (Peer::start(subject)?, Peer::start(subject)?);
        let (number, export) = donor.donate(&owner, SIZE, kind, Some(1))?;
        let verify = |memory, seed| Request::Verify { memory, seed };
        donor.ask(verify(number, 1))?;
        borrower.free_hbm(&device)?;
        let before = donor.free_hbm(&owner)?;
        let memory = borrower.import(&device, &owner, export, SIZE)?;
        borrower.ask(verify(memory, 1))?;
        borrower.ask(Request::Fill { memory, seed: 2 })?;
        donor.ask(verify(number, 2))?;
        let after = donor.free_hbm(&owner)?;
        ensure!(
            before.saturating_sub(after) < CONTEXT_BYTES,
            "{kind:?}: the importer took HBM of the donor's device: {before} bytes free before, {after} after"
        );
        // The twin: a context is noticed when there is one.
        borrower.free_hbm(&owner)?;
        let with_context = donor.free_hbm(&owner)?;
        ensure!(
            after.saturating_sub(with_context) >= CONTEXT_BYTES,
            "{kind:?}: a context on the donor's device was not noticed: {after} bytes free without, \
             {with_context} with it"
        );
    }
    Ok(())
}

pub(super) fn not_enumerated(subject: &Subject) -> Result<()> {
    if let Backend::Host { .. } = subject.backend {
        return Ok(()); // Simulated devices are not enumerated by a driver.
    }
    let (device, owner) = (subject.device()?, neighbour(subject)?);
    let peer = |sees: &DeviceUuid| {
        let mut command = Command::new(&subject.peer_program);
        command.env("CUDA_VISIBLE_DEVICES", sees.as_str());
        Peer::start_as(command, subject)
    };
    for &kind in subject.layer.handle_kinds() {
        let (mut donor, mut borrower) = (peer(&owner)?, peer(&device)?);
        ensure!(
            borrower.free_hbm(&owner).is_err() && donor.free_hbm(&device).is_err(),
            "{kind:?}: a process enumerates a device that it was not shown"
        );
        let (number, export) = donor.donate(&owner, SIZE, kind, Some(1))?;
        let imported = borrower.import(&device, &owner, export, SIZE);
        if kind != HandleKind::PosixFd {
            let error = imported.err().context("a legacy handle was opened")?;
            let told = format!("{error:#}");
            for advice in ["--handle posix-fd", "CUDA_VISIBLE_DEVICES"] {
                ensure!(told.contains(advice), "{kind:?}: {told}");
            }
            // The twin: a process that enumerates both opens it.
            let (_, export) = donor.donate(&owner, SIZE, kind, Some(1))?;
            let memory = Peer::start(subject)?.import(&device, &owner, export, SIZE)?;
            ensure!(memory > 0);
            continue;
        }
        let memory = imported.with_context(|| format!("{kind:?}"))?;
        borrower.ask(Request::Verify { memory, seed: 1 })?;
        borrower.ask(Request::Fill { memory, seed: 2 })?;
        let verify = |seed| Request::Verify {
            memory: number,
            seed,
        };
        donor.ask(verify(2))?;
        ensure!(
            donor.ask(verify(1)).is_err(),
            "the donor would verify anything"
        );
    }
    Ok(())
}
