//! What goes wrong, for people: [`BrokerError`] when the broker cannot start or go on, [`Refused`] when it
//! will not do what a caller asks. The only place where a refusal becomes a gRPC code.

use std::{io, net::SocketAddr, path::PathBuf};

use swiftcache_proto::{convert::InvalidField, domain::AllocationId, topology::TopologyError};
use tonic::Status;

use crate::{core::Refusal, probe::Unusable};

/// Why the broker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// A setting is wrong: exit status 2.
    #[error("configuration: {0}")]
    Config(String),
    /// Another broker runs with the same socket or state directory.
    #[error("another broker holds {what} (lock {lock}); stop it, or give this one its own {key}")]
    Taken {
        /// "socket /run/..." or "state directory /run/...".
        what: String,
        /// The lock file.
        lock: PathBuf,
        /// The setting to change.
        key: &'static str,
    },
    /// Something that is no socket lies where the socket should be.
    #[error("{0} exists and is not a socket; remove it, or set another `socket`")]
    NotASocket(PathBuf),
    /// A file or socket could not be used.
    #[error("cannot {doing} {path}: {source}")]
    File {
        /// "create", "lock", "bind", ...
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A TCP address could not be bound.
    #[error("cannot listen on {address} (`{key}`): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The setting to change.
        key: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The simulated node is not described well.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// NVML cannot be used, and is demanded or there.
    #[error(
        "NVML cannot be used: {0}. Install or mend the NVIDIA driver, or let the broker simulate a node with \
         --probe simulated"
    )]
    Nvml(#[from] Unusable),
    /// The gRPC server could not be put together.
    #[error("gRPC server: {0}")]
    Grpc(String),
}

impl BrokerError {
    /// For `map_err` on a file operation.
    pub fn file(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            doing,
            path,
            source,
        }
    }

    /// The process's exit status: 2 for a wrong setting, 1 otherwise.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Topology(_) => 2,
            _ => 1,
        }
    }
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// INVALID_ARGUMENT: a field broke its bound.
    #[error(transparent)]
    Field(#[from] InvalidField),
    /// The core will not do it.
    #[error(transparent)]
    Core(#[from] Refusal),
    /// FAILED_PRECONDITION: sessions are bound to a process, which TCP cannot name.
    #[error(
        "the Broker service is served on the broker's Unix socket only: a session is bound to the process \
         at the other end, which TCP cannot name"
    )]
    NotOverTcp,
    /// FAILED_PRECONDITION: the peer's death could not be seen.
    #[error("{0}")]
    Unwatchable(String),
    /// FAILED_PRECONDITION: an offer of a descriptor that was never uploaded.
    #[error(
        "allocation {0}: no descriptor was uploaded for it by this session; send it over the fd socket \
         before offering"
    )]
    NoDescriptor(AllocationId),
    /// RESOURCE_EXHAUSTED: the grant could not be recorded, so it was taken back.
    #[error(
        "the ledger {path} cannot be written ({problem}); no slab is lent until it can be. Free space there"
    )]
    Unrecorded {
        /// The ledger file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// UNAVAILABLE: the broker is on its way out.
    #[error("the broker is shutting down; connect again shortly")]
    ShuttingDown,
    /// DEADLINE_EXCEEDED: a stream that did not say who it is.
    #[error("no `attach` arrived within {0} ms")]
    NotAttached(u128),
    /// INTERNAL: the core answered with something else than the event's reply.
    #[error("the broker's core answered out of turn; this is a bug")]
    OutOfTurn,
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let text = refused.to_string();
        match refused {
            Refused::Field(_) | Refused::Core(Refusal::Invalid { .. }) => {
                Self::invalid_argument(text)
            }
            Refused::Core(Refusal::Unknown { .. }) => Self::not_found(text),
            Refused::Core(Refusal::NotYours { .. }) => Self::permission_denied(text),
            Refused::Core(Refusal::Overlap { .. }) => Self::already_exists(text),
            Refused::Core(Refusal::Limit { .. }) | Refused::Unrecorded { .. } => {
                Self::resource_exhausted(text)
            }
            Refused::Core(Refusal::Stale(_))
            | Refused::NotOverTcp
            | Refused::Unwatchable(_)
            | Refused::NoDescriptor(_) => Self::failed_precondition(text),
            Refused::ShuttingDown => Self::unavailable(text),
            Refused::NotAttached(_) => Self::deadline_exceeded(text),
            Refused::OutOfTurn => Self::internal(text),
        }
    }
}
