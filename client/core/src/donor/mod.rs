//! Donors: HBM on offer, and given back when its owner needs it.
//!
//! * [`Donor`] owns the allocations: one slab, one allocation, one region each, so that giving back is freeing;
//! * [`Lender`] offers parts of an engine's pool instead, which go on being the engine's;
//! * [`PoolLender`] keeps a worker's loans of them, [`Loans`] an engine's, which are back when all of its workers' are;
//! * [`Policy`] decides how much to offer; [`Agent`] follows it.

mod agent;
mod core;
mod lender;
mod loans;
mod offer;
mod policy;
#[cfg(test)]
mod policy_tests;
mod pool;
mod region;
mod resume;
mod scrub;
mod state;
mod target;
mod withdrawal;
mod work;

use std::{
    fmt, mem,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use swiftcache_proto::{
    convert::SLAB_BYTES,
    domain::{DeviceUuid, HandleKind},
};

pub use agent::{Agent, AgentConfig};
pub use lender::Lender;
pub use loans::{Ended, GIVE_BACK_MARGIN, Loans, Moment};
pub use policy::{Decision, Forecast, Observation, Policy, PolicyConfig, Reason, Settled};
pub use pool::{NotLent, PoolLender, PoolRange};

use self::{core::Core, region::Source, state::Task};
use crate::{
    Error, Result, check::check_device, device::DeviceLayer, latency::Latency, session::Session,
};

/// What a donor lends.
#[derive(Clone, Debug)]
pub struct DonorConfig {
    /// The device whose HBM it is.
    pub device: DeviceUuid,
    /// The size of each slab, bytes: 64 KiB to 16 GiB. Large slabs are cheaper to map, small ones quicker to give
    /// back one by one.
    pub slab_bytes: u64,
    /// How long borrowers may take to move blocks away when slabs are withdrawn; zero for the broker's default.
    pub drain: Duration,
    /// How borrowers open the slabs; the backend's best way when not set. That is `PosixFd` wherever the driver exports
    /// descriptors: a `CudaIpc` handle opens only in processes that enumerate the device and share the PID namespace.
    pub handle: Option<HandleKind>,
}

/// What a donor holds now, and how giving back went so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DonorStatus {
    /// What a donor that [keeps](Donor::keep) an amount is to have on offer, whole slabs, bytes; otherwise 0.
    pub target_bytes: u64,
    /// On offer, lent or not, bytes.
    pub offered_bytes: u64,
    /// Of these: what the broker has not confirmed yet, since it is away or its answer never came, bytes.
    pub unconfirmed_bytes: u64,
    /// Of what is on offer: asked back, and it is not known yet whether it is on its way, bytes.
    pub asked_bytes: u64,
    /// Of what is on offer: what some borrower says it cannot map, bytes.
    pub unmappable_bytes: u64,
    /// On its way back, bytes.
    pub withdrawing_bytes: u64,
    /// Lent out of an engine's pool when the broker lost its records: not used by anybody ever again, bytes.
    pub stranded_bytes: u64,
    /// Regions given back since the start.
    pub returned: u64,
    /// From asking for a region to owning its bytes again.
    pub give_back: Latency,
    /// Slabs zeroed for another tenant.
    pub scrubbed: u64,
    /// Tries to zero one that failed. Each is tried again, and the slab is lent to nobody else before.
    pub failed_scrubs: u64,
}

/// HBM on offer. Dropping it leaves the session to ask back what is lent, and to keep its memory until the broker has
/// given it back or has heard that the session is over: see [`close`](Self::close).
pub struct Donor {
    core: Arc<Core>,
    config: DonorConfig,
    _thread: CoreThread,
}

/// A donor's thread. Dropping it ends it.
struct CoreThread {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl CoreThread {
    fn start(core: &Arc<Core>, inbox: mpsc::Receiver<Task>) -> Result<Self> {
        let its_core = Arc::clone(core);
        let thread = thread::Builder::new()
            .name("swiftcache-donor".to_owned())
            .spawn(move || its_core.work(&inbox))
            .map_err(Error::Thread)?;
        Ok(Self {
            core: Arc::clone(core),
            thread: Some(thread),
        })
    }
}

impl Drop for CoreThread {
    fn drop(&mut self) {
        if !self.core.session.is_here() {
            // A child of the donor's process has no such thread.
            return mem::forget(self.thread.take());
        }
        self.core.tell(Task::Stop);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Donor {
    /// A donor that offers nothing yet.
    ///
    /// # Errors
    /// For a slab size out of bounds, a device that is not there, or a handle kind that the backend does not export.
    pub fn open(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        config: DonorConfig,
    ) -> Result<Self> {
        Self::of(session, layer, config, false)
    }

    /// A donor that follows the device's idle HBM, or not.
    fn of(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        config: DonorConfig,
        elastic: bool,
    ) -> Result<Self> {
        if !SLAB_BYTES.contains(&config.slab_bytes) {
            let (least, most) = (SLAB_BYTES.start(), SLAB_BYTES.end());
            let problem = format!("is {}; takes {least} to {most}", config.slab_bytes);
            return Err(Error::config("slab_bytes", problem));
        }
        check_device(&*layer, &config.device)?;
        let offers = layer.handle_kinds();
        if let Some(kind) = config.handle
            && !offers.contains(&kind)
        {
            let problem = format!(
                "is {kind:?}; the {} backend exports {offers:?} here",
                layer.name()
            );
            return Err(Error::config("handle", problem));
        }
        let source = Source::Allocations {
            slab_bytes: config.slab_bytes,
            handle: config.handle,
            elastic,
        };
        let device = config.device.clone();
        let (core, inbox) = Core::new(session, layer, device, config.drain, source);
        Ok(Self {
            _thread: CoreThread::start(&core, inbox)?,
            core,
            config,
        })
    }

    /// Has the donor keep `bytes` on offer from now on, in whole slabs, and returns at once. What is missing is taken and
    /// offered again and again, with growing pauses: after a refusal, after a full device, after a broker that was away or
    /// lost its records. Nothing is added while the device is held for an engine's start, nor is anything taken back.
    /// [`problem`](Self::problem) says why less is on offer.
    pub fn keep(&self, bytes: u64) {
        self.core.keep(bytes, self.config.slab_bytes);
    }

    /// Why less is on offer than the donor [keeps](Self::keep), for people. Nothing when all of it is, or has only just been
    /// asked for.
    pub fn problem(&self) -> Option<String> {
        self.core.problem()
    }

    /// Takes and offers up to `bytes` more, in whole slabs. Returns what was added, bytes. Nothing more is added after an
    /// offer whose answer never came, which counts: its slab is kept, and offered again (`unconfirmed_bytes` in
    /// [`status`](Self::status)).
    ///
    /// # Errors
    /// When not one slab could be taken or offered: what the first one met.
    pub fn grow(&self, bytes: u64) -> Result<u64> {
        let mut added = 0;
        for _ in 0..bytes / self.config.slab_bytes {
            match self.offer_one() {
                Ok(confirmed) => {
                    added += self.config.slab_bytes;
                    if !confirmed {
                        break;
                    }
                }
                Err(error) if added == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(added)
    }

    fn offer_one(&self) -> Result<bool> {
        let DonorConfig {
            slab_bytes, handle, ..
        } = self.config;
        self.core.offer_one(slab_bytes, handle)
    }

    /// Asks for at least `bytes` back, the cheapest to give up first. Returns what is on its way, bytes; each slab is
    /// freed when nobody can touch it any more. A donor that [keeps](Self::keep) an amount keeps what is left from now on.
    ///
    /// # Errors
    /// When the broker is absent: nothing can come back safely without it. When its answer never came, it may have begun:
    /// the donor finds out, and [`status`](Self::status) shows what is on its way.
    pub fn shrink(&self, bytes: u64) -> Result<u64> {
        self.core.keep_less(bytes);
        self.core.withdraw(bytes)
    }

    /// What it holds now.
    pub fn status(&self) -> DonorStatus {
        self.core.status()
    }

    /// What it was opened with.
    pub fn config(&self) -> &DonorConfig {
        &self.config
    }

    /// How long borrowers may take to move away from what is asked back.
    pub fn drain_window(&self) -> Duration {
        self.core.session.drain_window(self.config.drain)
    }

    /// Blocks until nothing is on its way back, nor may be after a [`shrink`](Self::shrink) whose answer never came, for at
    /// most `limit`. True when that is so.
    pub fn wait_returned(&self, limit: Duration) -> bool {
        self.core.wait_returned(Instant::now() + limit)
    }

    /// Asks for everything back and waits for it, for at most `limit`. True when all of it came: nobody's bytes are
    /// lost. Otherwise what is still lent stays mapped by its borrowers, who will be told to let go, and its memory stays
    /// taken until they have.
    pub fn close(self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.core.withdraw_all();
        self.core.wait_returned(deadline)
    }
}

impl fmt::Debug for Donor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Donor({}, {:?})", self.core.device, self.status())
    }
}
