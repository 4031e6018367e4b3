//! What a stitched pool has done, and where its units are.

use swiftcache_proto::domain::LinkKind;

use super::homes::Counts;
use crate::latency::Latency;

/// What a stitched pool has done, and where its units are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamStats {
    /// Units that are laid out, or can be.
    pub units: u32,
    /// The size of each, bytes.
    pub unit_bytes: u64,
    /// Where they are.
    pub homes: Counts,
    /// Units by the way on which the device reaches them.
    pub by_link: [(LinkKind, u32); 4],
    /// Leased now, bytes, slabs on their way back included.
    pub leased_bytes: u64,
    /// Host memory that is held for units, bytes.
    pub floor_bytes: u64,
    /// Whether the broker is there.
    pub connected: bool,
    /// Units that have changed their home.
    pub moved_units: u64,
    /// Moves that failed.
    pub failed_moves: u64,
    /// Slabs asked back.
    pub revocations: u64,
    /// Leases that the broker did not know any more.
    pub refused_leases: u64,
    /// What the batches of moves took: one for each step that had something to move.
    pub steps: Latency,
    /// From a slab's revocation until no unit was in it.
    pub drain: Latency,
    /// From a slab's revocation to its acknowledgement.
    pub acknowledge: Latency,
}
