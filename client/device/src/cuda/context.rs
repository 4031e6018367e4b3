//! A GPU's primary context, which this process shares with whatever engine runs here, and the pool of events.

use std::{
    ffi::{c_int, c_uint},
    ops::Deref,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::DeviceUuid;

use super::{
    driver::{Calls, Code, Driver, FATAL, PEER_ACCESS_ALREADY_ENABLED, SUCCESS, sys},
    route::Route,
};
use crate::{DeviceError, Result};

/// How long after a context is known to be dead nothing that was queued in it counts as over. CUDA says that later work
/// fails. It does not say that copies which another engine of the GPU had begun have stopped by then.
const LAST_COPIES: Duration = Duration::from_secs(1);

/// A GPU's primary context, retained until this is dropped.
pub(super) struct Context {
    pub(super) driver: Arc<Driver>,
    pub(super) uuid: DeviceUuid,
    /// The driver's own number for the GPU, in this process.
    pub(super) device: sys::CUdevice,
    /// The `CUcontext`. An address, so that threads may share it: the driver's calls are thread-safe.
    raw: usize,
    /// Events nobody uses at the moment.
    events: Mutex<Vec<usize>>,
    /// GPUs whose memory kernels of this context may touch.
    peers: Mutex<Vec<(sys::CUdevice, Route)>>,
    /// Why no work is done in it any more, and since when that is known.
    dead: OnceLock<(DeviceError, Instant)>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Context({})", self.uuid)
    }
}

impl Context {
    /// Retains the primary context. The first process to do so on a GPU pays some 500 MB of its HBM.
    pub(super) fn retain(
        driver: Arc<Driver>,
        uuid: DeviceUuid,
        device: sys::CUdevice,
    ) -> Result<Arc<Self>> {
        const OPERATION: &str = "retaining the primary context";
        let calls = (driver.calls()).map_err(|code| driver.error(code, OPERATION, &uuid))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `device` came from the driver; one pointer is written, to one of ours.
        let code = unsafe { (calls.core().context_retain)(&raw mut raw, device) };
        drop(calls);
        driver.check(code, OPERATION, &uuid)?;
        Ok(Arc::new(Self {
            driver,
            uuid,
            device,
            raw: raw as usize,
            events: Mutex::default(),
            peers: Mutex::default(),
            dead: OnceLock::new(),
        }))
    }

    /// Makes the context current on this thread until the guard is dropped, and then what was current before: the
    /// thread is an engine's, which must not notice.
    pub(super) fn enter(&self) -> Result<Entered<'_>> {
        self.try_enter()
            .map_err(|(code, operation)| self.driver.error(code, operation, &self.uuid))
    }

    /// As [`enter`](Self::enter), with the driver's code and what it was the answer to.
    pub(super) fn try_enter(&self) -> std::result::Result<Entered<'_>, (Code, &'static str)> {
        let relaxed = self.driver.calls();
        let calls = relaxed.map_err(|code| (code, "relaxing the thread's capture mode"))?;
        // SAFETY: the context is retained as long as `self` lives.
        match unsafe { (calls.core().context_push)(self.raw as sys::CUcontext) } {
            SUCCESS => Ok(Entered {
                context: self,
                calls,
            }),
            code => Err((code, "making the context current")),
        }
    }

    /// Why nothing that was queued in it is done any more, once that is known.
    pub(super) fn death(&self) -> Option<DeviceError> {
        let (error, since) = self.dead.get()?;
        (since.elapsed() >= LAST_COPIES).then(|| error.clone())
    }

    /// A call was answered with `code`. If that is what dead contexts answer, and another call is answered like that too,
    /// then it is dead: one call alone may have failed for itself.
    pub(super) fn suspect(&self, code: Code) {
        if self.dead.get().is_some() || !FATAL.contains(&code) || !FATAL.contains(&self.probe()) {
            return;
        }
        let problem = self.driver.describe(code);
        tracing::error!(device = %self.uuid, problem, "the CUDA context of this process is lost: restart the process");
        let error = DeviceError::Failed {
            operation: "copying",
            device: self.uuid.clone(),
            problem: format!("{problem}; the process has lost its CUDA context: restart it"),
        };
        // Another thread may have found out as well.
        let _ = self.dead.set((error, Instant::now()));
    }

    /// What a call that cannot fail for itself is answered.
    fn probe(&self) -> Code {
        let entered = match self.try_enter() {
            Ok(entered) => entered,
            Err((code, _)) => return code,
        };
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; two numbers are written, to two of ours.
        unsafe { (entered.core().memory_info)(&raw mut free, &raw mut total) }
    }

    /// Fails unless `code` is success.
    pub(super) fn check(&self, code: Code, operation: &'static str) -> Result<()> {
        self.driver.check(code, operation, &self.uuid)
    }

    /// Lets kernels of this context touch memory of `peer`, and says how far it is. None where there is no peer access.
    pub(super) fn reach(&self, peer: &Self, entered: &Entered<'_>) -> Result<Option<Route>> {
        if peer.device == self.device {
            return Ok(Some(Route::Device));
        }
        let known = |(device, _): &&(sys::CUdevice, Route)| *device == peer.device;
        if let Some((_, route)) = self.peers.lock().iter().find(known) {
            return Ok(Some(*route));
        }
        let mut can: c_int = 0;
        // SAFETY: both devices came from the driver; one int is written, to one of ours.
        let code =
            unsafe { (entered.core().can_access_peer)(&raw mut can, self.device, peer.device) };
        self.check(code, "asking for peer access")?;
        if can == 0 {
            return Ok(None);
        }
        let route = self.route(peer, entered)?;
        // SAFETY: this context is current, the peer's is retained.
        let code = unsafe { (entered.core().enable_peer)(peer.raw as sys::CUcontext, 0) };
        if code != PEER_ACCESS_ALREADY_ENABLED {
            self.check(code, "enabling peer access")?;
        }
        self.peers.lock().push((peer.device, route));
        Ok(Some(route))
    }

    /// How far another GPU is.
    pub(super) fn route(&self, peer: &Self, entered: &Entered<'_>) -> Result<Route> {
        Ok(
            match entered.nvlink(self.device, peer.device, &self.uuid)? {
                true => Route::Nvlink,
                false => Route::Pcie,
            },
        )
    }

    /// A stream of the highest priority, so that copies for the next layer start while this one computes. It
    /// does not wait for the default stream.
    pub(super) fn create_stream(&self, entered: &Entered<'_>) -> Result<sys::CUstream> {
        let core = entered.core();
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the context is current; two ints are written, to two of ours.
        let code = unsafe { (core.stream_priorities)(&raw mut least, &raw mut greatest) };
        self.check(code, "asking for priorities")?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; one pointer is written, to one of ours.
        let code = unsafe { (core.stream_create)(&raw mut raw, flags, greatest) };
        self.check(code, "creating a stream")?;
        Ok(raw)
    }

    /// Marks the end of what was queued on a stream so far.
    pub(super) fn mark(
        self: &Arc<Self>,
        stream: sys::CUstream,
        entered: &Entered<'_>,
    ) -> Result<Event> {
        let event = self.event(entered)?;
        // SAFETY: event and stream are alive and of the current context.
        let code = unsafe { (entered.core().event_record)(event.raw(), stream) };
        match self.check(code, "recording a ticket") {
            Ok(()) => Ok(event),
            Err(error) => {
                event.destroy(entered);
                Err(error)
            }
        }
    }

    fn event(self: &Arc<Self>, entered: &Entered<'_>) -> Result<Event> {
        let pooled = self.events.lock().pop();
        let raw = match pooled {
            Some(raw) => raw,
            None => {
                let mut raw = std::ptr::null_mut();
                // Not `CU_EVENT_BLOCKING_SYNC`: with 57 of those to come on a device, the next launch waits for the first
                // (driver 580, H100), and a layer's tickets and marks are more than that.
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
                // SAFETY: the context is current; one pointer is written, to one of ours.
                let code = unsafe { (entered.core().event_create)(&raw mut raw, flags) };
                self.check(code, "creating an event")?;
                raw as usize
            }
        };
        Ok(Event {
            context: Arc::clone(self),
            raw,
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let events = std::mem::take(self.events.get_mut());
        if let Ok(entered) = self.enter() {
            for event in events {
                // SAFETY: created in this context, and no ticket holds it any more.
                let code = unsafe { (entered.core().event_destroy)(event as sys::CUevent) };
                report(&self.driver, code, "destroying an event", &self.uuid);
            }
        }
        let released = self.driver.calls().map_or_else(
            |code| code,
            // SAFETY: undoes our own retain, once; everything that used the context held `self`.
            |calls| unsafe { (calls.core().context_release)(self.device) },
        );
        report(
            &self.driver,
            released,
            "releasing the primary context",
            &self.uuid,
        );
    }
}

/// Notes a failure that nobody can do anything about: something was being given up.
pub(super) fn report(driver: &Driver, code: Code, operation: &'static str, device: &DeviceUuid) {
    if code != SUCCESS {
        let problem = driver.describe(code);
        tracing::debug!(%device, operation, problem, "while letting go");
    }
}

/// A context that is current on this thread.
pub(super) struct Entered<'a> {
    context: &'a Context,
    /// Given up after the context has been left. Neither Send nor Sync, like what is current.
    calls: Calls<'a>,
}

impl Entered<'_> {
    /// Fails unless `code` is success.
    pub(super) fn check(&self, code: Code, operation: &'static str) -> Result<()> {
        self.context.check(code, operation)
    }
}

impl<'a> Deref for Entered<'a> {
    type Target = Calls<'a>;

    fn deref(&self) -> &Calls<'a> {
        &self.calls
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: undoes our own push on this thread: guards are neither Send nor leaked.
        let code = unsafe { (self.calls.core().context_pop)(&raw mut popped) };
        report(
            &self.context.driver,
            code,
            "leaving the context",
            &self.context.uuid,
        );
    }
}

/// An event of the pool. Going back is safe at any time: waits capture an event's state when they are queued.
pub(super) struct Event {
    pub(super) context: Arc<Context>,
    raw: usize,
}

impl Event {
    /// For the driver.
    pub(super) fn raw(&self) -> sys::CUevent {
        self.raw as sys::CUevent
    }

    /// Ends it, for one that the driver had trouble with: the next ticket shall have another.
    pub(super) fn destroy(mut self, entered: &Entered<'_>) {
        let raw = std::mem::take(&mut self.raw) as sys::CUevent;
        // SAFETY: created in this context and destroyed once; waits have captured its state.
        let code = unsafe { (entered.core().event_destroy)(raw) };
        report(
            &self.context.driver,
            code,
            "destroying an event",
            &self.context.uuid,
        );
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.raw != 0 {
            self.context.events.lock().push(self.raw);
        }
    }
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Event({})", self.context.uuid)
    }
}
