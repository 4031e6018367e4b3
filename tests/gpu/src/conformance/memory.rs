//! Devices and allocations.

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{DeviceError, Piece};
use swiftcache_proto::domain::{DeviceUuid, LinkKind};

use crate::{pattern, subject::Subject};

const MIB: u64 = 1 << 20;

pub(super) fn devices(subject: &Subject) -> Result<()> {
    let layer = &subject.layer;
    let device = subject.device()?;
    ensure!(layer.devices().iter().all(|device| device.hbm_bytes > 0));
    ensure!(layer.link_kind(&device, &device) == LinkKind::SameDevice);
    let unknown: DeviceUuid = "GPU-nowhere".parse().map_err(anyhow::Error::msg)?;
    let kind = *layer.handle_kinds().first().context("no handle kind")?;
    ensure!(layer.link_kind(&device, &unknown) == LinkKind::Host);
    let refusals = [
        layer.hbm(&unknown).err(),
        layer.allocate(&unknown, 1, kind).err(),
        layer.allocate_host(&unknown, 1).err(),
        layer.stream(&unknown).err(),
    ];
    for error in refusals {
        let error = error.context("an unknown device was accepted")?;
        ensure!(
            matches!(error, DeviceError::UnknownDevice { .. }),
            "{error}"
        );
    }
    Ok(())
}

pub(super) fn zeroed_and_counted(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let stream = subject.stream()?;
    for &kind in layer.handle_kinds() {
        let before = layer.hbm(&device)?;
        let bytes = 64 * MIB;
        let memory = layer.allocate(&device, bytes, kind)?;
        ensure!(memory.bytes() == bytes && *memory.device() == device);
        let during = layer.hbm(&device)?;
        ensure!(during.total == before.total);
        ensure!(
            during.free + bytes <= before.free,
            "{during:?} after {before:?}"
        );
        let mut found = vec![1; bytes as usize];
        stream.read(&memory, 0, &mut found)?;
        ensure!(
            found.iter().all(|byte| *byte == 0),
            "{kind:?} memory is not zeroed"
        );
        // Memory that was freed is zeroed when it is allocated again.
        pattern::write(&*stream, &memory, 0, bytes, 1)?;
        drop(memory);
        let memory = layer.allocate(&device, bytes, kind)?;
        stream.read(&memory, 0, &mut found)?;
        ensure!(
            found.iter().all(|byte| *byte == 0),
            "{kind:?} memory is not zeroed"
        );
        drop(memory);
        ensure!(layer.hbm(&device)?.free > during.free, "nothing was freed");
    }
    Ok(())
}

pub(super) fn out_of_memory(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let total = layer.hbm(&device)?.total;
    for &kind in layer.handle_kinds() {
        for bytes in [total + MIB, u64::MAX, 0] {
            let error = layer.allocate(&device, bytes, kind).err();
            let error = error.with_context(|| format!("{bytes} bytes were granted"))?;
            ensure!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
        }
        let memory = layer.allocate(&device, MIB, kind)?;
        let stream = subject.stream()?;
        pattern::write(&*stream, &memory, 0, MIB, 2)?;
        pattern::verify(&*stream, &memory, 0, MIB, 2)?;
    }
    Ok(())
}

pub(super) fn host_memory(subject: &Subject) -> Result<()> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let kind = *layer.handle_kinds().first().context("no handle kind")?;
    let host = layer.allocate_host(&device, MIB)?;
    let back = layer.allocate_host(&device, MIB)?;
    let memory = layer.allocate(&device, MIB, kind)?;
    let stream = subject.stream()?;
    let mut found = vec![1; MIB as usize];
    stream.read(&host, 0, &mut found)?;
    ensure!(
        found.iter().all(|byte| *byte == 0),
        "host memory is not zeroed"
    );
    pattern::write(&*stream, &host, 0, MIB, 3)?;
    let all = [Piece {
        from: 0,
        to: 0,
        bytes: MIB,
    }];
    stream.copy(&host, &memory, &all)?;
    stream.copy(&memory, &back, &all)?;
    pattern::verify(&*stream, &back, 0, MIB, 3)?;
    let error = layer
        .export(&host)
        .err()
        .context("host memory was exported")?;
    ensure!(matches!(error, DeviceError::Handle { .. }), "{error}");
    Ok(())
}
