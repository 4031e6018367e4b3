//! `Store`: blocks on their way out of the pool.

use std::collections::HashMap;

use parking_lot::RwLock;
use pyo3::prelude::*;
use swiftcache_client::{
    cache::{self, Stored},
    device::Origin,
};

use crate::gil::{at_once, drop_unlocked, unlocked};

/// Blocks on their way out of the pool.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Store {
    state: RwLock<State>,
    blocks: u32,
    /// Where its copies end. In a child of that process nothing is kept.
    origin: Origin,
}

#[derive(Debug)]
enum State {
    Running(cache::Store),
    Over(Stored),
}

impl Store {
    /// Of `blocks` blocks.
    pub(crate) fn running(store: cache::Store, blocks: usize) -> Self {
        Self::of(State::Running(store), blocks)
    }

    fn of(state: State, blocks: usize) -> Self {
        Self {
            state: RwLock::new(state),
            blocks: blocks as u32,
            origin: Origin::here(),
        }
    }

    /// Nothing is kept of `blocks` blocks.
    pub(crate) fn nothing(blocks: usize) -> Self {
        Self::of(State::Over(none_of(blocks as u32)), blocks)
    }
}

/// What became of so many blocks of which nothing is kept.
fn none_of(blocks: u32) -> Stored {
    Stored {
        unplaced: blocks,
        ..Stored::default()
    }
}

#[pymethods]
impl Store {
    fn is_done(&self) -> PyResult<bool> {
        at_once(|| Ok(self.is_over()))
    }

    fn unplaced(&self, py: Python<'_>) -> PyResult<u32> {
        unlocked(py, || {
            if !self.origin.is_here() {
                return Ok(self.blocks);
            }
            Ok(match &*self.state.read() {
                State::Running(store) => store.unplaced(),
                State::Over(stored) => stored.unplaced,
            })
        })
    }

    fn finish(&self, py: Python<'_>) -> PyResult<HashMap<&'static str, u32>> {
        // Blocks are published when they are stored, and the broker is waited for.
        let stored = unlocked(py, || Ok(self.end()))?;
        Ok(HashMap::from([
            ("stored", stored.stored),
            ("known", stored.known),
            ("unplaced", stored.unplaced),
            ("lost", stored.lost),
        ]))
    }
}

impl Store {
    /// Whether it is known to be over. False while somebody waits for that, too, who holds the lock.
    fn is_over(&self) -> bool {
        if !self.origin.is_here() {
            return true;
        }
        self.state.try_read().is_some_and(|state| match &*state {
            State::Running(store) => store.is_done(),
            State::Over(_) => true,
        })
    }

    /// Waits until it is over.
    fn end(&self) -> Stored {
        if !self.origin.is_here() {
            return none_of(self.blocks);
        }
        let mut state = self.state.write();
        let stored = match std::mem::replace(&mut *state, State::Over(Stored::default())) {
            State::Running(store) => store.finish(),
            State::Over(stored) => stored,
        };
        *state = State::Over(stored);
        stored
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let over = State::Over(Stored::default());
        let state = std::mem::replace(self.state.get_mut(), over);
        if !self.origin.is_here() {
            return std::mem::forget(state);
        }
        if let State::Running(_) = state {
            drop_unlocked(state);
        }
    }
}
