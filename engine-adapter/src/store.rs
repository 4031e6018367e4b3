//! `Store`: blocks on their way out of the pool.

use std::collections::HashMap;

use parking_lot::RwLock;
use pyo3::prelude::*;
use swiftcache_client::cache::{self, Stored};

use crate::unlocked::{drop_unlocked, unlocked};

/// Blocks on their way out of the pool.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Store(RwLock<State>);

#[derive(Debug)]
enum State {
    Running(cache::Store),
    Over(Stored),
}

impl Store {
    pub(crate) fn running(store: cache::Store) -> Self {
        Self(RwLock::new(State::Running(store)))
    }

    /// Nothing is kept of `blocks` blocks.
    pub(crate) fn nothing(blocks: usize) -> Self {
        Self(RwLock::new(State::Over(Stored {
            unplaced: blocks as u32,
            ..Stored::default()
        })))
    }
}

#[pymethods]
impl Store {
    fn is_done(&self, py: Python<'_>) -> PyResult<bool> {
        unlocked(py, || {
            // Somebody who waits for its end holds the lock.
            Ok(self.0.try_read().is_some_and(|state| match &*state {
                State::Running(store) => store.is_done(),
                State::Over(_) => true,
            }))
        })
    }

    fn unplaced(&self, py: Python<'_>) -> PyResult<u32> {
        unlocked(py, || {
            Ok(match &*self.0.read() {
                State::Running(store) => store.unplaced(),
                State::Over(stored) => stored.unplaced,
            })
        })
    }

    fn finish(&self, py: Python<'_>) -> PyResult<HashMap<&'static str, u32>> {
        unlocked(py, || {
            let mut state = self.0.write();
            let stored = match std::mem::replace(&mut *state, State::Over(Stored::default())) {
                State::Running(store) => store.finish(),
                State::Over(stored) => stored,
            };
            *state = State::Over(stored);
            Ok(HashMap::from([
                ("stored", stored.stored),
                ("known", stored.known),
                ("unplaced", stored.unplaced),
                ("lost", stored.lost),
            ]))
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let over = State::Over(Stored::default());
        let state = std::mem::replace(self.0.get_mut(), over);
        if let State::Running(_) = state {
            drop_unlocked(state);
        }
    }
}
