//! `Load`: blocks on their way into the pool.

use std::sync::Arc;

use parking_lot::RwLock;
use pyo3::prelude::*;
use swiftcache_client::{cache, device::Origin};

use crate::{
    arguments,
    failure::{Failure, Result},
    mark::Point,
    place::Place,
    promised::EngineStream,
    unlocked::{drop_unlocked, unlocked},
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
    Running(cache::Load, Arc<Place>),
    /// The failed positions.
    Over(Vec<u32>),
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

    /// Starts to load the first blocks of a claim. As [`start`](Self::start).
    pub(crate) fn start_claimed(
        open: &Opened,
        claim: cache::Claim,
        blocks: &[u32],
        after: &Point,
    ) -> Option<Self> {
        let kv = open.kv()?;
        let after = match after {
            Point::Unknown => return None,
            Point::Over => None,
            Point::At(ticket) => Some(ticket),
        };
        let load = claim.load(blocks, &kv, after);
        Some(Self::running(open, load, blocks.len(), blocks.len()))
    }

    /// Starts to load the first of the blocks that are `there`, as `start` does it; if it does not, all of them are missing.
    pub(crate) fn of_first(
        worker: &Worker,
        blocks: &[u32],
        there: usize,
        start: impl FnOnce(&Opened) -> Option<Self>,
    ) -> Result<Self> {
        let asked = blocks.len();
        if asked > there {
            let problem = format!("has {asked} entries for {there} blocks that were found");
            return Err(Failure::argument("blocks", problem));
        }
        let load = worker.with_open(start);
        Ok(load.unwrap_or_else(|| Self::miss(asked, worker.layers())))
    }

    fn running(open: &Opened, load: cache::Load, found: usize, asked: usize) -> Self {
        Self {
            state: RwLock::new(State::Running(load, Arc::clone(&open.place))),
            found: found as u32,
            asked: asked as u32,
            layers: open.borrower.config().layout.layer_bytes.len(),
            origin: Origin::here(),
        }
    }

    pub(crate) fn miss(asked: usize, layers: usize) -> Self {
        let asked = asked as u32;
        Self {
            state: RwLock::new(State::Over((0..asked).collect())),
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
            Ok(match &*self.state.read() {
                State::Running(load, _) => self.with_missing(load.missing()),
                State::Over(failed) => failed.clone(),
            })
        })
    }

    fn promise(&self, py: Python<'_>, most_bytes: &Bound<'_, PyAny>) -> PyResult<bool> {
        let most_bytes = arguments::number("most_bytes", most_bytes)?;
        unlocked(py, || {
            if !self.origin.is_here() {
                return Ok(false);
            }
            Ok(match &*self.state.read() {
                State::Running(load, _) => self.found == self.asked && load.promise(most_bytes),
                State::Over(failed) => failed.is_empty(),
            })
        })
    }

    fn wait_layer(&self, py: Python<'_>, layer: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let layer = arguments::number("layer", layer)?;
        unlocked(py, || {
            self.check(layer)?;
            if !self.origin.is_here() {
                return Ok((0..self.asked).collect());
            }
            Ok(match &*self.state.read() {
                State::Running(load, _) => {
                    let failed = load.wait_layer(layer).err();
                    self.with_missing(failed.map(|error| error.failed).unwrap_or_default())
                }
                State::Over(failed) => failed.clone(),
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
        unlocked(py, || {
            self.check(layer)?;
            if !self.origin.is_here() {
                return Ok(());
            }
            if let State::Running(load, place) = &*self.state.read() {
                stream.gate(place, load.layer_tickets(layer));
            }
            Ok(())
        })
    }

    fn is_done(&self, py: Python<'_>) -> PyResult<bool> {
        unlocked(py, || {
            if !self.origin.is_here() {
                return Ok(true);
            }
            // Somebody who waits for its end holds the lock.
            Ok(self.state.try_read().is_some_and(|state| match &*state {
                State::Running(load, _) => load.is_done(),
                State::Over(_) => true,
            }))
        })
    }

    fn finish(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        unlocked(py, || {
            if !self.origin.is_here() {
                return Ok((0..self.asked).collect());
            }
            let mut state = self.state.write();
            // Should finishing panic, every position has failed.
            let all = State::Over((0..self.asked).collect());
            let failed = match std::mem::replace(&mut *state, all) {
                State::Running(load, _) => self.with_missing(load.finish().failed),
                State::Over(failed) => failed,
            };
            *state = State::Over(failed.clone());
            Ok(failed)
        })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let state = std::mem::replace(self.state.get_mut(), State::Over(Vec::new()));
        if !self.origin.is_here() {
            return std::mem::forget(state);
        }
        if let State::Running(..) = state {
            drop_unlocked(state);
        }
    }
}
