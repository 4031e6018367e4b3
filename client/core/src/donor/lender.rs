//! An engine's pool on offer, part by part.

use std::{fmt, sync::Arc, time::Duration, time::Instant};

use parking_lot::Mutex;
use rand::Rng;
use swiftcache_proto::{
    convert::SLAB_BYTES,
    domain::{AllocationId, DeviceUuid, Handle, RegionId},
};

use super::{
    CoreThread, DonorStatus,
    core::Core,
    region::{Region, Source},
    state::Task,
};
use crate::{
    Error, Result,
    check::check_device,
    device::{DeviceLayer, Export, Memory},
    session::Session,
};

/// Lends parts of an engine's pool. Nothing here waits for the broker: what is lent is offered when the broker is there,
/// and what is asked back comes when everybody has let go of it.
///
/// The memory is [`lend_pool`](crate::device::foreign::lend_pool)'s, whose `back` is dropped when it has come back. What the
/// broker refuses has come back at once. When the lender is dropped, what is out stays as it is until the process ends, and
/// keeps the pool: its borrowers may be reading it.
pub struct Lender {
    core: Arc<Core>,
    /// Allocations of the pool that were exported: borrowers open each once.
    opened: Mutex<Vec<(Handle, AllocationId)>>,
    _thread: CoreThread,
}

impl Lender {
    /// A lender that offers nothing yet. Borrowers have `drain` to move blocks away when they are asked to let go; zero for
    /// the broker's default.
    ///
    /// # Errors
    /// For a device that is not there.
    pub fn open(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        device: DeviceUuid,
        drain: Duration,
    ) -> Result<Self> {
        check_device(&*layer, &device)?;
        let (core, inbox) = Core::new(session, layer, device, drain, Source::Pool);
        Ok(Self {
            _thread: CoreThread::start(&core, inbox)?,
            core,
            opened: Mutex::default(),
        })
    }

    /// Puts memory on offer, as one slab.
    ///
    /// # Errors
    /// When it is too small or too large for a slab, or cannot be exported; it is not lent then.
    pub fn lend(&self, memory: Memory) -> Result<RegionId> {
        if !SLAB_BYTES.contains(&memory.bytes()) {
            let (least, most) = (SLAB_BYTES.start(), SLAB_BYTES.end());
            let problem = format!("is {} bytes; takes {least} to {most}", memory.bytes());
            return Err(Error::config("range", problem));
        }
        let allocation = self.allocation(self.core.layer.export(&memory)?);
        let offset = self.core.layer.base(&memory)?.offset;
        let region = Region::within(allocation, offset, memory);
        let id = region.id;
        self.core.state.lock().regions.insert(id, region);
        self.core.tell(Task::Tell);
        Ok(id)
    }

    fn allocation(&self, export: Export) -> AllocationId {
        let fresh = AllocationId(rand::rng().random());
        // A descriptor opens this memory alone, a handle all of the allocation that it lies in.
        let Export::Opaque(handle) = export else {
            return fresh;
        };
        let mut opened = self.opened.lock();
        match opened.iter().find(|(known, _)| *known == handle) {
            Some((_, allocation)) => *allocation,
            None => {
                opened.push((handle, fresh));
                fresh
            }
        }
    }

    /// Asks for regions back. Those that the broker has never heard of are back on return.
    pub fn take_back(&self, regions: &[RegionId]) {
        self.core.ask_back_these(regions);
    }

    /// What it has lent now.
    pub fn status(&self) -> DonorStatus {
        self.core.status()
    }

    /// Asks for everything back and waits for it as long as borrowers may take to move away, and `margin`. True when all
    /// of it came.
    pub fn close(&self, margin: Duration) -> bool {
        let window = self.core.session.drain_window(self.core.drain);
        self.take_all_back(window + margin)
    }

    /// Asks for everything back and waits for it, for at most `limit`. True when all of it came.
    pub fn take_all_back(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let all: Vec<RegionId> = self.core.state.lock().regions.keys().copied().collect();
        self.take_back(&all);
        self.core.wait_returned(deadline) && self.core.status().stranded_bytes == 0
    }
}

impl fmt::Debug for Lender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lender({}, {:?})", self.core.device, self.status())
    }
}
