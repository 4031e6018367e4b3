//! Zeroing of slabs for other tenants: because the broker asks, or before a slab that may hold a tenant's bytes is offered again. It
//! counts as done only when that is known. A driver that fails for a moment must not keep a slab out of use for good: it is
//! tried again until it works, or until the region is no longer this donor's to zero. The donor's thread waits for none of
//! it.

use std::{
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::RegionId;
use tracing::warn;

use super::{core::Core, state::Task};
use crate::{
    Error, Result,
    device::{CopyStream, Memory, Ticket, nap},
    session::Scrub,
};

/// The pause after the first failure. Each failure doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The shortest sleep while a slab is zeroed.
const SHORTEST_NAP: Duration = Duration::from_micros(50);

/// What a donor's thread has to zero.
#[derive(Default)]
pub(super) struct Scrubs {
    stream: Option<Arc<dyn CopyStream>>,
    list: Vec<Pending>,
}

struct Pending {
    cause: Cause,
    /// The pause after the next failure.
    pause: Duration,
    step: Step,
}

/// Why a region is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The broker asks for it.
    Asked(Scrub),
    /// It is [`soiled`](super::region::Region::soiled).
    Soiled(RegionId),
}

enum Step {
    /// To be tried at that time.
    Due(Instant),
    /// Queued, as a whole or in part. It is not tried again before `end` is over: what failed may still write.
    Running {
        since: Instant,
        queued: Result<()>,
        end: Ticket,
    },
}

impl Scrubs {
    /// Takes what the broker asks for. A slab is zeroed once only for each of its generations, because a second time could hit
    /// the next tenant's bytes.
    pub(super) fn ask(&mut self, core: &Core, scrub: &Scrub) {
        let state = core.state.lock();
        let Some(region) = state.regions.get(&scrub.region) else {
            return;
        };
        if region.soiled {
            // It is zeroed for a new offer, and the broker that asks is gone.
            return;
        }
        let done = region.is_scrubbed(scrub);
        drop(state);
        if done {
            // It was said, and the word got lost.
            core.session.scrubbed(scrub);
        } else {
            self.begin(Cause::Asked(*scrub));
        }
    }

    /// Takes all regions that must not be offered as they are.
    pub(super) fn clean_soiled(&mut self, core: &Core) {
        let state = core.state.lock();
        for region in state.regions.values().filter(|region| region.soiled) {
            // What an earlier broker asked for must not be tried again after the next offer.
            self.list.retain(|pending| {
                !matches!(pending.cause, Cause::Asked(scrub) if scrub.region == region.id)
            });
            self.begin(Cause::Soiled(region.id));
        }
    }

    fn begin(&mut self, cause: Cause) {
        if !self.list.iter().any(|pending| pending.cause == cause) {
            self.list.push(Pending {
                cause,
                pause: FIRST_PAUSE,
                step: Step::Due(Instant::now()),
            });
        }
    }

    /// How long the thread may sleep, if there is anything to zero.
    pub(super) fn pause(&self) -> Option<Duration> {
        let pauses = self.list.iter().map(|pending| match &pending.step {
            Step::Due(when) => when.saturating_duration_since(Instant::now()),
            Step::Running { since, .. } => nap(since.elapsed()).max(SHORTEST_NAP),
        });
        pauses.min()
    }

    /// Brings each as far as it gets without waiting.
    pub(super) fn advance(&mut self, core: &Core) {
        for mut pending in mem::take(&mut self.list) {
            if self.advance_one(core, &mut pending) {
                self.list.push(pending);
            }
        }
    }

    /// False when there is nothing left to do.
    fn advance_one(&mut self, core: &Core, pending: &mut Pending) -> bool {
        if let Step::Due(when) = pending.step {
            if Instant::now() < when {
                return true;
            }
            let Some(memory) = core.to_zero(pending.cause) else {
                return false;
            };
            match self.stream(core) {
                Ok(stream) => pending.step = Step::begin(&**stream, &memory),
                Err(error) => {
                    pending.failed(core, &error);
                    return true;
                }
            }
        }
        let Step::Running { end, queued, .. } = &mut pending.step else {
            return true;
        };
        let Some(ended) = end.outcome() else {
            return true;
        };
        match mem::replace(queued, Ok(())).and(ended.map_err(Into::into)) {
            Ok(()) => {
                core.zeroed(pending.cause);
                false
            }
            Err(error) => {
                pending.failed(core, &error);
                true
            }
        }
    }

    fn stream(&mut self, core: &Core) -> Result<&Arc<dyn CopyStream>> {
        match &mut self.stream {
            Some(stream) => Ok(stream),
            none => Ok(none.insert(core.layer.stream(&core.device)?)),
        }
    }
}

impl Step {
    fn begin(stream: &dyn CopyStream, memory: &Memory) -> Self {
        let queued = stream.zero(memory, 0, memory.bytes());
        Self::Running {
            since: Instant::now(),
            queued: queued.map_err(Into::into),
            end: stream.end(),
        }
    }
}

impl Pending {
    /// It is tried again later. Until then the slab stays out of other tenants' hands, because nothing is said.
    fn failed(&mut self, core: &Core, error: &Error) {
        let (region, pause) = (self.cause.region(), self.pause);
        warn!(%error, %region, ?pause, "a slab could not be zeroed; it is tried again after the pause");
        core.state.lock().failed_scrubs += 1;
        self.step = Step::Due(Instant::now() + pause);
        self.pause = LONGEST_PAUSE.min(2 * pause);
    }
}

impl Cause {
    fn region(self) -> RegionId {
        match self {
            Self::Asked(scrub) => scrub.region,
            Self::Soiled(region) => region,
        }
    }
}

impl Core {
    /// The memory to zero. Nothing when there is no cause any more.
    fn to_zero(&self, cause: Cause) -> Option<Memory> {
        let state = self.state.lock();
        let region = state.regions.get(&cause.region())?;
        let wanted = match cause {
            Cause::Asked(scrub) => !region.soiled && !region.is_scrubbed(&scrub),
            Cause::Soiled(_) => region.soiled,
        };
        wanted.then(|| region.memory.clone())
    }

    fn zeroed(&self, cause: Cause) {
        let mut state = self.state.lock();
        let Some(region) = state.regions.get_mut(&cause.region()) else {
            return;
        };
        match cause {
            Cause::Asked(_) if region.soiled => {}
            Cause::Asked(scrub) => {
                region.note_scrubbed(&scrub);
                state.scrubbed += 1;
                drop(state);
                self.session.scrubbed(&scrub);
            }
            Cause::Soiled(_) => {
                region.soiled = false;
                drop(state);
                self.tell(Task::Tell);
            }
        }
    }
}
