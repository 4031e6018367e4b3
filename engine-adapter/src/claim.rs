//! `Claim`: blocks that are there until they are loaded.

use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::prelude::*;
use swiftcache_client::cache;

use crate::{
    arguments,
    gil::{at_once, drop_unlocked},
    load::Load,
    mark::{Mark, Point},
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
    fn load(&self, blocks: &Bound<'_, PyAny>, after: Option<&Bound<'_, Mark>>) -> PyResult<Load> {
        let blocks: Vec<u32> = arguments::number("blocks", blocks)?;
        let after = Point::of(after);
        at_once(|| {
            Load::check_first(&blocks, self.blocks)?;
            let claimed = self.claimed.lock().take();
            Ok(Load::start_claimed(&self.worker, claimed, blocks, after))
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
