//! One GPU as copies use it: its context, the gather kernel, and what dropped streams have left behind.

use std::{
    fmt, mem,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    context::{Context, Entered},
    gather::{GatherKernel, Ring},
};
use crate::Ticket;

/// When to try the gather kernel again that the driver would not take: twice as late each time.
const FIRST_KERNEL_PAUSE: Duration = Duration::from_secs(1);
const LAST_KERNEL_PAUSE: Duration = Duration::from_secs(600);

/// A GPU in use.
pub(super) struct Gpu {
    pub(super) context: Arc<Context>,
    kernel: OnceLock<GatherKernel>,
    /// When to try the kernel again that the driver would not take, and how long that pause is.
    kernel_after: Mutex<Option<(Instant, Duration)>>,
    /// Streams that were dropped before their copies were known to be over.
    left: Mutex<Vec<Left>>,
}

/// What a stream left behind when it was dropped.
pub(super) struct Left {
    /// Keeps the driver's stream, and what is mapped for its copies.
    pub(super) end: Ticket,
    /// The descriptors that its launches read.
    pub(super) _ring: Ring,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.context.uuid)
    }
}

impl Gpu {
    pub(super) fn new(context: Arc<Context>) -> Arc<Self> {
        Arc::new(Self {
            context,
            kernel: OnceLock::new(),
            kernel_after: Mutex::default(),
            left: Mutex::default(),
        })
    }

    /// Keeps what a stream's copies need, until they are known to be over.
    pub(super) fn leave(&self, left: Left) {
        self.left.lock().push(left);
    }

    /// Lets go of what was left and is over by now.
    pub(super) fn look_after_left(&self) {
        let over: Vec<Left> = (self.left.lock())
            .extract_if(.., |left| left.end.is_over())
            .collect();
        // Freeing takes its time, and may bring further streams here.
        drop(over);
    }

    /// The gather kernel, compiled on first use. None while the driver will not have it, which may be for a moment only.
    pub(super) fn kernel(&self, entered: &Entered<'_>) -> Option<&GatherKernel> {
        if let Some(kernel) = self.kernel.get() {
            return Some(kernel);
        }
        let mut after = self.kernel_after.lock();
        if after.is_some_and(|(after, _)| Instant::now() < after) {
            return None;
        }
        match GatherKernel::load(&self.context, entered) {
            Ok(kernel) => Some(self.kernel.get_or_init(|| kernel)),
            Err(error) => {
                let pause = after.map_or(FIRST_KERNEL_PAUSE, |(_, pause)| {
                    LAST_KERNEL_PAUSE.min(2 * pause)
                });
                tracing::warn!(
                    device = %self.context.uuid, %error, ?pause,
                    "no gather kernel: small pieces are copied one by one until it is tried again"
                );
                *after = Some((Instant::now() + pause, pause));
                None
            }
        }
    }
}

impl Drop for Gpu {
    /// What is not known to be over stays mapped for as long as this process lives.
    fn drop(&mut self) {
        self.look_after_left();
        mem::forget(mem::take(self.left.get_mut()));
    }
}
