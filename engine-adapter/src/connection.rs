//! `Connection`: the session with the broker.

use parking_lot::Mutex;
use pyo3::prelude::*;
use swiftcache_client::session::{Session, SessionConfig};
use swiftcache_proto::convert::MAX_NAMESPACE_BYTES;

use crate::{
    arguments,
    failure::{Failure, Result},
    unlocked::{drop_unlocked, unlocked},
};

/// This process's session with the node's broker.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Connection {
    /// Nothing once closed.
    session: Mutex<Option<Session>>,
}

impl Connection {
    /// A session for a cache of its own.
    pub(crate) fn session(&self) -> Option<Session> {
        self.session.lock().clone()
    }
}

#[pymethods]
impl Connection {
    #[new]
    #[pyo3(signature = (socket, *, name, tenant = String::new()))]
    fn new(py: Python<'_>, socket: String, name: String, tenant: String) -> PyResult<Self> {
        unlocked(py, || {
            let session = Session::start(SessionConfig {
                socket: socket.into(),
                name,
                tenant,
            })?;
            Ok(Self {
                session: Mutex::new(Some(session)),
            })
        })
    }

    fn is_connected(&self, py: Python<'_>) -> PyResult<bool> {
        unlocked(py, || {
            Ok(self.session().is_some_and(|session| session.is_connected()))
        })
    }

    fn wait_connected(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        unlocked(py, || {
            let limit = arguments::seconds(seconds)?;
            Ok(self
                .session()
                .is_some_and(|session| session.wait_connected(limit).is_ok()))
        })
    }

    fn problem(&self, py: Python<'_>) -> PyResult<String> {
        unlocked(py, || {
            Ok(match self.session() {
                Some(session) => session.problem().unwrap_or_default(),
                None => "the connection is closed".to_owned(),
            })
        })
    }

    #[pyo3(signature = (namespaces, hashes, *, deadline_ms = None))]
    fn count_hits(
        &self,
        py: Python<'_>,
        namespaces: Vec<String>,
        hashes: &[u8],
        deadline_ms: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u32> {
        let deadline_ms =
            deadline_ms.map_or(Ok(50), |limit| arguments::number("deadline_ms", limit))?;
        let limit = arguments::milliseconds(deadline_ms);
        unlocked(py, || {
            check_namespaces(&namespaces)?;
            let hashes = arguments::hashes(hashes)?;
            let session = self.session();
            Ok(session.map_or(0, |session| session.count_hits(&namespaces, &hashes, limit)))
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        unlocked(py, || {
            drop(self.session.lock().take());
            Ok(())
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop_unlocked(self.session.get_mut().take());
    }
}

fn check_namespaces(namespaces: &[String]) -> Result<()> {
    if namespaces.is_empty() {
        return Err(Failure::argument("namespaces", "takes at least one"));
    }
    for (number, namespace) in namespaces.iter().enumerate() {
        if !(1..=MAX_NAMESPACE_BYTES).contains(&namespace.len()) {
            let problem = format!("takes 1 to {MAX_NAMESPACE_BYTES} bytes");
            return Err(Failure::argument(format!("namespaces[{number}]"), problem));
        }
    }
    Ok(())
}
