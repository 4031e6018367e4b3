//! When an engine touches an address space, and when it does not.
//!
//! An engine computes in steps. Memory under it can change between two of them only. [`Steps`] counts the steps that are begun,
//! remembers what each has left queued, and knows the copies of others in the space. From that it tells when nobody touches the
//! space: [`Steps::still`] gives a [`Standstill`], and steps and copies begin after it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use crate::{AddressSpace, Memory, Result, Standstill, Ticket, nap};

/// An engine's word that it touches an address space within steps only.
#[derive(Debug)]
pub struct EngineWord(());

impl EngineWord {
    /// Gives the engine's word.
    ///
    /// # Safety
    /// For as long as the [`Steps`] live that are made with it:
    /// * the engine touches the space only between [`Steps::begin`] and [`Steps::end`], but for work that it queued in between;
    /// * such work is over when the [`StepEnd`] says so that `end` was given;
    /// * copies with [`AddressSpace::memory`] are queued within a step and over at its end, or queued under a [`Touching`].
    pub unsafe fn given() -> Self {
        Self(())
    }
}

/// When the work is over that a step has queued.
#[derive(Clone, Debug)]
pub enum StepEnd {
    /// It is over.
    Over,
    /// When this point is passed.
    At(Ticket),
    /// Nobody can say. It is over when a later step's work is known to be.
    Unknown,
}

/// Tells whether copies are known to be over.
type IsOver = Box<dyn Fn() -> bool + Send>;

/// The steps of an engine in an address space.
pub struct Steps {
    space: Arc<AddressSpace>,
    state: Mutex<State>,
    /// A standstill has ended, or a step has.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Steps that are begun.
    begun: u32,
    /// Threads that wait to begin a step, which comes before another standstill.
    waiting: u32,
    /// There is a standstill, or somebody waits for one.
    still: bool,
    /// Ends of steps that may not be passed yet.
    ends: Vec<Ticket>,
    /// The last step's end is not known.
    unknown: bool,
    /// [`Touching`]s: somebody is about to queue copies.
    touching: u32,
    /// Copies of others that may not be over.
    copies: Vec<IsOver>,
    /// Nobody touches the space any more.
    closed: bool,
}

/// So many copies are remembered before those that are over are looked for.
const MANY_COPIES: usize = 64;

impl Steps {
    /// No step has begun.
    pub fn new(space: Arc<AddressSpace>, _: EngineWord) -> Arc<Self> {
        Arc::new(Self {
            space,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Where the engine computes.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// Begins a step: nothing is unmapped or replaced before it ends. Steps may overlap. Waits for a standstill to end.
    pub fn begin(&self) {
        let mut state = self.state.lock();
        // Within another step there is no standstill.
        if state.begun == 0 && state.still {
            state.waiting += 1;
            while state.still {
                self.changed.wait(&mut state);
            }
            state.waiting -= 1;
        }
        state.begun += 1;
    }

    /// Ends a step. False if none was begun.
    pub fn end(&self, end: StepEnd) -> bool {
        let mut state = self.state.lock();
        if state.begun == 0 {
            return false;
        }
        state.ends.retain(|end| !end.is_over());
        match end {
            StepEnd::Over => state.unknown = false,
            StepEnd::At(ticket) => {
                state.unknown = false;
                state.ends.push(ticket);
            }
            StepEnd::Unknown => state.unknown = true,
        }
        state.begun -= 1;
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Copies of others are about to touch the space: they may be queued as long as the result lives, which then is told how to know
    /// their end. Waits for a standstill to end. None when the space is closed.
    pub fn touch(self: &Arc<Self>) -> Option<Touching> {
        let mut state = self.state.lock();
        while state.begun == 0 && state.still && !state.closed {
            self.changed.wait(&mut state);
        }
        if state.closed {
            return None;
        }
        state.touching += 1;
        Some(Touching {
            steps: Arc::clone(self),
            is_over: None,
        })
    }

    /// A range of the space as memory that copies of the device can use: [`touch`](Self::touch) before each.
    ///
    /// # Errors
    /// When a part of the range is outside, not mapped, or closed.
    pub fn memory(self: &Arc<Self>, offset: u64, bytes: u64) -> Result<Memory> {
        let memory = self.space.memory(offset, bytes)?;
        memory.set_steps(Arc::clone(self));
        Ok(memory)
    }

    /// Nothing touches the space from now on but steps and copies that have begun.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }

    /// A standstill, if nobody touches the space within `patience`. None while a step is begun, or about to begin.
    pub fn still(&self, patience: Duration) -> Option<Still<'_>> {
        let began = Instant::now();
        {
            let mut state = self.state.lock();
            if state.begun > 0 || state.still || state.waiting > 0 || state.unknown {
                return None;
            }
            // From here on nothing begins.
            state.still = true;
        }
        let still = Still { steps: self };
        while !self.is_quiet() {
            if began.elapsed() >= patience {
                return None;
            }
            std::thread::sleep(nap(began.elapsed()).max(Duration::from_micros(20)));
        }
        Some(still)
    }

    /// Whether everything that was queued in the space is over. Nothing begins meanwhile.
    fn is_quiet(&self) -> bool {
        let mut state = self.state.lock();
        state.ends.retain(|end| !end.is_over());
        state.copies.retain(|is_over| !is_over());
        state.touching == 0 && state.ends.is_empty() && state.copies.is_empty()
    }
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Steps")
            .field("begun", &state.begun)
            .field("still", &state.still)
            .field("ends", &state.ends.len())
            .field("copies", &state.copies.len())
            .finish()
    }
}

/// Somebody queues copies that touch the space. There is no standstill before they are known to be over.
pub struct Touching {
    steps: Arc<Steps>,
    is_over: Option<IsOver>,
}

impl Touching {
    /// No more copies are queued. `is_over` tells when those that were are known to be over.
    pub fn until(mut self, is_over: impl Fn() -> bool + Send + 'static) {
        self.is_over = Some(Box::new(is_over));
    }
}

impl Drop for Touching {
    fn drop(&mut self) {
        let mut state = self.steps.state.lock();
        state.touching -= 1;
        if let Some(is_over) = self.is_over.take() {
            if state.copies.len() >= MANY_COPIES {
                state.copies.retain(|is_over| !is_over());
            }
            state.copies.push(is_over);
        }
    }
}

impl fmt::Debug for Touching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Touching({:?})", self.steps.space)
    }
}

/// Nobody touches the space as long as this lives.
#[derive(Debug)]
pub struct Still<'a> {
    steps: &'a Steps,
}

impl Still<'_> {
    /// What lets pieces be unmapped and replaced.
    pub fn standstill(&self) -> Standstill<'_> {
        // SAFETY: the engine gave its word that it touches the space within steps only, and that nobody else does without
        // saying so (`EngineWord`). None of that is going on, and none begins before this is dropped. Who has the standstill
        // uses nothing that it has unmapped: that is not reachable but through the space.
        unsafe { self.steps.space.stand_still() }
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.steps.state.lock().still = false;
        self.steps.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use swiftcache_proto::{domain::HandleKind, topology::Topology};

    use super::*;
    use crate::{AddressSpaces, Change, DeviceLayer, host::HostLayer, testing::Gate};

    const SHORT: Duration = Duration::from_millis(1);
    /// No test takes so long.
    const PATIENCE: Duration = Duration::from_secs(180);

    fn steps() -> (HostLayer, Arc<Steps>) {
        let topology = Topology::load("hgx-8").unwrap();
        let layer = HostLayer::from_topology(&topology, false).unwrap();
        let device = topology.devices[0].uuid.clone();
        let bytes = layer.granularity(&device).unwrap();
        let space = layer.reserve(&device, bytes).unwrap();
        let memory = layer.allocate(&device, bytes, HandleKind::PosixFd).unwrap();
        space.map(0, &memory).unwrap();
        // SAFETY: nothing touches the space but this test's threads, within steps.
        (layer, Steps::new(space, unsafe { EngineWord::given() }))
    }

    #[test]
    fn there_is_no_standstill_within_a_step_nor_before_its_work_is_over() {
        let (_, steps) = steps();
        steps.begin();
        steps.begin();
        assert!(steps.still(SHORT).is_none());
        assert!(steps.end(StepEnd::Over));
        assert!(steps.still(SHORT).is_none(), "the outer step goes on");
        let gate = Arc::<Gate>::default();
        assert!(steps.end(StepEnd::At(gate.ticket())));
        assert!(steps.still(SHORT).is_none(), "its work goes on");
        gate.open();
        assert!(steps.still(SHORT).is_some());
        assert!(!steps.end(StepEnd::Over), "none was begun");
        // Not knowing is not over.
        steps.begin();
        steps.end(StepEnd::Unknown);
        assert!(steps.still(SHORT).is_none());
        steps.begin();
        steps.end(StepEnd::Over);
        assert!(steps.still(SHORT).is_some());
    }

    #[test]
    fn copies_of_others_are_waited_for() {
        let (_, steps) = steps();
        let over = Arc::new(AtomicBool::new(false));
        let its = Arc::clone(&over);
        let touching = steps.touch().unwrap();
        assert!(steps.still(SHORT).is_none(), "copies may be queued");
        touching.until(move || its.load(Ordering::Acquire));
        assert!(steps.still(SHORT).is_none(), "they are not over");
        over.store(true, Ordering::Release);
        assert!(steps.still(SHORT).is_some());
        // Nothing was queued.
        drop(steps.touch());
        assert!(steps.still(SHORT).is_some());
        steps.close();
        assert!(steps.touch().is_none());
    }

    #[test]
    fn a_step_begins_after_a_standstill_and_before_the_next() {
        let (layer, steps) = steps();
        let device = steps.space().device().clone();
        let bytes = steps.space().bytes();
        let still = steps.still(PATIENCE).unwrap();
        assert!(steps.still(SHORT).is_none(), "one at a time");
        let begun = Arc::new(AtomicBool::new(false));
        let (its, told) = (Arc::clone(&steps), Arc::clone(&begun));
        let engine = std::thread::spawn(move || {
            its.begin();
            told.store(true, Ordering::Release);
        });
        while steps.state.lock().waiting == 0 {
            std::thread::yield_now();
        }
        let other = layer.allocate(&device, bytes, HandleKind::PosixFd).unwrap();
        let change = Change {
            offset: 0,
            memory: other,
        };
        still.standstill().replace(&[change]).unwrap();
        assert!(!begun.load(Ordering::Acquire), "it begins too early");
        drop(still);
        engine.join().unwrap();
        assert!(steps.still(SHORT).is_none(), "it has begun");
    }
}
