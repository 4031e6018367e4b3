//! What a stream and its tickets share: the driver's stream, what is mapped for its copies, and how far it is known to be.

use std::{
    ffi::c_uint,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    context::{Context, Entered, Event, report},
    driver::{Code, NOT_READY, SUCCESS, sys},
};
use crate::{DeviceError, Memory, Result};

/// A stream of the driver. It is destroyed with the last ticket: a ticket may have to ask it.
pub(super) struct Lane {
    pub(super) context: Arc<Context>,
    /// A `CUstream`.
    raw: usize,
    /// Whether we created it. Nobody else queues anything on it then, and it lives as long as this.
    own: bool,
    /// The memories that queued copies need, each with its latest copy.
    holds: Mutex<Vec<(Memory, u64)>>,
    /// Everything up to this copy is known to be over.
    passed: AtomicU64,
    /// Somebody was told that the driver does not say how far it is.
    in_doubt: AtomicBool,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, own: {}", self.context.uuid, self.own)
    }
}

impl Lane {
    /// A stream of our own.
    pub(super) fn create(context: &Arc<Context>) -> Result<Arc<Self>> {
        let raw = context.create_stream(&context.enter()?)?;
        Ok(Self::around(context, raw as usize, true))
    }

    /// An engine's stream.
    pub(super) fn adopt(context: &Arc<Context>, raw: usize) -> Arc<Self> {
        Self::around(context, raw, false)
    }

    fn around(context: &Arc<Context>, raw: usize, own: bool) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            raw,
            own,
            holds: Mutex::default(),
            passed: AtomicU64::new(0),
            in_doubt: AtomicBool::new(false),
        })
    }

    /// For the driver.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw as sys::CUstream
    }

    pub(super) fn is_own(&self) -> bool {
        self.own
    }

    /// Whether it is the context's default stream.
    pub(super) fn is_default(&self) -> bool {
        self.raw == 0
    }

    /// Keeps a memory mapped until copy `number` is known to be over.
    pub(super) fn keep(&self, memory: &Memory, number: u64) {
        let mut held = self.holds.lock();
        match held.iter_mut().find(|(held, _)| held.is(memory)) {
            Some((_, latest)) => *latest = number,
            None => held.push((memory.clone(), number)),
        }
    }

    /// Whether no copy is left that is not known to be over.
    pub(super) fn is_over(&self) -> bool {
        self.holds.lock().is_empty()
    }

    /// Fails while an engine captures this stream into a graph. What were queued then would become part of the graph: a
    /// mark would never be reached, a stream that waits for it would be captured too, and waiting for a ticket, which is
    /// no part of it, would make the engine's capture fail. So nothing is queued, and the stream is as good as before.
    /// Our own streams are never captured: nobody else has them, and no ticket is part of a graph.
    pub(super) fn check_uncaptured(&self, entered: &Entered<'_>) -> Result<()> {
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

    /// Marks the end of what was queued so far.
    pub(super) fn mark(&self, entered: &Entered<'_>) -> Result<Event> {
        self.check_uncaptured(entered)?;
        self.context.mark(self.raw(), entered)
    }

    /// How everything up to copy `number` ended, if it is known to be over. `mark` lies behind it; without one the stream
    /// itself is asked, and marked anew: it may never be idle.
    pub(super) fn ask(&self, number: u64, mark: &Mutex<Option<Event>>) -> Option<Result<()>> {
        // What an engine queues has no numbers.
        if self.own && self.passed.load(Ordering::Acquire) >= number {
            return Some(Ok(()));
        }
        if let Some(error) = self.context.death() {
            self.release(number);
            return Some(Err(error));
        }
        let entered = match self.context.try_enter() {
            Ok(entered) => entered,
            Err((code, _)) => {
                self.doubt(code);
                return None;
            }
        };
        let mut mark = mark.lock();
        let code = match &*mark {
            // SAFETY: the event is alive, recorded, and of this context.
            Some(event) => unsafe { (entered.core().event_query)(event.raw()) },
            None if self.check_uncaptured(&entered).is_err() => return None,
            // SAFETY: the stream is ours and alive. All that is numbered up to `number` was queued before the ticket was
            // made, so a stream that is idle now is through with it.
            None => unsafe { (entered.core().stream_query)(self.raw()) },
        };
        match code {
            SUCCESS => {
                self.in_doubt.store(false, Ordering::Relaxed);
                drop((mark, entered));
                self.pass(number);
                Some(Ok(()))
            }
            NOT_READY => {
                if mark.is_none() {
                    // It lies further behind than need be.
                    *mark = self.mark(&entered).ok();
                }
                None
            }
            code => {
                // An engine's stream may be gone by now, and then there is nothing but the event to ask.
                if self.own
                    && let Some(event) = mark.take()
                {
                    event.destroy(&entered);
                }
                drop((mark, entered));
                self.doubt(code);
                None
            }
        }
    }

    /// Everything up to copy `number` is over.
    fn pass(&self, number: u64) {
        self.release(number);
        self.passed.fetch_max(number, Ordering::Release);
    }

    /// Lets go of what only copies up to `number` needed.
    fn release(&self, number: u64) {
        let mut over = Vec::new();
        let mut held = self.holds.lock();
        let mut index = 0;
        while let Some((_, latest)) = held.get(index) {
            if *latest <= number {
                over.push(held.swap_remove(index));
            } else {
                index += 1;
            }
        }
        // Unmapping takes its time, and must not hold up the next copy.
        drop(held);
        drop(over);
    }

    /// The driver answered with an error when it was asked whether copies are over. That says nothing about them, unless
    /// the context is dead.
    fn doubt(&self, code: Code) {
        self.context.suspect(code);
        if !self.in_doubt.swap(true, Ordering::Relaxed) {
            let problem = self.context.driver.describe(code);
            tracing::warn!(
                device = %self.context.uuid, problem,
                "the driver does not say whether copies are over; they count as running, and it is asked again"
            );
        }
    }
}

impl Drop for Lane {
    /// Nothing is held any more: whoever drops a stream sees to that.
    fn drop(&mut self) {
        if !self.own {
            return;
        }
        let Ok(entered) = self.context.enter() else {
            return; // the device is lost, and the stream with it
        };
        // SAFETY: our own stream, ended once.
        let code = unsafe { (entered.core().stream_destroy)(self.raw()) };
        report(
            &self.context.driver,
            code,
            "destroying a stream",
            &self.context.uuid,
        );
    }
}
