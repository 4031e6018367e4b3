//! The disk: KV blocks below host memory, in one bounded file that outlives processes and the machine's uptime.

mod agent;
mod file;
mod format;
mod room;
mod runs;
mod store;
#[cfg(test)]
mod store_tests;
mod telling;
#[cfg(test)]
mod telling_tests;

pub use agent::{DiskAgent, DiskConfig};
pub use store::{DiskStore, News, Put, StoreConfig, StoreStats};
