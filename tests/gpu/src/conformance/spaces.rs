//! Address spaces: memories mapped side by side, and others put in their place.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{
    AddressSpace, AddressSpaces, Change, DeviceError, DeviceLayer, Memory, Piece,
};
use swiftcache_proto::domain::{DeviceUuid, HandleKind};

use crate::{
    engine::still,
    pattern,
    peer::{Peer, Request},
    subject::Subject,
};

fn spaces(layer: &dyn DeviceLayer) -> Result<&dyn AddressSpaces> {
    layer
        .address_spaces()
        .context("this driver has no virtual memory")
}

/// A space of the first device, and what is needed to fill it.
struct Bench<'a> {
    subject: &'a Subject,
    device: DeviceUuid,
    /// The size of every piece.
    unit: u64,
    space: Arc<AddressSpace>,
}

impl<'a> Bench<'a> {
    fn new(subject: &'a Subject, pieces: u64) -> Result<Self> {
        let device = subject.device()?;
        let spaces = spaces(&*subject.layer)?;
        let unit = spaces.granularity(&device)?.max(2 << 20);
        Ok(Self {
            subject,
            space: spaces.reserve(&device, pieces * unit)?,
            device,
            unit,
        })
    }

    fn hbm(&self) -> Result<Memory> {
        let kind = HandleKind::PosixFd;
        Ok(self.subject.layer.allocate(&self.device, self.unit, kind)?)
    }

    fn host(&self) -> Result<Memory> {
        let spaces = spaces(&*self.subject.layer)?;
        Ok(spaces.allocate_host_piece(&self.device, self.unit)?)
    }

    /// Memory of another process, which has its pattern there: on the other device if it can be reached.
    fn foreign(&self, seed: u64) -> Result<(Peer, u64, Memory)> {
        let neighbour = self.subject.neighbour().ok();
        let owner = neighbour.map_or_else(|| self.device.clone(), |(owner, _)| owner);
        let mut peer = Peer::start(self.subject)?;
        let (number, export) = peer.donate(&owner, self.unit, HandleKind::PosixFd, Some(seed))?;
        let layer = &self.subject.layer;
        let memory = layer.import(&self.device, &owner, export, self.unit)?;
        Ok((peer, number, memory))
    }

    /// The piece at a place, through the space.
    fn piece(&self, place: u64) -> Result<Memory> {
        Ok(self.space.memory(place * self.unit, self.unit)?)
    }

    fn write(&self, memory: &Memory, seed: u64) -> Result<()> {
        pattern::write(&*self.subject.stream()?, memory, 0, self.unit, seed)
    }

    fn verify(&self, memory: &Memory, seed: u64) -> Result<()> {
        pattern::verify(&*self.subject.stream()?, memory, 0, self.unit, seed)
    }
}

pub(super) fn side_by_side(subject: &Subject) -> Result<()> {
    let bench = Bench::new(subject, 6)?;
    let (unit, space) = (bench.unit, &bench.space);
    let own = [bench.hbm()?, bench.hbm()?, bench.host()?];
    let (mut donor, number, theirs) = bench.foreign(4)?;
    for (place, memory) in (0..).zip(&own) {
        space.map(place * unit, memory)?;
    }
    space.map(3 * unit, &theirs)?;
    // What is written by its own address is read by the space's, and the other way round.
    for (place, memory) in (0..).zip(&own) {
        bench.write(memory, place + 1)?;
        let piece = bench.piece(place)?;
        bench.verify(&piece, place + 1)?;
        bench.write(&piece, place + 11)?;
    }
    for (place, memory) in (0..).zip(&own) {
        bench.verify(memory, place + 11)?;
    }
    bench.verify(&bench.piece(3)?, 4)?;
    bench.write(&bench.piece(3)?, 14)?;
    donor.ask(Request::Verify {
        memory: number,
        seed: 14,
    })?;
    // Small pieces of all of them in one call, as a layer's blocks are.
    let (whole, target) = (space.memory(0, 4 * unit)?, bench.hbm()?);
    let bytes = 16 << 10;
    let pieces: Vec<Piece> = (0..unit / bytes)
        .map(|index| Piece {
            from: index % 4 * unit + index * bytes,
            to: index * bytes,
            bytes,
        })
        .collect();
    let stream = subject.stream()?;
    stream.copy(&whole, &target, &pieces)?;
    stream.record()?.wait()?;
    let (mut found, mut wanted) = (vec![0; bytes as usize], vec![0; bytes as usize]);
    for piece in &pieces {
        let source = pattern::bytes(piece.from / unit + 11, unit as usize);
        let at = (piece.from % unit) as usize;
        wanted.copy_from_slice(&source[at..at + bytes as usize]);
        stream.read(&target, piece.to, &mut found)?;
        pattern::expect(&found, &wanted)?;
    }
    // A donor's death takes nothing away, and neither does dropping the handles.
    donor.kill()?;
    drop((own, theirs, whole));
    for place in 0..4 {
        bench.verify(&bench.piece(place)?, place + 11)?;
    }
    for (offset, bytes) in [(3 * unit, 2 * unit), (4 * unit, 1), (6 * unit, 1)] {
        ensure!(
            space.memory(offset, bytes).is_err(),
            "{bytes} bytes at {offset} are not mapped"
        );
    }
    Ok(())
}

pub(super) fn moved(subject: &Subject) -> Result<()> {
    let bench = Bench::new(subject, 3)?;
    let space = &bench.space;
    let first = [bench.hbm()?, bench.hbm()?, bench.hbm()?];
    for (place, memory) in (0..).zip(&first) {
        space.map(place * bench.unit, memory)?;
        bench.write(memory, place + 1)?;
    }
    let stays = bench.piece(0)?;
    let (_donor, _, theirs) = bench.foreign(9)?;
    let homes = [bench.host()?, theirs, bench.hbm()?];
    let mut last = first[1].clone();
    for home in homes {
        // The middle one moves, and is read at the same address before and after.
        let middle = bench.piece(1)?;
        let all = [Piece {
            from: 0,
            to: 0,
            bytes: bench.unit,
        }];
        let stream = subject.stream()?;
        stream.copy(&middle, &home, &all)?;
        stream.record()?.wait()?;
        drop(stream);
        let change = Change {
            offset: bench.unit,
            memory: home.clone(),
        };
        let old = still(space).replace(&[change])?;
        ensure!(old.len() == 1 && space.pieces().len() == 3);
        bench.verify(&middle, 2)?;
        bench.verify(&home, 2)?;
        // They are two memories: what is written now is not in the old one.
        bench.write(&middle, 7)?;
        bench.verify(&last, 2)?;
        bench.write(&middle, 2)?;
        last = home;
    }
    // Two at once change places with fresh ones, and the first is in nobody's way.
    let fresh = [bench.hbm()?, bench.host()?];
    for (place, memory) in (1..).zip(&fresh) {
        bench.write(memory, place + 20)?;
    }
    let changes = [1, 2].map(|place| Change {
        offset: place * bench.unit,
        memory: fresh[place as usize - 1].clone(),
    });
    let old = still(space).replace(&changes)?;
    bench.verify(&old[0], 2)?;
    bench.verify(&old[1], 3)?;
    bench.verify(&stays, 1)?;
    bench.verify(&bench.piece(1)?, 21)?;
    bench.verify(&bench.piece(2)?, 22)?;
    let unmapped = still(space).unmap(0)?;
    bench.verify(&unmapped, 1)?;
    ensure!(bench.piece(0).is_err(), "nothing is mapped there any more");
    Ok(())
}

pub(super) fn refused(subject: &Subject) -> Result<()> {
    let bench = Bench::new(subject, 2)?;
    let (unit, space, layer) = (bench.unit, &bench.space, &subject.layer);
    for bytes in [0, unit + 1] {
        let spaces = spaces(&**layer)?;
        ensure!(spaces.reserve(&bench.device, bytes).is_err());
        ensure!(spaces.allocate_host_piece(&bench.device, bytes).is_err());
    }
    let mapped = bench.hbm()?;
    space.map(0, &mapped)?;
    bench.write(&mapped, 1)?;
    let mut odd = vec![
        (0, bench.hbm()?, "taken"),
        (unit, mapped.clone(), "mapped already"),
        (unit + 1, bench.hbm()?, "odd"),
        (2 * unit, bench.hbm()?, "outside"),
        (
            unit,
            layer.allocate_host(&bench.device, unit)?,
            "plain host memory",
        ),
        (unit, space.memory(0, unit)?, "memory of the space itself"),
    ];
    if layer.handle_kinds().contains(&HandleKind::CudaIpc) {
        let plain = layer.allocate(&bench.device, unit, HandleKind::CudaIpc)?;
        odd.push((unit, plain, "plain memory"));
    }
    for (offset, memory, what) in &odd {
        let error = space.map(*offset, memory).err();
        error.with_context(|| format!("{what} was mapped"))?;
    }
    ensure!(space.pieces().len() == 1);
    bench.verify(&bench.piece(0)?, 1)?;
    let of_space = bench.piece(0)?;
    ensure!(layer.export(&of_space).is_err(), "a space was exported");
    let unknown = "GPU-nowhere".parse().map_err(anyhow::Error::msg)?;
    let error = spaces(&**layer)?.reserve(&unknown, unit).err();
    ensure!(matches!(error, Some(DeviceError::UnknownDevice { .. })));
    Ok(())
}

pub(super) fn given_back(subject: &Subject) -> Result<()> {
    let bench = Bench::new(subject, 8)?;
    let free = || -> Result<u64> { Ok(subject.layer.hbm(&bench.device)?.free) };
    for place in 0..8 {
        bench.space.map(place * bench.unit, &bench.hbm()?)?;
    }
    let during = free()?;
    let memory = bench.piece(7)?;
    bench.write(&memory, 1)?;
    drop(still(&bench.space).unmap(0)?);
    ensure!(free()? > during, "an unmapped piece was not freed");
    bench.verify(&memory, 1)?;
    let (layer, device) = (Arc::clone(&subject.layer), bench.device.clone());
    drop(bench);
    let kept = layer.hbm(&device)?.free;
    pattern::verify(&*subject.stream()?, &memory, 0, memory.bytes(), 1)?;
    drop(memory);
    ensure!(layer.hbm(&device)?.free > kept, "the pieces were not freed");
    Ok(())
}
