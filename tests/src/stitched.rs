//! An engine in a stitched pool, every byte of which can be checked, and a donor that overwrites what it gets back.

#![allow(
    unsafe_code,
    reason = "an engine gives its word on when it touches its pool; this fixture keeps it"
)]

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use swiftcache_client::{
    device::{CopyStream, DeviceLayer, EngineWord, Memory, StepEnd},
    session::{Observer, OfferedRegion, Session, WithdrawWhat},
    stream::{LaidOut, StreamConfig, StreamPool, Tensor},
};
use swiftcache_proto::domain::{AllocationId, DeviceUuid, HandleKind, RegionId};

use crate::{PATIENCE, engine::eventually};

/// The default namespace of stitched pools.
pub const NAMESPACE: &str = "an engine under test/stream";
/// What a donor writes into memory that it has got back.
const POISON: u8 = 0xff;

/// Settings for a pool of `units` units of `unit_bytes`.
pub fn config(device: DeviceUuid, units: u64, unit_bytes: u64) -> StreamConfig {
    let mut config = StreamConfig::new(device, NAMESPACE, units * unit_bytes);
    config.unit_bytes = Some(unit_bytes);
    config.patience = PATIENCE;
    config
}

/// An engine that writes all of its pool in each step, and reads it in the next one.
pub struct Stitched {
    /// Its pool.
    pub pool: Arc<StreamPool>,
    stream: Arc<dyn CopyStream>,
    tensors: Vec<(LaidOut, Memory)>,
    /// What was written last. 0: nothing, all bytes are zero.
    version: u64,
    buffer: Vec<u8>,
}

impl fmt::Debug for Stitched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stitched({:?}, version {})", self.pool, self.version)
    }
}

impl Stitched {
    /// Opens a pool, and lays tensors out that have one granule of local memory, and so many units each.
    ///
    /// # Errors
    /// When the pool cannot be had.
    pub fn new(
        session: Session,
        layer: &Arc<dyn DeviceLayer>,
        config: StreamConfig,
        units: &[u32],
    ) -> Result<Self> {
        let pool = StreamPool::open(session, Arc::clone(layer), config)?;
        Self::over(pool, layer, units)
    }

    /// Lays tensors out in a pool.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn over(pool: StreamPool, layer: &Arc<dyn DeviceLayer>, units: &[u32]) -> Result<Self> {
        let local = pool.granularity()?;
        let tensors: Vec<Tensor> = units
            .iter()
            .map(|units| Tensor {
                bytes: local + u64::from(*units) * pool.unit_bytes(),
                units: *units,
            })
            .collect();
        // SAFETY: all that touches the tensors are the copies of `step`, each of which is over when its call returns.
        let laid_out = pool.lay_out(&tensors, unsafe { EngineWord::given() })?;
        let steps = pool.steps().context("it is laid out")?;
        let base = steps.space().address();
        let tensors = laid_out.into_iter().map(|its| {
            let memory = steps.memory(its.address - base, its.bytes)?;
            Ok((its, memory))
        });
        let most = units.iter().max().copied().unwrap_or(0);
        Ok(Self {
            tensors: tensors.collect::<Result<_>>()?,
            stream: layer.stream(pool.device())?,
            version: 0,
            buffer: vec![0; (local + u64::from(most) * pool.unit_bytes()) as usize],
            pool: Arc::new(pool),
        })
    }

    /// A step: checks every byte that the last one wrote, and writes all anew. Returns how many units moved before it.
    ///
    /// # Errors
    /// When a byte is wrong, or the pool is lost.
    pub fn step(&mut self) -> Result<u32> {
        let moved = self.pool.begin_step()?;
        let outcome = self.check_and_write();
        self.pool.end_step(StepEnd::Over)?;
        outcome.map(|()| moved)
    }

    /// Steps until `holds`.
    ///
    /// # Errors
    /// When a byte is wrong, or it never holds.
    pub fn step_until(
        &mut self,
        what: &str,
        mut holds: impl FnMut(&StreamPool) -> Result<bool>,
    ) -> Result<()> {
        eventually(what, || {
            self.step()?;
            holds(&self.pool)
        })
    }

    fn check_and_write(&mut self) -> Result<()> {
        let next = self.version + 1;
        for (number, (its, memory)) in self.tensors.iter().enumerate() {
            let bytes = &mut self.buffer[..its.bytes as usize];
            self.stream.read(memory, 0, bytes)?;
            if let Some(wrong) = first_wrong(bytes, number, self.version) {
                let local = its.local_bytes as usize;
                let unit = (wrong.checked_sub(local))
                    .map(|behind| behind / self.pool.unit_bytes() as usize);
                bail!(
                    "byte {wrong} of tensor {number} (unit {unit:?} of it) is {:#x}, after {} steps; homes {:?}",
                    bytes[wrong],
                    self.version,
                    self.pool.homes()
                );
            }
            fill(bytes, number, next);
            self.stream.write(memory, 0, bytes)?;
        }
        self.version = next;
        Ok(())
    }
}

fn word(tensor: usize, version: u64, index: usize) -> u64 {
    if version == 0 {
        return 0;
    }
    let seed = version << 40 | (tensor as u64) << 32 | index as u64;
    let mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

fn fill(bytes: &mut [u8], tensor: usize, version: u64) {
    for (index, chunk) in bytes.chunks_mut(8).enumerate() {
        chunk.copy_from_slice(&word(tensor, version, index).to_le_bytes()[..chunk.len()]);
    }
}

fn first_wrong(bytes: &[u8], tensor: usize, version: u64) -> Option<usize> {
    let mut chunks = bytes.chunks(8).enumerate();
    let wrong = chunks.find(|(index, chunk)| {
        **chunk != word(tensor, version, *index).to_le_bytes()[..chunk.len()]
    });
    wrong.map(|(index, _)| index * 8)
}

/// A donor of this process, which fills memory with 0xff the moment that it is its own again.
pub struct Poisoner {
    session: Session,
    layer: Arc<dyn DeviceLayer>,
    device: DeviceUuid,
    slab_bytes: u64,
    lent: Arc<Lent>,
}

impl fmt::Debug for Poisoner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Poisoner({})", self.device)
    }
}

struct Lent {
    its: Weak<Self>,
    stream: Arc<dyn CopyStream>,
    /// In the order in which they were offered.
    regions: Mutex<Vec<(RegionId, Memory)>>,
    /// What has come back, and is overwritten.
    back: Mutex<Vec<Memory>>,
}

impl Observer for Lent {
    fn regions(&self) -> Vec<RegionId> {
        let regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.iter().map(|(region, _)| *region).collect()
    }

    fn returned(&self, region: RegionId) {
        // A write may have to wait for a copy that is held, and this is the session's thread.
        let its = self.its.upgrade();
        thread::spawn(move || its.map(|its| its.poison(region)));
    }
}

impl Lent {
    /// Overwrites a slab, which is out until then.
    fn poison(&self, region: RegionId) {
        let regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let found = regions.iter().find(|(known, _)| *known == region);
        let memory = found.map(|(_, memory)| memory.clone());
        drop(regions);
        let Some(memory) = memory else {
            return;
        };
        let poison = vec![POISON; memory.bytes() as usize];
        // A write that fails leaves the bytes as they are, which nobody else may see either.
        let _ = self.stream.write(&memory, 0, &poison);
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.retain(|(known, _)| *known != region);
        drop(regions);
        let mut back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        back.push(memory);
    }
}

impl Poisoner {
    /// A donor of slabs of this size, which has offered nothing yet.
    ///
    /// # Errors
    /// When the device is unknown.
    pub fn new(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        device: DeviceUuid,
        slab_bytes: u64,
    ) -> Result<Self> {
        let stream = layer.stream(&device)?;
        let lent = Arc::new_cyclic(|its| Lent {
            its: Weak::clone(its),
            stream,
            regions: Mutex::default(),
            back: Mutex::default(),
        });
        let observer: Arc<dyn Observer> = Arc::clone(&lent) as _;
        session.observe(&observer);
        Ok(Self {
            session,
            layer,
            device,
            slab_bytes,
            lent,
        })
    }

    /// Offers so many more slabs.
    ///
    /// # Errors
    /// When the broker does not take them.
    pub fn offer(&self, slabs: u64) -> Result<()> {
        for _ in 0..slabs {
            let kind = HandleKind::PosixFd;
            let memory = (self.layer).allocate(&self.device, self.slab_bytes, kind)?;
            let export = self.layer.export(&memory)?;
            let region = RegionId(rand::rng().random());
            let mut regions = self
                .lent
                .regions
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            regions.push((region, memory));
            drop(regions);
            let offered = OfferedRegion {
                region,
                device: self.device.clone(),
                allocation: AllocationId(rand::rng().random()),
                offset: 0,
                bytes: self.slab_bytes,
                slab_bytes: self.slab_bytes,
                shared: false,
                elastic: false,
            };
            (self.session)
                .offer(offered, &export, self.session.epoch())
                .wait()?;
        }
        Ok(())
    }

    /// Slabs that are lent or on offer.
    pub fn out(&self) -> usize {
        let regions = self
            .lent
            .regions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        regions.len()
    }

    /// Asks for one slab back, the one that was offered first of those that are out.
    ///
    /// # Errors
    /// When nothing is out, or the broker does not take it.
    pub fn ask_back_one(&self) -> Result<()> {
        let regions = self
            .lent
            .regions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let first = regions
            .first()
            .map(|(region, _)| *region)
            .context("nothing is out")?;
        drop(regions);
        self.ask_back(vec![first])
    }

    /// Asks for all slabs back.
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn ask_back_all(&self) -> Result<()> {
        self.ask_back(self.lent.regions())
    }

    fn ask_back(&self, regions: Vec<RegionId>) -> Result<()> {
        ensure!(!regions.is_empty(), "nothing is out");
        let what = WithdrawWhat::Regions(regions);
        self.session.withdraw(what, PATIENCE).wait()?;
        Ok(())
    }

    /// Waits until only so many slabs are out.
    ///
    /// # Errors
    /// When they do not come back.
    pub fn wait_out(&self, slabs: usize) -> Result<()> {
        eventually("slabs to come back", || Ok(self.out() <= slabs))
    }
}
