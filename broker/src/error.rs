//! The broker's errors: [`BrokerError`] when it cannot start or go on, and [`Refused`] when it will not do what a
//! caller asks. Only this module turns a refusal into a gRPC code.

use std::{io, net::SocketAddr, path::PathBuf};

use swiftcache_proto::{convert::InvalidField, domain::AllocationId, topology::TopologyError};
use tonic::Status;

use crate::core::Refusal;

/// Why NVML cannot be used here. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// There is no NVML here: the library cannot be loaded.
    #[error("{0}")]
    Absent(String),
    /// NVML works, and lists no GPU.
    #[error("{0}")]
    NoDevice(String),
    /// NVML is there and does not work, or none of the GPUs that it lists can be used.
    #[error("{0}")]
    Failed(String),
}

/// Why the broker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// A setting is wrong. The exit status is 2.
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
    /// Something that is not a socket lies where the socket should be.
    #[error("{0} exists and is not a socket; remove it, or set another `socket`")]
    NotASocket(PathBuf),
    /// A file or socket could not be used.
    #[error("cannot {doing} {path}: {source}")]
    File {
        /// The operation: "create", "lock", "bind", ...
        doing: &'static str,
        /// The file or socket.
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
    /// The description of the simulated node is wrong.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// NVML cannot be used, although the settings demand it or the machine has it.
    #[error(
        "NVML cannot be used: {0}. Install or repair the NVIDIA driver, or let the broker simulate a node with \
         --probe simulated"
    )]
    Nvml(#[from] Unusable),
    /// What the ledger names could not be taken over.
    #[error("the sessions of the ledger cannot be taken over: {0}")]
    Start(String),
    /// The gRPC server could not be built.
    #[error("gRPC server: {0}")]
    Grpc(String),
}

impl BrokerError {
    /// Makes the error of a failed file operation, for `map_err`.
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
    /// INVALID_ARGUMENT: a field is out of bounds.
    #[error(transparent)]
    Field(#[from] InvalidField),
    /// The core refuses.
    #[error(transparent)]
    Core(#[from] Refusal),
    /// FAILED_PRECONDITION: a session is bound to a process, and TCP does not tell which process is the peer.
    #[error(
        "the Broker service is served on the broker's Unix socket only: a session is bound to the process \
         at the other end, and TCP does not tell which process that is"
    )]
    NotOverTcp,
    /// PERMISSION_DENIED: only operators change what belongs to others.
    #[error(
        "uid {uid} may not {doing}: only root, the broker's own user (uid {broker_uid}) and members of the group in the \
         broker's setting `admin_group` may"
    )]
    NotAnOperator {
        /// The user who asks.
        uid: u32,
        /// What was asked: "drain", "evict", ...
        doing: &'static str,
        /// The broker's own user.
        broker_uid: u32,
    },
    /// PERMISSION_DENIED.
    #[error(
        "uid {user} may not see blocks of tenant {tenant:?}: members see those of their own user"
    )]
    NotYourTenant {
        /// The user who asks.
        user: String,
        /// What was asked for.
        tenant: String,
    },
    /// PERMISSION_DENIED: nobody can tell who asks.
    #[error(
        "nobody may {doing} over TCP without a client certificate, because TCP does not tell who asks: use the broker's \
         Unix socket, or mutual TLS (`tls_cert`, `tls_key`, `tls_client_ca`)"
    )]
    Anonymous {
        /// What was asked: "drain", "evict", ...
        doing: &'static str,
    },
    /// FAILED_PRECONDITION: the broker could not see the peer's death.
    #[error("{0}")]
    Unwatchable(String),
    /// FAILED_PRECONDITION: the session offers an allocation without having uploaded its descriptor.
    #[error(
        "allocation {0}: this session has uploaded no descriptor for it; send the descriptor over the fd socket \
         before the offer"
    )]
    NoDescriptor(AllocationId),
    /// RESOURCE_EXHAUSTED: the grant could not be recorded, so it was taken back.
    #[error(
        "the ledger {path} cannot be written ({problem}), and no slab is lent until it can. Free space \
         there, or make it writable again"
    )]
    Unrecorded {
        /// The ledger file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// RESOURCE_EXHAUSTED: too many streams of the session are not over.
    #[error(
        "{0} streams of this session are not read to their ends; read them, or close their connections"
    )]
    Streams(usize),
    /// UNAVAILABLE: the broker is shutting down.
    #[error("the broker is shutting down; connect again shortly")]
    ShuttingDown,
    /// DEADLINE_EXCEEDED: the client opened a stream and did not say for which session.
    #[error("no `attach` arrived within {0} ms")]
    NotAttached(u128),
    /// INTERNAL: the core's reply does not belong to the event.
    #[error("the broker's core gave a reply to something else; this is a bug")]
    OutOfTurn,
    /// INTERNAL: the broker panicked over this request.
    #[error("the broker failed over this request; this is a bug, and its log says where")]
    Bug,
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let text = refused.to_string();
        match refused {
            Refused::Field(_) | Refused::Core(Refusal::Invalid { .. }) => {
                Self::invalid_argument(text)
            }
            Refused::Core(Refusal::Unknown { .. }) => Self::not_found(text),
            Refused::Core(Refusal::NotYours { .. })
            | Refused::NotAnOperator { .. }
            | Refused::NotYourTenant { .. }
            | Refused::Anonymous { .. } => Self::permission_denied(text),
            Refused::Core(Refusal::LateConnection(_)) => Self::aborted(text),
            Refused::Core(
                Refusal::Overlap { .. } | Refusal::Followed { .. } | Refusal::DiskTaken { .. },
            ) => Self::already_exists(text),
            Refused::Core(Refusal::Limit { .. })
            | Refused::Unrecorded { .. }
            | Refused::Streams(_) => Self::resource_exhausted(text),
            Refused::Core(Refusal::Stale(_))
            | Refused::NotOverTcp
            | Refused::Unwatchable(_)
            | Refused::NoDescriptor(_) => Self::failed_precondition(text),
            Refused::ShuttingDown => Self::unavailable(text),
            Refused::NotAttached(_) => Self::deadline_exceeded(text),
            Refused::OutOfTurn | Refused::Bug => Self::internal(text),
        }
    }
}
