//! The stitched pool: a KV cache whose first part is local HBM and whose rest lies in leased slabs, at addresses that stay.
//!
//! * [`Homes`] decides (`homes`, `home`): it knows where each unit's bytes are, and plans which units move at a step boundary.
//! * [`StreamPool`] is what an engine has (`pool`, `open`, `config`, `stats`): it leases slabs, lays tensors out, and is told when a step
//!   begins and ends.
//! * The mover carries plans out (`mover`): it copies a unit, puts its new home in the place of the old one, and settles.
//! * It holds slabs (`holder`): one that is asked back is let go of when its unit has left it.
//!
//! The pool's lock (`state`) is taken before the leases', and never held during a copy, a call or a remap.

mod config;
mod core;
mod holder;
mod home;
mod homes;
#[cfg(test)]
mod homes_tests;
mod mover;
mod open;
mod pool;
mod state;
mod stats;

pub use config::{LaidOut, StreamConfig, Tensor};
pub use home::{Costs, Home, Landed, Move, SlabId, UnitId};
pub use homes::{Counts, Homes, HomesConfig};
pub use pool::StreamPool;
pub use stats::StreamStats;
