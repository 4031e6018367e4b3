//! `Connection`: the session with the broker.

use parking_lot::Mutex;
use pyo3::prelude::*;
use swiftcache_client::{
    Error,
    device::Origin,
    session::{Asker, Session, SessionConfig},
};
use swiftcache_proto::convert::MAX_NAMESPACE_BYTES;

use crate::{
    arguments,
    failure::{Failure, Result},
    gil::{drop_unlocked, unlocked},
    index::IndexWatch,
};

/// This process's session with the node's broker.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Connection {
    /// Nothing once closed.
    session: Mutex<Option<Session>>,
    /// A child of this process has no session.
    origin: Origin,
}

impl Connection {
    /// A session for a cache of its own.
    pub(crate) fn session(&self) -> Option<Session> {
        if !self.origin.is_here() {
            return None;
        }
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
                origin: Origin::here(),
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
                None if !self.origin.is_here() => Error::Forked.to_string(),
                None => "the connection is closed".to_owned(),
            })
        })
    }

    #[pyo3(signature = (namespaces, hashes, *, deadline_ms, borrowers = None))]
    fn count_hits(
        &self,
        py: Python<'_>,
        namespaces: Vec<String>,
        hashes: &[u8],
        deadline_ms: &Bound<'_, PyAny>,
        borrowers: Option<Vec<Vec<u8>>>,
    ) -> PyResult<u32> {
        let counted = self.count(py, namespaces, hashes, deadline_ms, borrowers)?;
        Ok(counted.0)
    }

    fn watch_index(&self, py: Python<'_>, namespaces: Vec<String>) -> PyResult<IndexWatch> {
        unlocked(py, || {
            check_namespaces(&namespaces)?;
            let session = self.session();
            Ok(IndexWatch::new(
                session.map(|session| session.watch_index(namespaces)),
            ))
        })
    }

    #[pyo3(signature = (namespaces, hashes, *, deadline_ms, borrowers = None))]
    fn count(
        &self,
        py: Python<'_>,
        namespaces: Vec<String>,
        hashes: &[u8],
        deadline_ms: &Bound<'_, PyAny>,
        borrowers: Option<Vec<Vec<u8>>>,
    ) -> PyResult<(u32, u32, u64)> {
        let limit = arguments::milliseconds(arguments::number("deadline_ms", deadline_ms)?);
        unlocked(py, || {
            check_namespaces(&namespaces)?;
            let ranks = ranks(namespaces, borrowers)?;
            let hashes = arguments::hashes(hashes)?;
            let session = self.session();
            let counted = session.map(|session| session.count(&ranks, &hashes, limit));
            let counted = counted.unwrap_or_default();
            let within = counted.coming.within.as_millis() as u64;
            Ok((counted.blocks, counted.coming.blocks, within))
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        unlocked(py, || {
            if self.origin.is_here() {
                drop(self.session.lock().take());
            }
            Ok(())
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let session = self.session.get_mut().take();
        match self.origin.is_here() {
            true => drop_unlocked(session),
            false => std::mem::forget(session),
        }
    }
}

/// Each namespace with its borrower, if the borrowers are named.
fn ranks(namespaces: Vec<String>, borrowers: Option<Vec<Vec<u8>>>) -> Result<Vec<Asker>> {
    let Some(borrowers) = borrowers else {
        return Ok(namespaces.into_iter().map(Asker::new).collect());
    };
    if borrowers.len() != namespaces.len() {
        let (given, wanted) = (borrowers.len(), namespaces.len());
        let problem = format!("has {given} entries for {wanted} namespaces");
        return Err(Failure::argument("borrowers", problem));
    }
    let ranks = namespaces.into_iter().zip(borrowers).enumerate();
    ranks
        .map(|(number, (namespace, id))| {
            Ok(Asker {
                borrower: Some(arguments::borrower(format!("borrowers[{number}]"), &id)?),
                ..Asker::new(namespace)
            })
        })
        .collect()
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
