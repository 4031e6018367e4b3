//! The broker's state machine: no I/O, no clock, no async. Everything that happens is an [`Event`]; everything
//! the broker does about it is an [`Effect`].

mod account;
mod arena;
mod borrowers;
mod check;
mod check_holders;
mod config;
mod devices;
mod effect;
mod event;
mod fairness;
mod holds;
mod index;
mod leases;
mod ledger;
mod lookup;
mod operator;
mod pins;
mod policy;
mod preview;
mod quotas;
mod record;
mod regions;
mod revocation;
mod scrubs;
mod sessions;
mod slots;
mod state;
#[cfg(test)]
mod tests;
mod views;
mod withdrawal;

use serde::{Deserialize, Serialize};

pub use account::Account;
pub use config::{CoreConfig, Node};
pub use effect::{Effect, Grant, Note, Outgoing, Refusal, Reply};
pub use event::{
    Caller, DrainTarget, Event, EvictTarget, HoldDemand, HoldId, Keep, LeaseDemand, Lookup, Now,
    Offer, Publish, QuotaTarget, Register, SetQuota, Withdraw, WithdrawWhat,
};
pub use ledger::LedgerError;
pub use preview::{Need, WithdrawPreview};
pub use record::Record;
pub use state::State;
pub use views::{
    Counters, DeviceView, HoldView, LeasePhase, LeaseView, NamespaceView, RegionView, SessionView,
};

/// A process as the kernel tells it apart from every other: a pid alone is reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// As the broker's PID namespace sees it; 0 when it cannot.
    pub pid: u32,
    /// What tells two processes with one pid apart: the start time in clock ticks since boot
    /// (`/proc/<pid>/stat` field 22), or the pidfd's inode where the pid cannot be seen.
    pub birth: u64,
    /// Whose process it is.
    pub uid: u32,
}
