//! Replays a trace of a busy model against donors, and compares three ways to keep its prefix cache.

pub mod chat;
pub mod compare;
pub mod donor_load;
pub mod error;
pub mod html;
mod lent;
pub mod measured;
pub mod models;
pub mod neighbours;
pub mod node;
pub mod pattern;
pub mod pipeline;
pub mod plan;
pub mod pool;
pub mod prefix_cache;
pub mod report;
pub mod roofline;
pub mod serving;
pub mod sizing;
pub mod tiered;
pub mod trace;

pub use error::ReplayError;
