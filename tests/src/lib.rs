//! The harness of the multi-process tests and benches: the real programs, and engines whose bytes can be checked.

use std::time::Duration;

pub mod census;
pub mod crew;
mod descriptors;
pub mod dynamic;
pub mod engine;
pub mod full_stack;
pub mod gate;
pub mod node;
pub mod operator;
pub mod programs;
pub mod rescue;
pub mod scene;
pub mod seed;
pub mod stitched;
pub mod stub;
pub mod wire;

/// The longest time that a test waits for something that must happen. It is also the drain window of donors whose
/// borrowers must have time enough. It is long, so that no result depends on how busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(180);
