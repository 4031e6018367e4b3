//! `Hit`: what a lookup found, held in place.

use std::sync::Arc;

use pyo3::prelude::*;
use swiftcache_client::cache;

use crate::{
    arguments,
    gil::{drop_unlocked, unlocked_if},
    load::Load,
    mark::{Mark, Point},
    worker::Worker,
};

/// The first blocks of a lookup's hashes that can be loaded.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Hit {
    worker: Arc<Worker>,
    /// Nothing while the cache was not open.
    found: Option<cache::Hit>,
}

impl Hit {
    pub(crate) fn new(worker: &Arc<Worker>, found: Option<cache::Hit>) -> Self {
        let worker = Arc::clone(worker);
        Self { worker, found }
    }
}

#[pymethods]
impl Hit {
    fn __len__(&self) -> usize {
        self.found.as_ref().map_or(0, |hit| hit.blocks() as usize)
    }

    #[getter]
    fn own_blocks(&self) -> u32 {
        self.found.as_ref().map_or(0, cache::Hit::own_blocks)
    }

    /// Blocks right behind that come from a disk, and within how many milliseconds.
    #[getter]
    fn coming(&self) -> (u32, u64) {
        let coming = (self.found.as_ref()).map_or_else(Default::default, cache::Hit::coming);
        (coming.blocks, coming.within.as_millis() as u64)
    }

    #[pyo3(signature = (blocks, after = None))]
    fn load(
        &self,
        py: Python<'_>,
        blocks: &Bound<'_, PyAny>,
        after: Option<&Bound<'_, Mark>>,
    ) -> PyResult<Load> {
        let blocks: Vec<u32> = arguments::number("blocks", blocks)?;
        let after = Point::of(after);
        let may_wait = (self.worker).with_open(|open| Some(open.kv()?.is_stitched()));
        unlocked_if(py, may_wait.unwrap_or(false), || {
            Load::of_first(&self.worker, &blocks, self.__len__(), |open| {
                Load::start(open, self.found.as_ref()?, &blocks, &after, blocks.len())
            })
        })
    }
}

impl Drop for Hit {
    fn drop(&mut self) {
        if let Some(found) = self.found.take() {
            drop_unlocked(found);
        }
    }
}
