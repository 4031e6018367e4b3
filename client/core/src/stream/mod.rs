//! The stitched pool: a KV cache whose first part is local HBM and whose rest lies in leased slabs, at addresses that stay.
//!
//! What is here decides, and does nothing itself: [`Homes`] knows where each unit's bytes are, and plans which units move
//! at a step boundary. Copies, mappings and leases are the business of whoever asks it.

mod homes;
mod plan;

#[cfg(test)]
mod homes_tests;

pub use homes::{Counts, Home, Homes, HomesConfig, SlabId, UnitId};
pub use plan::{Costs, Landed, Move};
