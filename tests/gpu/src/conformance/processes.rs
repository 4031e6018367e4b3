//! Sharing memory with a second process, and the death of that process.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{DeviceError, Export, Piece};
use swiftcache_proto::domain::{Handle, HandleKind, OpaqueHandle};

use crate::{
    pattern,
    peer::{Peer, Request},
    subject::Subject,
};

const SIZE: u64 = 8 << 20;

pub(super) fn shared(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let stream = subject.stream()?;
    let mut peer = Peer::start(subject)?;
    for &kind in layer.handle_kinds() {
        let ours = layer.allocate(&device, SIZE, kind)?;
        pattern::write(&*stream, &ours, 0, SIZE, 1)?;
        let number = peer.import(&device, &device, layer.export(&ours)?, SIZE)?;
        let verify = |seed| Request::Verify {
            memory: number,
            seed,
        };
        peer.ask(verify(1))?;
        ensure!(
            peer.ask(verify(2)).is_err(),
            "the peer would verify anything"
        );
        peer.ask(Request::Fill {
            memory: number,
            seed: 2,
        })?;
        pattern::verify(&*stream, &ours, 0, SIZE, 2)?;
        peer.ask(Request::Drop { memory: number })?;
        // The same allocation can be opened again, and from another device if there is one.
        let other = subject.other_device()?;
        let number = peer.import(&other, &device, layer.export(&ours)?, SIZE)?;
        peer.ask(Request::Verify {
            memory: number,
            seed: 2,
        })?;
        peer.ask(Request::Drop { memory: number })?;
    }
    Ok(())
}

pub(super) fn wrong_size(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let mut peer = Peer::start(subject)?;
    for &kind in layer.handle_kinds() {
        for bytes in [0, SIZE * 64, u64::MAX] {
            let (_, export) = peer.donate(&device, SIZE, kind, Some(1))?;
            let error = layer.import(&device, &device, export, bytes).err();
            let error = error.with_context(|| format!("{bytes} bytes were mapped"))?;
            ensure!(matches!(error, DeviceError::Handle { .. }), "{error}");
        }
        let (_, export) = peer.donate(&device, SIZE, kind, Some(1))?;
        let whole = layer.import(&device, &device, export, SIZE)?;
        pattern::verify(&*subject.stream()?, &whole, 0, SIZE, 1)?;
    }
    Ok(())
}

pub(super) fn foreign_handles(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let file = || -> Result<OwnedFd> { Ok(std::fs::File::open("/proc/self/exe")?.into()) };
    let unsealed = || -> Result<OwnedFd> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("short", flags)?;
        rustix::fs::ftruncate(&memfd, 4096)?;
        Ok(memfd)
    };
    let foreign = [
        Export::Fd(file()?),
        Export::Fd(unsealed()?),
        Export::Opaque(Handle::CudaIpc(OpaqueHandle([0xa5; 64]))),
        Export::Opaque(Handle::Fabric(OpaqueHandle([0xa5; 64]))),
        Export::Opaque(Handle::PosixFd),
    ];
    for export in foreign {
        let what = format!("{export:?}");
        let error = layer.import(&device, &device, export, 4096).err();
        let error = error.with_context(|| format!("{what} was mapped"))?;
        ensure!(matches!(error, DeviceError::Handle { .. }), "{error}");
        ensure!(
            !error.to_string().contains("165, 165"),
            "{error} tells a secret"
        );
    }
    let impossible = [HandleKind::CudaIpc, HandleKind::PosixFd, HandleKind::Fabric]
        .into_iter()
        .filter(|kind| !layer.handle_kinds().contains(kind));
    for kind in impossible {
        let error = layer.allocate(&device, SIZE, kind).err();
        let error = error.with_context(|| format!("{kind:?} memory was granted"))?;
        ensure!(matches!(error, DeviceError::Handle { .. }), "{error}");
    }
    Ok(())
}

pub(super) fn exports(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let mut peer = Peer::start(subject)?;
    for &kind in layer.handle_kinds() {
        let (_, export) = peer.donate(&device, SIZE, kind, Some(1))?;
        let theirs = layer.import(&device, &device, export, SIZE)?;
        let error = layer.export(&theirs).err();
        let error = error.context("another process's memory was exported")?;
        ensure!(matches!(error, DeviceError::Handle { .. }), "{error}");
    }
    Ok(())
}

pub(super) fn donor_killed(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let stream = subject.stream()?;
    for &kind in layer.handle_kinds() {
        let mut peer = Peer::start(subject)?;
        let (_, export) = peer.donate(&device, SIZE, kind, Some(3))?;
        let theirs = layer.import(&device, &device, export, SIZE)?;
        peer.kill()?;
        pattern::verify(&*stream, &theirs, 0, SIZE, 3)?;
        let ours = layer.allocate(&device, SIZE, kind)?;
        let all = [Piece {
            from: 0,
            to: 0,
            bytes: SIZE,
        }];
        stream.copy(&theirs, &ours, &all)?;
        stream.zero(&theirs, 0, SIZE)?;
        pattern::verify(&*stream, &ours, 0, SIZE, 3)?;
    }
    Ok(())
}

pub(super) fn borrower_killed(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let stream = subject.stream()?;
    for &kind in layer.handle_kinds() {
        let ours = layer.allocate(&device, SIZE, kind)?;
        let mut peer = Peer::start(subject)?;
        let memory = peer.import(&device, &device, layer.export(&ours)?, SIZE)?;
        peer.ask(Request::Fill { memory, seed: 4 })?;
        peer.kill()?;
        pattern::verify(&*stream, &ours, 0, SIZE, 4)?;
        // The next borrower can map it as usual.
        let mut peer = Peer::start(subject)?;
        let memory = peer.import(&device, &device, layer.export(&ours)?, SIZE)?;
        peer.ask(Request::Verify { memory, seed: 4 })?;
    }
    Ok(())
}
