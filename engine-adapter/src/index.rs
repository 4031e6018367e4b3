//! `IndexWatch`: which blocks every rank can find in donors' memory.

use parking_lot::Mutex;
use pyo3::prelude::*;
use swiftcache_client::{
    device::Origin,
    session::{Findable, IndexWatch as Watch},
};
use swiftcache_proto::domain::Medium;

use crate::{
    arguments,
    gil::{drop_unlocked, unlocked},
};

/// A block, whether it is in host memory, and whether it can be found there.
type Told = (Vec<u8>, bool, bool);

/// Which blocks every rank can find in donors' memory.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct IndexWatch {
    /// Nothing where there is no session.
    watch: Mutex<Option<Watch>>,
    /// A child of this process has no session, and hears nothing.
    origin: Origin,
}

impl IndexWatch {
    pub(crate) fn new(watch: Option<Watch>) -> Self {
        Self {
            watch: Mutex::new(watch),
            origin: Origin::here(),
        }
    }

    /// What is to be told, if there is a session.
    fn ask(&self, question: impl FnOnce(&Watch) -> Vec<Findable>) -> Vec<Told> {
        if !self.origin.is_here() {
            return Vec::new();
        }
        let told = self.watch.lock().as_ref().map(question);
        let told = told.unwrap_or_default().into_iter();
        told.map(|it| (it.hash.0.to_vec(), it.medium == Medium::Host, it.found))
            .collect()
    }
}

#[pymethods]
impl IndexWatch {
    fn name(&self, py: Python<'_>, hashes: &[u8]) -> PyResult<()> {
        unlocked(py, || {
            let hashes = arguments::hashes(hashes)?;
            self.ask(|watch| {
                watch.name(&hashes);
                Vec::new()
            });
            Ok(())
        })
    }

    fn forget(&self, py: Python<'_>, hashes: &[u8]) -> PyResult<Vec<Told>> {
        unlocked(py, || {
            let hashes = arguments::hashes(hashes)?;
            Ok(self.ask(|watch| watch.forget(&hashes)))
        })
    }

    fn take(&self, py: Python<'_>) -> PyResult<Vec<Told>> {
        unlocked(py, || Ok(self.ask(Watch::take)))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        unlocked(py, || {
            if self.origin.is_here() {
                drop(self.watch.lock().take());
            }
            Ok(())
        })
    }
}

impl Drop for IndexWatch {
    fn drop(&mut self) {
        let watch = self.watch.get_mut().take();
        match self.origin.is_here() {
            true => drop_unlocked(watch),
            false => std::mem::forget(watch),
        }
    }
}
