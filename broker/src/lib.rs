//! The node's broker: tracks idle HBM, leases it out, and indexes the KV blocks kept in it.
//!
//! [`core`] decides; the rest of the crate carries out. A request's way: [`listen`] tells who connected,
//! [`service`] checks the message, [`owner`] lets the event happen to the core, writes what must not be forgotten
//! to the [`ledger`], and only then the answer leaves.

pub mod config;
pub mod core;
pub mod death;
pub mod descriptors;
pub mod error;
pub mod events;
pub mod fd_socket;
pub mod ledger;
pub mod listen;
pub mod logging;
pub mod metrics;
pub mod owner;
pub mod peer;
pub mod probe;
pub mod scrape;
pub mod serve;
pub mod service;
mod streams;
pub mod traces;
