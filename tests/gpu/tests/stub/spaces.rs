//! Every call of the driver fails in turn while pieces of an address space are replaced.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{
    AddressSpace, Change, CopyStream, DeviceLayer, Left, Memory, cuda::CudaLayer,
};
use swiftcache_gpu_tests::{engine::still, pattern};
use swiftcache_proto::domain::HandleKind;
use swiftcache_tests::stub::{Stub, alone};

const UNIT: u64 = 2 << 20;
const PLACES: u64 = 3;
/// What a replacement calls.
const CALLS: [&str; 3] = ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"];

struct Bench {
    layer: CudaLayer,
    stream: Arc<dyn CopyStream>,
}

impl Bench {
    fn new() -> Result<Self> {
        let layer = CudaLayer::open()?;
        let device = layer.devices().first().context("no device")?.uuid.clone();
        let stream = layer.stream(&device)?;
        Ok(Self { layer, stream })
    }

    /// A memory with a pattern: of HBM, or of the host.
    fn memory(&self, seed: u64) -> Result<Memory> {
        let device = self.stream.device();
        let spaces = self.layer.address_spaces().context("no spaces")?;
        let memory = match seed % 2 {
            0 => spaces.allocate_host_piece(device, UNIT)?,
            _ => self.layer.allocate(device, UNIT, HandleKind::PosixFd)?,
        };
        pattern::write(&*self.stream, &memory, 0, UNIT, seed)?;
        Ok(memory)
    }

    /// A space with three pieces, and what is to take their places: patterns 1, 2, 3 and 11, 12, 13.
    fn space(&self) -> Result<(Arc<AddressSpace>, Vec<Change>)> {
        let spaces = self.layer.address_spaces().context("no spaces")?;
        let space = spaces.reserve(self.stream.device(), PLACES * UNIT)?;
        let mut changes = Vec::new();
        for place in 0..PLACES {
            space.map(place * UNIT, &self.memory(place + 1)?)?;
            changes.push(Change {
                offset: place * UNIT,
                memory: self.memory(place + 11)?,
            });
        }
        Ok((space, changes))
    }

    /// Whether a place of the space holds this, by its bytes.
    fn holds(&self, space: &Arc<AddressSpace>, place: u64, seed: u64) -> Result<()> {
        let piece = space.memory(place * UNIT, UNIT)?;
        pattern::verify(&*self.stream, &piece, 0, UNIT, seed)
    }

    /// Checks what is told of each place.
    fn check(&self, space: &Arc<AddressSpace>, left: &[Left]) -> Result<()> {
        for (place, left) in (0..).zip(left) {
            let told = || format!("place {place} is told to be {left:?}");
            let pieces = space.pieces();
            let piece = pieces.iter().find(|piece| piece.offset == place * UNIT);
            match left {
                Left::Old => self.holds(space, place, place + 1).with_context(told)?,
                Left::New => self.holds(space, place, place + 11).with_context(told)?,
                Left::Nothing => ensure!(piece.is_none(), told()),
                Left::Closed => ensure!(piece.is_some_and(|piece| !piece.open), told()),
            }
            let given = space.memory(place * UNIT, UNIT).is_ok();
            ensure!(given == matches!(left, Left::Old | Left::New), told());
        }
        Ok(())
    }
}

#[test]
fn each_call_that_a_replacement_makes_fails_in_turn() -> Result<()> {
    let name = "spaces::each_call_that_a_replacement_makes_fails_in_turn";
    alone(name, |stub| {
        let bench = Bench::new()?;
        let mut seen = BTreeSet::new();
        let mut cases: Vec<Vec<String>> = Vec::new();
        for call in CALLS {
            for number in 1..=PLACES {
                cases.push(vec![format!("{call}=999@{number}")]);
                cases.push(vec![format!("{call}=999@{number}-")]);
                for other in CALLS.iter().filter(|other| **other != call) {
                    let first = format!("{call}=999@{number}");
                    cases.push(vec![first.clone(), format!("{other}=999@{}-", number + 1)]);
                    cases.push(vec![first, format!("{other}=999@{number}-")]);
                }
            }
        }
        for case in cases {
            let single = case.len() == 1 && !case[0].ends_with('-');
            let left = replaced(&bench, stub, &case).with_context(|| format!("{case:?}"))?;
            ensure!(!left.is_empty(), "{case:?}: nothing failed");
            let undone = left.iter().all(|left| *left == Left::Old);
            ensure!(!single || undone, "{case:?}: {left:?}");
            seen.extend(left.iter().map(|left| format!("{left:?}")));
        }
        ensure!(seen.len() == 4, "not every outcome was seen: {seen:?}");
        // The twins: without a fault everything is replaced, and a wrong word is noticed.
        ensure!(replaced(&bench, stub, &[])?.is_empty());
        let (space, _changes) = bench.space()?;
        for wrong in [Left::New, Left::Nothing, Left::Closed] {
            ensure!(bench.check(&space, &[wrong, Left::Old, Left::Old]).is_err());
        }
        bench.check(&space, &[Left::Old; PLACES as usize])
    })
}

/// Replaces all three pieces while the driver has these faults. Returns what is told to be left; nothing if it worked.
fn replaced(bench: &Bench, stub: &Stub, faults: &[String]) -> Result<Vec<Left>> {
    let (space, changes) = bench.space()?;
    let faults: Vec<_> = (faults.iter())
        .map(|fault| stub.inject(None, fault))
        .collect::<Result<_>>()?;
    let outcome = still(&space).replace(&changes);
    for fault in &faults {
        stub.lift(fault)?;
    }
    let left = match outcome {
        Ok(_) => Vec::new(),
        Err(failed) => {
            let told = failed.to_string();
            ensure!(told.contains("failed on GPU-5a5a7374"), "{told}");
            bench.check(&space, &failed.left)?;
            failed.left
        }
    };
    // Whatever is left can be put right when the driver works again.
    for (place, change) in (0..).zip(&changes) {
        let pieces = space.pieces();
        let piece = pieces.iter().find(|piece| piece.offset == change.offset);
        if bench.holds(&space, place, place + 11).is_ok() {
            continue;
        }
        if piece.is_some() {
            still(&space).unmap(change.offset)?;
        }
        space.map(change.offset, &change.memory)?;
        bench.holds(&space, place, place + 11)?;
    }
    Ok(left)
}
