//! What can go wrong in a client, said for people: what failed, on what, what to do.

use std::{path::PathBuf, time::Duration};

use crate::device::DeviceError;

/// The result of every client operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A client operation that failed. A borrower turns every one of them into a cache miss.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker cannot be reached now, so nothing was sent; the session keeps trying.
    #[error("no broker at {socket}: {problem}; is swiftcache-broker running?")]
    Disconnected {
        /// The broker's socket.
        socket: PathBuf,
        /// What the last attempt met.
        problem: String,
    },
    /// The connection was lost before the answer came.
    #[error("the connection to the broker was lost before it answered {call}: {problem}")]
    Lost {
        /// The RPC.
        call: &'static str,
        /// How it was lost.
        problem: String,
    },
    /// The broker did not answer in time.
    #[error("the broker did not answer {call} within {} ms", limit.as_millis())]
    Deadline {
        /// The RPC.
        call: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The broker will not do it, and has not.
    #[error("the broker refused {call}: {} ({})", status.message(), status.code())]
    Refused {
        /// The RPC.
        call: &'static str,
        /// Its answer.
        status: Box<tonic::Status>,
    },
    /// The broker said something that makes no sense.
    #[error("the broker's answer to {call} cannot be used: {problem}")]
    Answer {
        /// The RPC.
        call: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The fd socket would not take or give a descriptor.
    #[error("cannot {action} a descriptor over {socket}: {problem}")]
    Descriptor {
        /// "upload" or "fetch".
        action: &'static str,
        /// The fd socket.
        socket: PathBuf,
        /// Why.
        problem: String,
    },
    /// The session is over.
    #[error("the session with the broker is closed")]
    Closed,
    /// This process is a child of the one whose session it is.
    #[error(
        "the session is another process's, of which this one is a fork: open one here, or start this process anew (spawn)"
    )]
    Forked,
    /// A blocking call from the session's own thread would wait for itself.
    #[error("{call} blocks, and must not be called from a session observer")]
    OnSessionThread {
        /// The RPC.
        call: &'static str,
    },
    /// A setting that cannot work.
    #[error("{setting}: {problem}")]
    Config {
        /// The setting's name.
        setting: &'static str,
        /// What is wrong with it and what it takes.
        problem: String,
    },
    /// The device layer failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A stitched pool cannot be had, or cannot go on.
    #[error("the stitched pool: {problem}")]
    Pool {
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The operating system refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

impl Error {
    /// Whether the broker may have done what was asked, or may yet do it. Otherwise it has not, and will not.
    ///
    /// Whoever asked must assume the worse of the two: memory that may be on offer is kept, and blocks that may be
    /// findable are made unfindable before their slots are written. What settles each call stands in
    /// docs/decisions/0027-unknown-outcomes.md.
    pub fn may_be_done(&self) -> bool {
        match self {
            // The call was on its way.
            Self::Lost { .. }
            | Self::Deadline { .. }
            | Self::Answer { .. }
            | Self::OnSessionThread { .. } => true,
            // The broker said no, or was not asked.
            Self::Refused { .. }
            | Self::Disconnected { .. }
            | Self::Descriptor { .. }
            | Self::Closed
            | Self::Forked
            | Self::Config { .. }
            | Self::Device(_)
            | Self::Pool { .. }
            | Self::Thread(_) => false,
        }
    }

    /// A refusal of `setting`, saying what is wrong.
    pub(crate) fn config(setting: &'static str, problem: impl Into<String>) -> Self {
        Self::Config {
            setting,
            problem: problem.into(),
        }
    }
    /// A stitched pool cannot be had, or cannot go on.
    pub(crate) fn pool(problem: impl Into<String>) -> Self {
        Self::Pool {
            problem: problem.into(),
        }
    }
}
