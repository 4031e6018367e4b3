//! Streams of the driver, our own and an engine's: copies, tickets, and what they keep mapped.

use std::{any::Any, ffi::c_uint, sync::Arc};

use parking_lot::Mutex;
use swiftcache_proto::domain::DeviceUuid;

use super::{
    arena::Arena,
    batch::BatchLists,
    context::{Context, Entered, report},
    driver::sys,
    gather::{GatherKernel, Ring},
    route::Route,
    ticket::{Holds, Point},
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

/// A stream of the driver. Dropping it waits for its copies.
pub(super) struct CudaStream {
    context: Arc<Context>,
    /// A `CUstream`.
    raw: usize,
    /// Whether we created it.
    own: bool,
    method: Method,
    state: Mutex<State>,
    holds: Arc<Holds>,
}

struct State {
    /// How much was queued: the number of the latest copy.
    latest: u64,
    ring: Ring,
    lists: BatchLists,
    /// The first failure: everything later fails with it.
    failed: Option<DeviceError>,
}

impl std::fmt::Debug for CudaStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaStream({}, own: {})", self.context.uuid, self.own)
    }
}

impl CudaStream {
    /// Creates a stream.
    pub(super) fn create(context: &Arc<Context>, method: Method) -> Result<Self> {
        let entered = context.enter()?;
        let raw = context.create_stream(&entered)?;
        drop(entered);
        Ok(Self::wrap(context, raw as usize, true, method))
    }

    /// Wraps an engine's stream.
    pub(super) fn adopt(context: &Arc<Context>, raw: usize) -> Self {
        Self::wrap(context, raw, false, Method::Pick)
    }

    fn wrap(context: &Arc<Context>, raw: usize, own: bool, method: Method) -> Self {
        let state = State {
            latest: 0,
            ring: Ring::new(Arc::clone(context)),
            lists: BatchLists::default(),
            failed: None,
        };
        Self {
            context: Arc::clone(context),
            raw,
            own,
            method,
            state: Mutex::new(state),
            holds: Arc::default(),
        }
    }

    /// Fails while an engine captures this stream into a graph. What were queued then would become part of the graph: a
    /// mark would never be reached, a stream that waits for it would be captured too, and waiting for a ticket, which is
    /// no part of it, would make the engine's capture fail. So nothing is queued, and the stream is as good as before.
    /// Our own streams are never captured: nobody else has them, and no ticket is part of a graph.
    fn check_uncaptured(&self, entered: &Entered<'_>) -> Result<()> {
        const UNCAPTURED: c_uint =
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as c_uint;
        if self.own {
            return Ok(());
        }
        let mut status = UNCAPTURED;
        // SAFETY: the stream is alive; one status is written, to one of ours.
        let code = unsafe { (entered.core().stream_capturing)(self.raw(), &raw mut status) };
        entered.check(code, "asking whether a stream is captured")?;
        match status {
            UNCAPTURED => Ok(()),
            _ => Err(DeviceError::Failed {
                operation: "using an engine's stream",
                device: self.context.uuid.clone(),
                problem: "it is being captured into a CUDA graph, whose work runs when the graph is launched: \
                          mark it and have it wait before or after the launch, and not while it is captured"
                    .to_owned(),
            }),
        }
    }

    fn raw(&self) -> sys::CUstream {
        self.raw as sys::CUstream
    }

    /// Queues work that needs `memories`; a failure is remembered.
    fn queue<'a>(
        &self,
        memories: impl IntoIterator<Item = &'a Memory>,
        work: impl FnOnce(&mut State, &Entered<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let entered = self.context.enter()?;
        self.check_uncaptured(&entered)?;
        state.latest += 1;
        for memory in memories {
            self.holds.keep(memory, state.latest);
        }
        let result = work(&mut state, &entered);
        if let Err(error) = &result {
            state.failed = Some(error.clone());
        }
        result
    }

    /// The slowest way to these, if kernels of this stream may touch them all.
    fn reaches<'a>(&self, memories: impl IntoIterator<Item = &'a Memory>) -> Result<Option<Route>> {
        let entered = self.context.enter()?;
        let mut slowest = Some(Route::Device);
        for memory in memories {
            let route = Arena::of(memory)?.reachable_from(&self.context, &entered)?;
            slowest = slowest.zip(route).map(|(one, other)| one.max(other));
        }
        Ok(slowest)
    }

    /// Whether many pieces are one call. The default stream, an engine's, takes no batches.
    fn takes_batches(&self) -> bool {
        self.raw != 0 && self.context.driver.has_batches()
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
        wanted.then(|| self.context.kernel(entered)).flatten()
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
            self.context.check(code, "copying")?;
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
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let entered = self.context.enter()?;
        self.check_uncaptured(&entered)?;
        let core = entered.core();
        // SAFETY: the caller checked the device's range, keeps it mapped, and lends the local one; both outlast
        // the wait below.
        let code = unsafe { (core.copy)(target, source, bytes, self.raw()) };
        let queued = self.context.check(code, "copying");
        // SAFETY: the stream is alive.
        let code = unsafe { (core.stream_synchronize)(self.raw()) };
        let result = queued.and(self.context.check(code, "copying"));
        if let Err(error) = &result {
            state.failed = Some(error.clone());
        } else {
            self.holds.release(state.latest);
        }
        result
    }
}

impl CopyStream for CudaStream {
    fn device(&self) -> &DeviceUuid {
        &self.context.uuid
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
            self.context.check(code, "copying a batch")
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
            self.context.check(code, "zeroing")
        })
    }

    fn record(&self) -> Result<Ticket> {
        let mut state = self.state.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let entered = self.context.enter()?;
        self.check_uncaptured(&entered)?;
        let event = self.context.event(&entered)?;
        // SAFETY: event and stream are alive and of the current context.
        let code = unsafe { (entered.core().event_record)(event.raw(), self.raw()) };
        if let Err(error) = self.context.check(code, "recording a ticket") {
            state.failed = Some(error.clone());
            return Err(error);
        }
        let point = Point::new(event, Arc::clone(&self.holds), state.latest);
        Ok(Ticket(Arc::new(point)))
    }

    fn wait_for(&self, ticket: &Ticket) -> Result<()> {
        let point: &dyn Any = &*ticket.0;
        let point = point
            .downcast_ref::<Point>()
            .ok_or_else(|| DeviceError::Failed {
                operation: "waiting for a ticket",
                device: self.context.uuid.clone(),
                problem: "it belongs to another backend; open one layer per process".to_owned(),
            })?;
        self.queue([], |_, entered| {
            if let Some(outcome) = point.outcome() {
                return outcome;
            }
            let flags: c_uint = 0;
            let wait = entered.core().stream_wait;
            // SAFETY: stream and event are alive, and the driver captures the event's state before it returns.
            let code = unsafe { wait(self.raw(), point.event(), flags) };
            self.context.check(code, "waiting for a ticket")
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
        let idle = self.holds.is_empty();
        let Ok(entered) = self.context.enter() else {
            return;
        };
        let core = entered.core();
        if !idle {
            // Copies in flight end before anything is unmapped.
            // SAFETY: the stream is alive.
            let code = unsafe { (core.stream_synchronize)(self.raw as sys::CUstream) };
            report(
                &self.context.driver,
                code,
                "draining a stream",
                &self.context.uuid,
            );
            self.holds.release(u64::MAX);
        }
        if self.own {
            // SAFETY: our own stream, ended once.
            let code = unsafe { (core.stream_destroy)(self.raw as sys::CUstream) };
            report(
                &self.context.driver,
                code,
                "destroying a stream",
                &self.context.uuid,
            );
        }
    }
}
