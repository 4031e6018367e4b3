//! Operations: transfers, as revocations and unmapping see them.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::blocks::BlockId;
use crate::transfer::{AreaId, Transfer};

/// What copies are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Load,
    Store,
    /// From one slab to another.
    Move,
    /// Finding out whether a route works.
    Probe,
}

/// A transfer. Registered with every slab it touches, under the state's lock and before the first of its copies is queued,
/// so that a slab without one has no copy in flight.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) purpose: Purpose,
    pub(super) slabs: Vec<AreaId>,
    pub(super) transfer: Transfer,
    /// Blocks that become ready when the copies are over; taken by whoever settles them.
    pub(super) writes: Mutex<Vec<BlockId>>,
    /// How many of them were kept and lost, once somebody has settled them.
    pub(super) settled: OnceLock<(u32, u32)>,
}

impl Op {
    pub(super) fn new(purpose: Purpose, slabs: Vec<AreaId>, writes: Vec<BlockId>) -> Arc<Self> {
        Arc::new(Self {
            purpose,
            slabs,
            transfer: Transfer::default(),
            writes: Mutex::new(writes),
            settled: OnceLock::new(),
        })
    }

    pub(super) fn is_write(&self) -> bool {
        !self.writes.lock().is_empty()
    }
}
