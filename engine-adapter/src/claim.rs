//! `Claim`: blocks that are there until they are loaded.

use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::prelude::*;
use swiftcache_client::cache;

use crate::{
    arguments,
    failure::Failure,
    load::Load,
    mark::{Mark, Point},
    unlocked::{drop_unlocked, unlocked},
    worker::Worker,
};

/// The first blocks of some hashes, whose memory is not given back before they are loaded.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Claim {
    worker: Arc<Worker>,
    blocks: usize,
    /// Until it is loaded.
    claimed: Mutex<Option<cache::Claim>>,
}

impl Claim {
    pub(crate) fn new(worker: &Arc<Worker>, claimed: cache::Claim) -> Self {
        Self {
            worker: Arc::clone(worker),
            blocks: claimed.blocks() as usize,
            claimed: Mutex::new(Some(claimed)),
        }
    }
}

#[pymethods]
impl Claim {
    fn __len__(&self) -> usize {
        self.blocks
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
        unlocked(py, || {
            let (asked, claimed) = (blocks.len(), self.blocks);
            if asked > claimed {
                let problem = format!("has {asked} entries for {claimed} blocks that are claimed");
                return Err(Failure::argument("blocks", problem));
            }
            let load = self.claimed.lock().take().and_then(|claim| {
                (self.worker).with_open(|open| Load::start_claimed(open, claim, &blocks, &after))
            });
            Ok(load.unwrap_or_else(|| Load::miss(asked, self.worker.layers())))
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(claimed) = self.claimed.get_mut().take() {
            drop_unlocked(claimed);
        }
    }
}
