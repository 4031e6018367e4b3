//! Streams of the driver, our own and an engine's: copies, tickets, and what they keep mapped.

use std::{
    any::Any,
    ffi::c_uint,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::DeviceUuid;

use super::{
    arena::Arena,
    batch::BatchLists,
    context::{Context, Entered},
    driver::sys,
    gather::{GatherKernel, Ring},
    gpu::{Gpu, Left},
    lane::Lane,
    route::Route,
    ticket::Point,
};
use crate::{CopyStream, DeviceError, Memory, Part, Piece, Result, Ticket, stream::check_pieces};

/// How a stream copies pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// By piece size: what everyone but a benchmark wants.
    Pick,
    /// One driver call per piece.
    Each,
    /// One batched driver call, where the driver has it.
    Batch,
    /// The gather kernel.
    Kernel,
    /// The gather kernel on so many blocks, whatever the route takes: for finding out what it should take.
    KernelOn(u32),
}

/// How long dropping a stream waits for its copies.
const LINGER: Duration = Duration::from_secs(1);

/// A stream of the driver. Dropping it waits for its copies, for a moment. What they need stays mapped after that until they
/// are known to be over, which is looked at when another stream of the device is made or dropped.
pub(super) struct CudaStream {
    gpu: Arc<Gpu>,
    lane: Arc<Lane>,
    method: Method,
    state: Mutex<State>,
}

struct State {
    /// How much was queued: the number of the latest copy.
    latest: u64,
    ring: Ring,
    lists: BatchLists,
}

impl std::fmt::Debug for CudaStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaStream({:?})", self.lane)
    }
}

impl CudaStream {
    /// Creates a stream.
    pub(super) fn create(gpu: Arc<Gpu>, method: Method) -> Result<Self> {
        gpu.look_after_left();
        let lane = Lane::create(&gpu.context)?;
        Ok(Self::over(gpu, lane, method))
    }

    /// Wraps an engine's stream.
    pub(super) fn adopt(gpu: Arc<Gpu>, raw: usize) -> Self {
        let lane = Lane::adopt(&gpu.context, raw);
        Self::over(gpu, lane, Method::Pick)
    }

    fn over(gpu: Arc<Gpu>, lane: Arc<Lane>, method: Method) -> Self {
        let state = State {
            latest: 0,
            ring: Ring::new(Arc::clone(&gpu.context)),
            lists: BatchLists::default(),
        };
        Self {
            gpu,
            lane,
            method,
            state: Mutex::new(state),
        }
    }

    fn context(&self) -> &Context {
        &self.gpu.context
    }

    fn raw(&self) -> sys::CUstream {
        self.lane.raw()
    }

    /// Queues work that needs `memories`. A driver that refuses may have queued some of it: it counts as queued.
    fn queue<'a>(
        &self,
        memories: impl IntoIterator<Item = &'a Memory>,
        work: impl FnOnce(&mut State, &Entered<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut state = self.state.lock();
        let entered = self.context().enter()?;
        self.lane.check_uncaptured(&entered)?;
        state.latest += 1;
        for memory in memories {
            self.lane.keep(memory, state.latest);
        }
        work(&mut state, &entered)
    }

    /// A ticket for everything queued so far, whose mark may be missing.
    fn end_of(&self, state: &State) -> Ticket {
        let mark = self
            .context()
            .enter()
            .and_then(|entered| self.lane.mark(&entered));
        Ticket(Arc::new(Point::new(&self.lane, state.latest, mark.ok())))
    }

    /// The slowest way to these, if kernels of this stream may touch them all.
    fn reaches<'a>(&self, memories: impl IntoIterator<Item = &'a Memory>) -> Result<Option<Route>> {
        let entered = self.context().enter()?;
        let mut slowest = Some(Route::Device);
        for memory in memories {
            let route = Arena::of(memory)?.reachable_from(self.context(), &entered)?;
            slowest = slowest.zip(route).map(|(one, other)| one.max(other));
        }
        Ok(slowest)
    }

    /// Whether many pieces are one call. The default stream, an engine's, takes no batches.
    fn takes_batches(&self) -> bool {
        !self.lane.is_default() && self.context().driver.has_batches()
    }

    /// The kernel, if these pieces should go through it.
    fn kernel(
        &self,
        pieces: &[Piece],
        route: Route,
        entered: &Entered<'_>,
    ) -> Option<&GatherKernel> {
        let wanted = match self.method {
            Method::Kernel | Method::KernelOn(_) => true,
            Method::Each | Method::Batch => false,
            Method::Pick => {
                let bytes: u64 = pieces.iter().map(|piece| piece.bytes).sum();
                let below = route.kernel_below(self.takes_batches());
                pieces.len() > 1 && bytes / (pieces.len() as u64) < below
            }
        };
        wanted.then(|| self.gpu.kernel(entered)).flatten()
    }

    fn copy_each(
        &self,
        from: &Memory,
        to: &Memory,
        pieces: &[Piece],
        entered: &Entered<'_>,
    ) -> Result<()> {
        for piece in pieces.iter().filter(|piece| piece.bytes > 0) {
            let source = from.at(piece.from, piece.bytes)?;
            let target = to.at(piece.to, piece.bytes)?;
            // SAFETY: both ranges were just checked, and the holds keep both memories mapped until an event
            // behind this copy is over.
            let code = unsafe {
                let copy = entered.core().copy;
                copy(target, source, piece.bytes as usize, self.raw())
            };
            self.context().check(code, "copying")?;
        }
        Ok(())
    }

    fn transfer(&self, address: u64, local: u64, bytes: usize, out: bool) -> Result<()> {
        let (target, source) = if out {
            (local, address)
        } else {
            (address, local)
        };
        let mut state = self.state.lock();
        let entered = self.context().enter()?;
        self.lane.check_uncaptured(&entered)?;
        state.latest += 1;
        // SAFETY: the caller checked the device's range, keeps it mapped, and lends the local one; both outlast
        // the wait below, which ends when nothing queued here can touch them any more.
        let code = unsafe { (entered.core().copy)(target, source, bytes, self.raw()) };
        let queued = self.context().check(code, "copying");
        drop(entered);
        let end = self.end_of(&state);
        // Others need not wait for that.
        drop(state);
        let done = end.wait();
        queued.and(done)
    }
}

impl CopyStream for CudaStream {
    fn device(&self) -> &DeviceUuid {
        &self.context().uuid
    }

    fn copy(&self, from: &Memory, to: &Memory, pieces: &[Piece]) -> Result<()> {
        let part = Part {
            from: from.clone(),
            to: to.clone(),
            pieces: pieces.len(),
        };
        self.copy_parts(&[part], pieces)
    }

    fn copy_parts(&self, parts: &[Part], pieces: &[Piece]) -> Result<()> {
        let pieces = Part::covered(parts, pieces);
        for (part, its) in Part::split(parts, pieces) {
            Arena::of(&part.from)?;
            Arena::of(&part.to)?;
            check_pieces(&part.from, &part.to, its)?;
        }
        if pieces.iter().all(|piece| piece.bytes == 0) {
            return Ok(());
        }
        let memories = || parts.iter().flat_map(|part| [&part.from, &part.to]);
        let route = self.reaches(memories())?;
        self.queue(memories(), |state, entered| {
            if let Some(route) = route
                && let Some(kernel) = self.kernel(pieces, route, entered)
            {
                let blocks = match self.method {
                    Method::KernelOn(blocks) => Some(blocks),
                    _ => None,
                };
                let way = (self.raw(), route, blocks);
                return state.ring.launch(kernel, way, parts, pieces, entered);
            }
            if self.method == Method::Each || pieces.len() == 1 || !self.takes_batches() {
                return Part::split(parts, pieces).try_for_each(|(part, its)| {
                    self.copy_each(&part.from, &part.to, its, entered)
                });
            }
            let batching = entered.batching();
            let code = state.lists.queue(batching, self.raw(), parts, pieces)?;
            self.context().check(code, "copying a batch")
        })
    }

    fn zero(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<()> {
        let address = memory.at(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.reaches([memory])?;
        self.queue([memory], |_, entered| {
            let set_bytes = entered.core().set_bytes;
            // SAFETY: the range was just checked, and the holds keep it mapped until an event behind this is over.
            let code = unsafe { set_bytes(address, 0, bytes as usize, self.raw()) };
            self.context().check(code, "zeroing")
        })
    }

    fn record(&self) -> Result<Ticket> {
        let state = self.state.lock();
        let mark = self.lane.mark(&self.context().enter()?)?;
        let point = Point::new(&self.lane, state.latest, Some(mark));
        Ok(Ticket(Arc::new(point)))
    }

    fn end(&self) -> Ticket {
        self.end_of(&self.state.lock())
    }

    fn wait_for(&self, ticket: &Ticket) -> Result<()> {
        let point: &dyn Any = &*ticket.0;
        let point = point
            .downcast_ref::<Point>()
            .ok_or_else(|| DeviceError::Failed {
                operation: "waiting for a ticket",
                device: self.context().uuid.clone(),
                problem: "it belongs to another backend; open one layer per process".to_owned(),
            })?;
        self.queue([], |_, entered| {
            if let Some(outcome) = point.noticed() {
                return outcome;
            }
            let flags: c_uint = 0;
            let wait = entered.core().stream_wait;
            point.with_mark(entered, |mark| {
                // SAFETY: stream and event are alive, and the driver captures the event's state before it returns.
                let code = unsafe { wait(self.raw(), mark, flags) };
                self.context().check(code, "waiting for a ticket")
            })
        })
    }

    fn write(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<()> {
        Arena::of(memory)?;
        let address = memory.at(offset, bytes.len() as u64)?;
        self.transfer(address, bytes.as_ptr() as u64, bytes.len(), false)
    }

    fn read(&self, memory: &Memory, offset: u64, bytes: &mut [u8]) -> Result<()> {
        Arena::of(memory)?;
        let address = memory.at(offset, bytes.len() as u64)?;
        self.transfer(address, bytes.as_mut_ptr() as u64, bytes.len(), true)
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if self.lane.is_over() {
            return;
        }
        let end = self.end();
        if end.wait_until(Instant::now() + LINGER).is_none() {
            tracing::warn!(
                device = %self.context().uuid,
                "a stream is dropped while it copies: what it copies stays mapped until that is known to be over"
            );
            let ring = Ring::new(Arc::clone(&self.gpu.context));
            let ring = mem::replace(&mut self.state.get_mut().ring, ring);
            let left = Left { end, _ring: ring };
            if self.lane.is_own() {
                self.gpu.leave(left);
            } else {
                // The engine's stream goes its own way: nobody can ask it later.
                mem::forget(left);
            }
        }
        self.gpu.look_after_left();
    }
}
