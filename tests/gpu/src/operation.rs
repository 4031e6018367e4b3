//! Single operations on the CUDA backend, each in its own process. Tests inject a fault into one of the driver's entry
//! points, and check the error message that a user would see.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use swiftcache_client::device::{
    CopyStream, DeviceLayer, Memory, Piece,
    cuda::{CudaLayer, Method},
    open_host_memory,
};
use swiftcache_proto::{domain::HandleKind, numa};

use crate::{pattern, peer::Peer, subject::Subject};

/// The operations. All of them open the driver first.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Operation {
    /// List the devices.
    Open,
    /// Allocate HBM for legacy handles.
    AllocatePlain,
    /// Allocate HBM for descriptors.
    AllocateVirtual,
    /// Allocate pinned host memory.
    AllocateHost,
    /// Ask for free HBM.
    Hbm,
    /// Create a stream.
    Stream,
    /// Export a plain allocation.
    ExportPlain,
    /// Export a virtual allocation.
    ExportVirtual,
    /// Export a plain allocation, and open it in the same process.
    ImportOwn,
    /// Open another process's plain allocation from the last device.
    ImportPlain,
    /// Open another process's virtual allocation from the last device.
    ImportVirtual,
    /// Open another process's plain allocation after its death.
    ImportFromTheDead,
    /// Map and register a donor's host memory, and copy out of it.
    ImportHost,
    /// Copy pieces one by one, and verify them.
    Copy,
    /// Copy pieces in batches, and verify them.
    Batch,
    /// Copy pieces by the gather kernel, and verify them.
    Gather,
    /// Zero a range.
    Zero,
}

const SIZE: u64 = 4 << 20;

/// Does the operation.
///
/// # Errors
/// When it fails. The error is what a user would see.
pub fn run(operation: Operation, program: PathBuf) -> Result<()> {
    let layer = CudaLayer::open()?;
    let first = layer.devices().first().context("no device")?.uuid.clone();
    let last = layer.devices().last().context("no device")?.uuid.clone();
    let allocate = |kind| layer.allocate(&first, SIZE, kind);
    match operation {
        Operation::Open => Ok(()),
        Operation::AllocatePlain => Ok(allocate(HandleKind::CudaIpc).map(|_| ())?),
        Operation::AllocateVirtual => Ok(allocate(HandleKind::PosixFd).map(|_| ())?),
        Operation::AllocateHost => Ok(layer.allocate_host(&first, SIZE).map(|_| ())?),
        Operation::Hbm => Ok(layer.hbm(&first).map(|_| ())?),
        Operation::Stream => Ok(layer.stream(&first).map(|_| ())?),
        Operation::ExportPlain => Ok(layer.export(&allocate(HandleKind::CudaIpc)?).map(|_| ())?),
        Operation::ExportVirtual => {
            Ok(layer.export(&allocate(HandleKind::PosixFd)?).map(|_| ())?)
        }
        Operation::ImportOwn => {
            let own = allocate(HandleKind::CudaIpc)?;
            let export = layer.export(&own)?;
            Ok(layer.import(&first, &first, export, SIZE).map(|_| ())?)
        }
        Operation::ImportPlain | Operation::ImportVirtual | Operation::ImportFromTheDead => {
            let kind = match operation {
                Operation::ImportVirtual => HandleKind::PosixFd,
                _ => HandleKind::CudaIpc,
            };
            let subject = Subject::cuda(program)?;
            let mut peer = Peer::start(&subject)?;
            let (_, export) = peer.donate(&first, SIZE, kind, Some(1))?;
            if matches!(operation, Operation::ImportFromTheDead) {
                peer.kill()?;
            }
            Ok(layer.import(&last, &first, export, SIZE).map(|_| ())?)
        }
        Operation::ImportHost => {
            let nodes = numa::devices();
            let node = nodes.first().context("no NUMA node has memory")?;
            let donor = open_host_memory(std::slice::from_ref(node))?;
            let donated = donor.allocate(&node.uuid, SIZE, HandleKind::PosixFd)?;
            let lent = layer.import(&first, &node.uuid, donor.export(&donated)?, SIZE)?;
            let stream = layer.stream(&first)?;
            mirror(&*stream, &lent, &allocate(HandleKind::CudaIpc)?)
        }
        Operation::Copy | Operation::Batch | Operation::Gather => {
            let method = match operation {
                Operation::Batch => Method::Batch,
                Operation::Gather => Method::Kernel,
                _ => Method::Each,
            };
            let stream = layer.stream_by(&first, method)?;
            let (from, to) = (
                allocate(HandleKind::CudaIpc)?,
                allocate(HandleKind::CudaIpc)?,
            );
            mirror(&*stream, &from, &to)
        }
        Operation::Zero => {
            let memory = allocate(HandleKind::CudaIpc)?;
            let stream = layer.stream(&first)?;
            stream.zero(&memory, 0, SIZE)?;
            Ok(stream.record()?.wait()?)
        }
    }
}

/// Copies the pieces of `from` to `to` in the opposite order, and verifies every piece.
fn mirror(stream: &dyn CopyStream, from: &Memory, to: &Memory) -> Result<()> {
    let bytes = SIZE / 64;
    let pieces: Vec<Piece> = (0..64)
        .map(|piece| Piece {
            from: piece * bytes,
            to: (63 - piece) * bytes,
            bytes,
        })
        .collect();
    for piece in &pieces {
        pattern::write(stream, from, piece.from, bytes, piece.from)?;
    }
    stream.copy(from, to, &pieces)?;
    let ticket = stream.record()?;
    ticket.wait()?;
    if !matches!(ticket.outcome(), Some(Ok(()))) {
        bail!("a ticket that was waited for is not done");
    }
    for piece in &pieces {
        pattern::verify(stream, to, piece.to, bytes, piece.from)?;
    }
    Ok(())
}
