//! SwiftCache's client: the device layer, donors, borrowers, and the `swiftcache` command.

pub mod borrower;
pub mod cli;
pub mod device;
pub mod donor;
pub mod error;
pub mod replay;
pub mod session;

pub use error::{Error, Result};
