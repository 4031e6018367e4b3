//! The broker's state machine: no I/O, no clock, no async. Everything that happens is an [`Event`]; everything
//! the broker does about it is an [`Effect`].
//!
//! The books come first: `Sessions`, `Regions`, `Leases`, `Index`, `Claims` and smaller ones each own what they know, and
//! check it. `books` keeps them in step. Above it is one file for each thing that happens, and at the top
//! [`State`], which hands events out. Files use only what is below them.

// What everything is made of.
mod account;
mod arena;
mod check;
mod config;
mod counters;
mod effect;
mod event;
mod journal;
mod process;
mod record;
mod shares;
mod slots;

// The books.
mod borrowers;
mod claims;
mod devices;
mod disks;
mod holders;
mod holds;
mod index;
mod leases;
mod pins;
mod quotas;
mod region;
mod regions;
mod sessions;
mod unmappable;

mod books;

// What happens, from what others are made of to what is made of others.
mod attendance;
mod bequest;
mod disking;
mod estates;
mod fairness;
mod holding;
mod keeping;
mod lending;
mod lookup;
mod offering;
mod operator;
mod publishing;
mod returning;
mod revocation;
mod scrubs;
mod sharing;
mod watching;
mod withdrawal;

// Out of and into the books.
mod records;
mod restore;
mod views;

mod state;

mod recorded;

#[cfg(test)]
mod tests;

pub use account::Account;
pub use config::{CoreConfig, Node};
pub use counters::Counters;
pub use effect::{DiskBlocks, Effect, Grant, Inherited, Note, Outgoing, Refusal, Reply};
pub use event::{
    Caller, Connection, DiskSays, DiskState, DiskTakes, DrainTarget, Event, EvictTarget, Forget,
    HoldDemand, HoldId, InheritDemand, Keep, LeaseDemand, Lookup, Now, Offer, Publish, QuotaTarget,
    Register, SetQuota, Withdraw, WithdrawWhat,
};
pub use journal::{Change, Scope};
pub use process::Process;
pub use quotas::is_uid;
pub use record::Record;
pub use recorded::Recorded;
pub use restore::LedgerError;
pub use state::State;
pub use views::{
    BlocksGone, DeviceView, DiskView, HoldView, LeasePhase, LeaseView, NamespaceView, RegionView,
    SessionView, WithdrawPreview,
};
pub use watching::{Sight, Watched, Watcher};
pub use withdrawal::Need;
