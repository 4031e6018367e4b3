//! What a method can fail with, and which Python exception that is.

use pyo3::{
    PyErr,
    exceptions::{PyRuntimeError, PyValueError},
};
use swiftcache_client::Error;

/// Why a method raises.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// An argument that cannot work.
    #[error("{argument}: {problem}")]
    Argument {
        /// Its name, with an index where it is a sequence.
        argument: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The client failed where that is not a miss.
    #[error(transparent)]
    Client(#[from] Error),
    /// A panic, stopped at the border.
    #[error("a bug in swiftcache: {0}")]
    Bug(String),
}

/// The result of everything that Python calls.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn argument(argument: impl Into<String>, problem: impl ToString) -> Self {
        Self::Argument {
            argument: argument.into(),
            problem: problem.to_string(),
        }
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match &failure {
            Failure::Argument { .. } => PyValueError::new_err(failure.to_string()),
            // The client's settings are the methods' arguments, named within their structs.
            Failure::Client(Error::Config { setting, problem }) => {
                let bare = setting.trim_start_matches("layout.");
                let bare = bare.trim_start_matches("kv.");
                PyValueError::new_err(format!("{bare}: {problem}"))
            }
            Failure::Client(_) | Failure::Bug(_) => PyRuntimeError::new_err(failure.to_string()),
        }
    }
}
