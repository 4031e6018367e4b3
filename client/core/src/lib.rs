//! SwiftCache's client, which engines link: sessions with the broker, donors and borrowers.

pub mod cache;
mod check;
pub mod disk;
pub mod donor;
pub mod error;
mod latency;
mod leases;
pub mod session;
pub mod stream;
mod threads;
mod transfer;

/// The device layer, whose types this crate's functions take and give.
pub use swiftcache_device as device;

pub use error::{Error, Result};
