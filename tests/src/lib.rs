//! What the multi-process tests and benches share: the real programs, and engines whose bytes can be checked.

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
pub mod seed;
pub mod wire;
