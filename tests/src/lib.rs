//! What the multi-process tests and benches share: the real programs, and engines whose bytes can be checked.

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
pub mod stub;
pub mod wire;

/// The longest a test waits for what must come, and the drain window of whom nothing must keep from using it. Long, so
/// that a busy machine decides nothing.
pub const PATIENCE: Duration = Duration::from_secs(180);
