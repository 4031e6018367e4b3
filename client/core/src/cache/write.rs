//! What a transfer writes into slots: blocks that become readable when it is over.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::blocks::BlockId;
use crate::leases::Flight;

/// How many written blocks were kept, and how many were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    pub(super) kept: u32,
    pub(super) lost: u32,
}

/// A transfer that writes blocks, which nobody may read before it is over.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) flight: Arc<Flight>,
    /// The engine's write-back. Otherwise blocks that were moved to make room.
    pub(super) stores: bool,
    /// The blocks; taken by whoever settles them.
    pub(super) blocks: Mutex<Vec<BlockId>>,
    /// What became of them, once somebody has settled them.
    pub(super) settled: OnceLock<Settled>,
}

impl Write {
    pub(super) fn new(flight: Arc<Flight>, stores: bool, blocks: Vec<BlockId>) -> Arc<Self> {
        Arc::new(Self {
            flight,
            stores,
            blocks: Mutex::new(blocks),
            settled: OnceLock::new(),
        })
    }
}
