//! The node's broker. It tracks idle HBM, leases it out, and indexes the KV blocks in it.
//!
//! [`core`] decides, and the rest of the crate carries the decisions out. This is the way of a request: [`listen`]
//! finds out who connected, [`service`] checks the message, and [`owner`] applies the event to the core. Then it writes
//! what must not be forgotten to the [`ledger`], and only after that it sends the answer.

pub mod authority;
pub mod calls;
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
mod malformed;
pub mod metrics;
pub mod owner;
pub mod peer;
pub mod probe;
pub mod scrape;
pub mod serve;
pub mod service;
mod streams;
pub mod traces;
mod unread;
