//! `Load`: blocks on their way into the pool.

use std::sync::{
    Arc,
    mpsc::{Receiver, TryRecvError},
};

use parking_lot::{
    MappedRwLockReadGuard, MappedRwLockWriteGuard, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use pyo3::prelude::*;
use swiftcache_client::{cache, device::Origin};

use crate::{
    arguments,
    failure::{Failure, Result},
    gil::{at_once, drop_unlocked, unlocked, unlocked_if},
    mark::Point,
    place::Place,
    promised::EngineStream,
    worker::{Opened, Worker},
};

/// Blocks on their way into the pool.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Load {
    state: RwLock<State>,
    /// Positions from here on were not found.
    found: u32,
    asked: u32,
    layers: usize,
    /// Where its copies end. In a child of that process all of it has failed.
    origin: Origin,
}

#[derive(Debug)]
enum State {
    /// Another thread queues its copies.
    Starting(Mutex<Receiver<Option<Begun>>>),
    Begun(Begun),
}

#[derive(Debug)]
enum Begun {
    Running(cache::Load, Arc<Place>),
    /// The failed positions.
    Over(Vec<u32>),
}

impl State {
    fn begun(&self) -> Option<&Begun> {
        match self {
            Self::Starting(_) => None,
            Self::Begun(begun) => Some(begun),
        }
    }

    fn begun_mut(&mut self) -> Option<&mut Begun> {
        match self {
            Self::Starting(_) => None,
            Self::Begun(begun) => Some(begun),
        }
    }
}

impl Load {
    /// Starts to load the first blocks of a hit, of `asked` in all. Nothing without a pool, or when nobody can say when the
    /// engine is done with its blocks.
    pub(crate) fn start(
        open: &Opened,
        hit: &cache::Hit,
        blocks: &[u32],
        after: &Point,
        asked: usize,
    ) -> Option<Self> {
        let kv = open.kv()?;
        let load = match after {
            Point::Unknown => return None,
            Point::Over => open.borrower.load(hit, blocks, &kv),
            Point::At(ticket) => open.borrower.load_after(hit, blocks, &kv, ticket),
        };
        Some(Self::running(open, load, blocks.len(), asked))
    }

    /// Has the first blocks of a claim loaded, by another thread: whoever needs to know of a copy waits until all of them
    /// are queued. As [`start`](Self::start).
    pub(crate) fn start_claimed(
        worker: &Arc<Worker>,
        claim: Option<cache::Claim>,
        blocks: Vec<u32>,
        after: Point,
    ) -> Self {
        let mut load = Self::miss(blocks.len(), worker.layers());
        let Some(claim) = claim.filter(|_| worker.is_here()) else {
            return load;
        };
        load.found = load.asked;
        let its = Arc::clone(worker);
        let started = worker.starter.run(move || {
            its.with_open(|open| {
                let kv = open.kv()?;
                let after = match &after {
                    Point::Unknown => return None,
                    Point::Over => None,
                    Point::At(ticket) => Some(ticket),
                };
                let load = claim.load(&blocks, &kv, after);
                Some(Begun::Running(load, Arc::clone(&open.place)))
            })
        });
        load.state = RwLock::new(State::Starting(Mutex::new(started)));
        load
    }

    /// Starts to load the first of the blocks that are `there`, as `start` does it; if it does not, all of them are missing.
    pub(crate) fn of_first(
        worker: &Worker,
        blocks: &[u32],
        there: usize,
        start: impl FnOnce(&Opened) -> Option<Self>,
    ) -> Result<Self> {
        Self::check_first(blocks, there)?;
        let load = worker.with_open(start);
        Ok(load.unwrap_or_else(|| Self::miss(blocks.len(), worker.layers())))
    }

    /// Whether they are the first ones of the blocks that are `there`.
    pub(crate) fn check_first(blocks: &[u32], there: usize) -> Result<()> {
        let asked = blocks.len();
        if asked > there {
            let problem = format!("has {asked} entries for {there} blocks that were found");
            return Err(Failure::argument("blocks", problem));
        }
        Ok(())
    }

    fn running(open: &Opened, load: cache::Load, found: usize, asked: usize) -> Self {
        Self {
            state: RwLock::new(State::Begun(Begun::Running(load, Arc::clone(&open.place)))),
            found: found as u32,
            asked: asked as u32,
            layers: open.borrower.config().layout.layer_bytes.len(),
            origin: Origin::here(),
        }
    }

    pub(crate) fn miss(asked: usize, layers: usize) -> Self {
        let asked = asked as u32;
        Self {
            state: RwLock::new(State::Begun(Begun::Over((0..asked).collect()))),
            found: 0,
            asked,
            layers,
            origin: Origin::here(),
        }
    }

    fn check(&self, layer: usize) -> Result<()> {
        if layer < self.layers {
            return Ok(());
        }
        let problem = format!("is {layer}; there are {}", self.layers);
        Err(Failure::argument("layer", problem))
    }

    /// Its state, once all copies are queued.
    fn begun(&self) -> MappedRwLockReadGuard<'_, Begun> {
        loop {
            match RwLockReadGuard::try_map(self.state.read(), State::begun) {
                Ok(begun) => return begun,
                Err(starting) => drop(starting),
            }
            drop(self.begun_mut());
        }
    }

    /// As [`begun`](Self::begun).
    fn begun_mut(&self) -> MappedRwLockWriteGuard<'_, Begun> {
        loop {
            let mut state = self.state.write();
            if let State::Starting(started) = &*state {
                let started = started.lock().recv();
                *state = self.after_start(started.ok().flatten());
            }
            if let Ok(begun) = RwLockWriteGuard::try_map(state, State::begun_mut) {
                return begun;
            }
        }
    }

    /// Its state if that is known now: all copies are queued, and nobody waits for its start or its end, which holds the lock.
    fn known(&self) -> Option<MappedRwLockReadGuard<'_, Begun>> {
        match RwLockReadGuard::try_map(self.state.try_read()?, State::begun) {
            Ok(begun) => return Some(begun),
            Err(starting) => drop(starting),
        }
        let mut state = self.state.try_write()?;
        if let State::Starting(started) = &*state {
            let started = match started.lock().try_recv() {
                Err(TryRecvError::Empty) => return None,
                started => started.ok().flatten(),
            };
            *state = self.after_start(started);
        }
        RwLockReadGuard::try_map(RwLockWriteGuard::downgrade(state), State::begun).ok()
    }

    /// What has become of its start: nothing, where the cache was closed or the other thread is gone.
    fn after_start(&self, started: Option<Begun>) -> State {
        State::Begun(started.unwrap_or_else(|| Begun::Over((0..self.asked).collect())))
    }

    /// Whether it is known to be over. False while somebody waits for that, too.
    fn is_over(&self) -> bool {
        if !self.origin.is_here() {
            return true;
        }
        self.known().is_some_and(|begun| match &*begun {
            Begun::Running(load, _) => load.is_done(),
            Begun::Over(_) => true,
        })
    }

    /// Waits until it is over. The failed positions.
    fn end(&self) -> Vec<u32> {
        if !self.origin.is_here() {
            return (0..self.asked).collect();
        }
        let mut begun = self.begun_mut();
        // Should finishing panic, every position has failed.
        let all = Begun::Over((0..self.asked).collect());
        let failed = match std::mem::replace(&mut *begun, all) {
            Begun::Running(load, _) => self.with_missing(load.finish().failed),
            Begun::Over(failed) => failed,
        };
        *begun = Begun::Over(failed.clone());
        failed
    }

    /// Positions, from those the client says failed.
    fn with_missing(&self, mut failed: Vec<u32>) -> Vec<u32> {
        failed.extend(self.found..self.asked);
        failed
    }
}

#[pymethods]
impl Load {
    fn missing(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        unlocked(py, || {
            if !self.origin.is_here() {
                return Ok((0..self.asked).collect());
            }
            Ok(match &*self.begun() {
                Begun::Running(load, _) => self.with_missing(load.missing()),
                Begun::Over(failed) => failed.clone(),
            })
        })
    }

    fn promise(&self, py: Python<'_>, most_bytes: &Bound<'_, PyAny>) -> PyResult<bool> {
        let most_bytes = arguments::number("most_bytes", most_bytes)?;
        let promise = |begun: &Begun| match begun {
            Begun::Running(load, _) => self.found == self.asked && load.promise(most_bytes),
            Begun::Over(failed) => failed.is_empty(),
        };
        let known = at_once(|| {
            if !self.origin.is_here() {
                return Ok(Some(false));
            }
            Ok(self.known().map(|begun| promise(&begun)))
        });
        match known? {
            Some(promised) => Ok(promised),
            None => unlocked(py, || Ok(promise(&self.begun()))),
        }
    }

    fn wait_layer(&self, py: Python<'_>, layer: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let layer = arguments::number("layer", layer)?;
        unlocked(py, || {
            self.check(layer)?;
            if !self.origin.is_here() {
                return Ok((0..self.asked).collect());
            }
            Ok(match &*self.begun() {
                Begun::Running(load, _) => {
                    let failed = load.wait_layer(layer).err();
                    self.with_missing(failed.map(|error| error.failed).unwrap_or_default())
                }
                Begun::Over(failed) => failed.clone(),
            })
        })
    }

    fn gate_layer(
        &self,
        py: Python<'_>,
        layer: &Bound<'_, PyAny>,
        stream: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let layer = arguments::number("layer", layer)?;
        let stream = EngineStream::read(stream)?;
        let gate = |begun: &Begun| match begun {
            Begun::Running(load, place) => stream.gate(place, load.layer_tickets(layer)),
            Begun::Over(_) => Vec::new(),
        };
        let gated = at_once(|| {
            self.check(layer)?;
            if !self.origin.is_here() {
                return Ok(Some(Vec::new()));
            }
            Ok(self.known().map(|begun| gate(&begun)))
        });
        let gated = gated?;
        if gated.as_ref().is_some_and(Vec::is_empty) {
            return Ok(());
        }
        unlocked(py, || {
            for ticket in gated.unwrap_or_else(|| gate(&self.begun())) {
                // Whether the copies failed is known when the load is finished.
                let _ = ticket.wait();
            }
            Ok(())
        })
    }

    fn is_done(&self) -> PyResult<bool> {
        at_once(|| Ok(self.is_over()))
    }

    fn finish(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        let over = self.is_done()?;
        unlocked_if(py, !over, || Ok(self.end()))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let over = State::Begun(Begun::Over(Vec::new()));
        let state = std::mem::replace(self.state.get_mut(), over);
        if !self.origin.is_here() {
            return std::mem::forget(state);
        }
        // What another thread starts it lets go of itself.
        if let State::Begun(Begun::Running(..)) = state {
            drop_unlocked(state);
        }
    }
}
