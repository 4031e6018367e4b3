//! What an engine has of a stitched pool.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::{DeviceUuid, HandleKind, LinkKind};
use tracing::{info, warn};

use super::{
    config::{LaidOut, StreamConfig, Tensor},
    core::Core,
    home::{Home, UnitId},
    open::{self, Opened, spaces},
    state::Places,
    stats::StreamStats,
};
use crate::{
    Error, Result,
    device::{AddressSpace, DeviceLayer, EngineWord, Memory, StepEnd, Steps},
    latency::Latency,
    leases::LeaseThreads,
    session::Session,
    threads::Threads,
};

/// How long a step waits for a unit that is mapped nowhere.
const ADRIFT: Duration = Duration::from_secs(5);
/// How often that is tried.
const ADRIFT_NAP: Duration = Duration::from_millis(1);
/// How long closing waits for the engine's last work, and for the broker.
const CLOSING: Duration = Duration::from_secs(10);
/// What the units may cost that are placed when the pool is laid out.
const ALL: Duration = Duration::from_secs(3600);

/// A KV cache whose tensors begin in local HBM and end in leased slabs. Their addresses stay; which memory is there may change
/// between two steps of the engine. Used from any thread.
///
/// Dropping it closes it.
pub struct StreamPool {
    core: Arc<Core>,
    /// What stands in for slabs, until the pool is laid out.
    stand_ins: Mutex<Option<StandIns>>,
    threads: Mutex<Option<PoolThreads>>,
    units: u32,
}

struct StandIns {
    floor: Vec<Memory>,
    spares: Vec<Memory>,
}

struct PoolThreads {
    leasing: LeaseThreads,
    mover: Threads,
}

impl StreamPool {
    /// Leases slabs for a pool, and takes as much host memory. Blocks: until all of `stream_bytes` is leased, or the broker has
    /// nothing more to lend.
    ///
    /// The session should be the pool's alone: what cannot be mapped as a unit is not granted to it again.
    ///
    /// # Errors
    /// When the broker is not there in time or lends nothing, the backend cannot stitch, a setting does not fit, or there is no
    /// room for the host memory or the spare units. Nothing is held then.
    pub fn open(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        config: StreamConfig,
    ) -> Result<Self> {
        let Opened {
            core,
            leasing,
            floor,
            spares,
        } = open::open(session, layer, config)?;
        let units = u32::try_from(floor.len()).unwrap_or(u32::MAX);
        let pool = Self {
            stand_ins: Mutex::new(Some(StandIns { floor, spares })),
            threads: Mutex::new(Some(PoolThreads {
                leasing,
                mover: Threads::new(),
            })),
            units,
            core,
        };
        let core = Arc::clone(&pool.core);
        let started = match &mut *pool.threads.lock() {
            Some(threads) => (threads.mover).start("swiftcache-stream", move || core.move_loop()),
            None => Ok(()),
        };
        if started.is_err() {
            // Nobody else lets the leases go when the pool is dropped.
            pool.core.leases.close();
        }
        started.map(|()| pool)
    }

    /// What it was opened with.
    pub fn config(&self) -> &StreamConfig {
        &self.core.config
    }

    /// The device that computes in it.
    pub fn device(&self) -> &DeviceUuid {
        &self.core.config.device
    }

    /// The size of a unit, bytes.
    pub fn unit_bytes(&self) -> u64 {
        self.core.unit_bytes
    }

    /// How many units can be laid out: as many as slabs were leased.
    pub fn units(&self) -> u32 {
        self.units
    }

    /// Tensors' local parts are multiples of this, bytes.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn granularity(&self) -> Result<u64> {
        Ok(spaces(&*self.core.layer)?.granularity(self.device())?)
    }

    /// Lays tensors out, once: takes the local memory, reserves the addresses, and maps every unit. All bytes are zero. Slabs that
    /// no unit needs are given back.
    ///
    /// # Errors
    /// When a tensor has no local part, there are more units than there were slabs, there is no room for the local parts, or the
    /// pool is laid out or closed already. Nothing has changed then.
    pub fn lay_out(&self, tensors: &[Tensor], word: EngineWord) -> Result<Vec<LaidOut>> {
        let core = &self.core;
        let mut stand_ins = self.stand_ins.lock();
        let Some(its) = stand_ins.as_ref() else {
            let closed = core.dead.load(Ordering::Acquire);
            return Err(match closed {
                true => core.death(),
                false => Error::config("tensors", "are laid out already"),
            });
        };
        let granularity = self.granularity()?;
        let sizes = sizes(tensors, core.unit_bytes, self.units, granularity)?;
        let bytes = sizes.iter().map(|size| size.local + size.remote).sum();
        let space = spaces(&*core.layer)?.reserve(self.device(), bytes)?;
        let mut offset = 0;
        let mut offsets = Vec::new();
        let mut laid_out = Vec::with_capacity(tensors.len());
        for (size, tensor) in sizes.iter().zip(tensors) {
            self.map_local(&space, offset, size.local)?;
            laid_out.push(LaidOut {
                address: space.address() + offset,
                bytes: tensor.bytes,
                local_bytes: size.local,
            });
            offset += size.local;
            for _ in 0..tensor.units {
                space.map(offset, &its.floor[offsets.len()])?;
                offsets.push(offset);
                offset += core.unit_bytes;
            }
        }
        let steps = Steps::new(space, word);
        let StandIns { mut floor, spares } = match stand_ins.take() {
            Some(taken) => taken,
            None => return Err(core.death()),
        };
        floor.truncate(offsets.len());
        self.place(&steps, offsets, floor, spares)?;
        // From here on steps may begin.
        let _ = core.steps.set(steps);
        let mut state = core.state.lock();
        core.tell_homes(&mut state);
        core.note(&state);
        drop(state);
        core.leases.grow_soon();
        info!(namespace = %core.config.namespace, tensors = tensors.len(), units = laid_out_units(tensors), "a stitched pool is laid out");
        Ok(laid_out)
    }

    /// Takes local memory, and maps it. The space keeps it.
    fn map_local(&self, space: &AddressSpace, offset: u64, bytes: u64) -> Result<()> {
        let layer = &self.core.layer;
        let memory = layer.allocate(self.device(), bytes, HandleKind::PosixFd);
        let memory = memory.map_err(|error| {
            Error::pool(format!(
                "there is no room for {bytes} bytes of a tensor's local part: {error}"
            ))
        })?;
        Ok(space.map(offset, &memory)?)
    }

    /// Puts units into slabs, all that there is room for. From then on their bytes matter.
    fn place(
        &self,
        steps: &Arc<Steps>,
        offsets: Vec<u64>,
        floor: Vec<Memory>,
        spares: Vec<Memory>,
    ) -> Result<()> {
        let core = &self.core;
        let units = u32::try_from(offsets.len()).unwrap_or(u32::MAX);
        let mut state = core.state.lock();
        state.homes.add_units(units)?;
        state.places = Some(Places {
            offsets,
            floor,
            spares,
        });
        drop(state);
        if let Some(still) = steps.still(Duration::ZERO) {
            while core.move_units(steps, &still, ALL) > 0 {}
        }
        let mut state = core.state.lock();
        for unit in (0..units).map(UnitId) {
            state.homes.set_live(unit, true)?;
        }
        Ok(())
    }

    /// Begins a step of the engine: no unit moves before [`end_step`](Self::end_step). Steps may overlap. If units are to be moved and no
    /// step is begun, they are moved now, as many as one step may cost. Returns how many were.
    ///
    /// # Errors
    /// When the engine must not run on: it is final. No step has begun then.
    pub fn begin_step(&self) -> Result<u32> {
        let core = &self.core;
        let steps = core.steps()?;
        let began = Instant::now();
        let mut moved = 0;
        loop {
            if core.due.load(Ordering::Acquire) {
                moved += core.step();
            }
            steps.begin();
            let dead = core.dead.load(Ordering::Acquire);
            if !dead && !core.adrift.load(Ordering::Acquire) {
                return Ok(moved);
            }
            steps.end(StepEnd::Over);
            if dead {
                return Err(core.death());
            }
            if began.elapsed() >= ADRIFT {
                let why = "a unit is mapped nowhere, and the driver does not map it again";
                core.lose(&mut core.state.lock(), why);
            }
            thread::sleep(ADRIFT_NAP);
        }
    }

    /// Ends a step. `end` says when the work is over that it has queued.
    ///
    /// # Errors
    /// When none was begun.
    pub fn end_step(&self, end: StepEnd) -> Result<()> {
        match self.core.steps()?.end(end) {
            true => Ok(()),
            false => Err(Error::pool("a step ends that was not begun")),
        }
    }

    /// Its steps, once it is laid out: a [`Borrower`](crate::cache::Borrower) copies into and out of it by [`Steps::memory`].
    pub fn steps(&self) -> Option<Arc<Steps>> {
        self.core.steps.get().cloned()
    }

    /// Where each unit is, in the order in which they were laid out: 0 in a leased slab, 1 in a spare one, 2 in host memory.
    pub fn homes(&self) -> Vec<u8> {
        let state = self.core.state.lock();
        let units = state
            .places
            .as_ref()
            .map_or(0, |places| places.offsets.len());
        let homes = (0..).map(UnitId).take(units);
        homes
            .filter_map(|unit| state.homes.home(unit))
            .map(Home::code)
            .collect()
    }

    /// Grows when a unit has changed its home.
    pub fn generation(&self) -> u64 {
        self.core.generation.load(Ordering::Acquire)
    }

    /// What it has done, and where its units are.
    pub fn stats(&self) -> StreamStats {
        let core = &self.core;
        let leases = core.leases.counts();
        let state = core.state.lock();
        let laid_out = state.places.as_ref();
        let units = laid_out.map_or(self.units, |places| places.offsets.len() as u32);
        let mut by_link = [
            LinkKind::SameDevice,
            LinkKind::Nvlink,
            LinkKind::Pcie,
            LinkKind::Host,
        ]
        .map(|link| (link, 0));
        for unit in (0..laid_out.map_or(0, |_| units)).map(UnitId) {
            let link = match state.homes.home(unit) {
                Some(Home::Slab(slab)) => {
                    let leased = state.slabs.get(&slab);
                    leased.map_or(LinkKind::Host, |leased| leased.area.link)
                }
                Some(Home::Spare(_)) => LinkKind::SameDevice,
                Some(Home::Floor) | None => LinkKind::Host,
            };
            for (its, count) in &mut by_link {
                *count += u32::from(*its == link);
            }
        }
        StreamStats {
            units,
            unit_bytes: core.unit_bytes,
            homes: state.homes.counts(),
            by_link,
            leased_bytes: leases.own_bytes,
            floor_bytes: u64::from(units) * core.unit_bytes,
            connected: core.session.is_connected(),
            moved_units: state.happened.moved_units,
            failed_moves: state.happened.failed_moves,
            revocations: leases.revocations,
            refused_leases: leases.refused,
            steps: Latency::from(&state.happened.batches),
            drain: Latency::from(&leases.drain),
            acknowledge: Latency::from(&leases.acknowledge),
        }
    }

    /// Unmaps everything, and gives the leases back. The engine does not touch the tensors any more. Waits until its last work is
    /// over, ten seconds at most: then threads go on by themselves until it is, and keep the leases as long.
    pub fn close(&self) {
        let core = &self.core;
        core.dead.store(true, Ordering::Release);
        let Some(mut threads) = self.threads.lock().take() else {
            return;
        };
        if let Some(steps) = core.steps.get() {
            steps.close();
        }
        threads.leasing.stop_growing(&core.leases);
        let deadline = Instant::now() + CLOSING;
        let mut state = core.state.lock();
        state.closing = true;
        core.note(&state);
        drop(state);
        // The mover lets the leases go when nothing is mapped any more.
        let unmapped = threads.mover.join_by(deadline);
        if !unmapped || !threads.leasing.recall().join_by(deadline) {
            warn!(
                "a stitched pool is closed that may still be touched: its leases stay until it is not"
            );
        }
        drop(self.stand_ins.lock().take());
    }
}

impl Drop for StreamPool {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for StreamPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core.fmt(f)
    }
}

/// The parts of a tensor, bytes.
#[derive(Clone, Copy, Debug)]
struct Size {
    local: u64,
    remote: u64,
}

fn sizes(tensors: &[Tensor], unit: u64, most: u32, granularity: u64) -> Result<Vec<Size>> {
    if tensors.is_empty() {
        return Err(Error::config("tensors", "takes at least one"));
    }
    let mut units = 0_u64;
    let sizes = tensors.iter().enumerate().map(|(number, tensor)| {
        units += u64::from(tensor.units);
        let refuse = |problem: String| Error::config("tensors", format!("[{number}] {problem}"));
        let remote = u64::from(tensor.units) * unit;
        let local = tensor.bytes.saturating_sub(remote);
        let local = local.checked_next_multiple_of(granularity);
        match local.filter(|local| *local > 0 && tensor.bytes <= u64::MAX / 4) {
            Some(local) => Ok(Size { local, remote }),
            None => Err(refuse(format!(
                "has {} bytes, of which {} units of {unit} leave nothing local",
                tensor.bytes, tensor.units
            ))),
        }
    });
    let sizes = sizes.collect::<Result<Vec<_>>>()?;
    if units > u64::from(most) {
        let problem = format!("have {units} units; there are {most}");
        return Err(Error::config("tensors", problem));
    }
    Ok(sizes)
}

fn laid_out_units(tensors: &[Tensor]) -> u32 {
    tensors.iter().map(|tensor| tensor.units).sum()
}
