//! `Cache`: a worker's cache, and `Mark`: a point on its engine's stream.

use std::{collections::HashMap, sync::Arc};

use pyo3::prelude::*;
use swiftcache_client::{
    borrower::{BorrowerConfig, Layout},
    device::{Choice, Ticket},
};
use swiftcache_proto::domain::DeviceUuid;

use crate::{
    arguments,
    connection::Connection,
    failure::{Failure, Result},
    load::Load,
    pool::Pool,
    promised::{EngineMemory, EngineStream, UnusedRange},
    stats,
    store::Store,
    unlocked::{drop_unlocked, unlocked},
    worker::{Opened, Settings, Worker},
};

/// A worker's cache in leased HBM, and host memory.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Cache(Arc<Worker>);

/// A point on an engine's stream.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Mark(Point);

#[derive(Clone, Debug)]
enum Point {
    /// Already over.
    Over,
    At(Ticket),
    /// Nobody can say when it is over.
    Unknown,
}

/// The settings' defaults are in the signature of `new`.
fn settings(
    layout: Layout,
    (max_leased_bytes, lease_step_bytes, host_tier_bytes): (u64, Option<u64>, u64),
    device: &str,
    backend: &str,
    (share, borrower): (bool, &[u8]),
    (lookup_ms, lend_drain_ms): (u64, u64),
) -> Result<Settings> {
    let choice: Choice = backend
        .parse()
        .map_err(|problem: String| Failure::argument("backend", problem))?;
    let device: Option<DeviceUuid> = match device {
        "" => None,
        uuid => Some(
            uuid.parse()
                .map_err(|problem: String| Failure::argument("device", problem))?,
        ),
    };
    // Until the backend is open nobody knows its first device.
    let named = device.clone().map_or_else(|| "unknown".parse(), Ok);
    let named = named.map_err(|problem: String| Failure::argument("device", problem))?;
    let mut config = BorrowerConfig::new(named, layout, max_leased_bytes);
    config.lease_step_bytes = lease_step_bytes.unwrap_or(config.lease_step_bytes);
    config.host_tier_bytes = host_tier_bytes;
    config.share = share;
    if !borrower.is_empty() {
        config.id = Some(arguments::borrower("borrower_id", borrower)?);
    }
    config.lookup_limit = arguments::milliseconds(lookup_ms);
    config.check()?;
    Ok(Settings {
        config,
        device,
        choice,
        lend_drain: arguments::milliseconds(lend_drain_ms),
    })
}

#[pymethods]
impl Cache {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "Python callers name them")]
    #[pyo3(signature = (connection, *, namespace, layer_bytes, max_leased_bytes, lease_step_bytes = None, host_tier_bytes = None, device = "", backend = "auto", share = true, lookup_ms = 250, lend_drain_ms = 0, borrower_id = Vec::new()))]
    fn new(
        py: Python<'_>,
        connection: &Bound<'_, Connection>,
        namespace: String,
        layer_bytes: &Bound<'_, PyAny>,
        max_leased_bytes: &Bound<'_, PyAny>,
        lease_step_bytes: Option<&Bound<'_, PyAny>>,
        host_tier_bytes: Option<&Bound<'_, PyAny>>,
        device: &str,
        backend: &str,
        share: bool,
        lookup_ms: u64,
        lend_drain_ms: u64,
        borrower_id: Vec<u8>,
    ) -> PyResult<Self> {
        let connection = connection.get();
        let layout = Layout {
            namespace,
            layer_bytes: arguments::number("layer_bytes", layer_bytes)?,
        };
        let max_leased_bytes = arguments::number("max_leased_bytes", max_leased_bytes)?;
        let lease_step_bytes = lease_step_bytes
            .map(|bytes| arguments::number("lease_step_bytes", bytes))
            .transpose()?;
        let host_tier_bytes =
            host_tier_bytes.map_or(Ok(0), |bytes| arguments::number("host_tier_bytes", bytes))?;
        let bytes = (max_leased_bytes, lease_step_bytes, host_tier_bytes);
        let limits = (lookup_ms, lend_drain_ms);
        unlocked(py, || {
            let sharing = (share, borrower_id.as_slice());
            let settings = settings(layout, bytes, device, backend, sharing, limits)?;
            let session = connection
                .session()
                .ok_or_else(|| Failure::argument("connection", "is closed"))?;
            Ok(Self(Worker::start(session, settings)?))
        })
    }

    fn register_pool(
        &self,
        py: Python<'_>,
        layers: &Bound<'_, PyAny>,
        blocks: &Bound<'_, PyAny>,
        owner: Py<PyAny>,
    ) -> PyResult<()> {
        let layers = EngineMemory::read(layers, owner)?;
        let blocks = arguments::number("blocks", blocks)?;
        unlocked(py, || {
            let layout = &self.0.settings.config.layout;
            let pool = Pool::new(layers, blocks, layout)?;
            self.0.set_pool(pool)
        })
    }

    fn is_open(&self, py: Python<'_>) -> PyResult<bool> {
        unlocked(py, || Ok(self.0.is_open()))
    }

    fn wait_open(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        unlocked(py, || Ok(self.0.wait_open(arguments::seconds(seconds)?)))
    }

    fn problem(&self, py: Python<'_>) -> PyResult<String> {
        unlocked(py, || Ok(self.0.problem()))
    }

    #[pyo3(signature = (hashes, blocks, after = None))]
    fn load(
        &self,
        py: Python<'_>,
        hashes: &[u8],
        blocks: &Bound<'_, PyAny>,
        after: Option<&Bound<'_, Mark>>,
    ) -> PyResult<Load> {
        let (hashes, blocks) = arguments::sequence(hashes, blocks)?;
        let after = after.map_or(Point::Over, |mark| mark.get().0.clone());
        unlocked(py, || {
            let (asked, layers) = (hashes.len(), self.layers());
            let load = self.0.with_open(|open| {
                let kv = open.kv()?;
                let hit = open.borrower.lookup(&hashes);
                let found = hit.blocks();
                let blocks = &blocks[..found as usize];
                let load = match &after {
                    Point::Unknown => return None,
                    Point::Over => open.borrower.load(&hit, blocks, &kv),
                    Point::At(ticket) => open.borrower.load_after(&hit, blocks, &kv, ticket),
                };
                Some(Load::running(load, &open.place, found, asked, layers))
            });
            Ok(load.unwrap_or_else(|| Load::miss(asked, layers)))
        })
    }

    fn mark(&self, py: Python<'_>, stream: &Bound<'_, PyAny>) -> PyResult<Mark> {
        let stream = EngineStream::read(stream)?;
        unlocked(py, || {
            let point = self.0.with_open(|open| Some(point(open, stream)));
            Ok(Mark(point.unwrap_or(Point::Unknown)))
        })
    }

    #[pyo3(signature = (hashes, blocks, marks = Vec::new()))]
    fn store(
        &self,
        py: Python<'_>,
        hashes: &[u8],
        blocks: &Bound<'_, PyAny>,
        marks: Vec<Bound<'_, Mark>>,
    ) -> PyResult<Store> {
        let (hashes, blocks) = arguments::sequence(hashes, blocks)?;
        if !marks.is_empty() && marks.len() != self.layers() {
            let problem = format!("has {} entries for {} layers", marks.len(), self.layers());
            return Err(Failure::argument("marks", problem).into());
        }
        let marks: Vec<Point> = marks.iter().map(|mark| mark.get().0.clone()).collect();
        unlocked(py, || {
            let blocks: Vec<_> = hashes.into_iter().zip(blocks).collect();
            let unknown = marks.iter().any(|point| matches!(point, Point::Unknown));
            let store = self.0.with_open(|open| {
                let kv = open.kv().filter(|_| !unknown)?;
                let ready = |layer: usize| match marks.get(layer) {
                    Some(Point::At(ticket)) => Some(ticket.clone()),
                    _ => None,
                };
                Some(Store::running(open.borrower.store(&blocks, &kv, &ready)))
            });
            Ok(store.unwrap_or_else(|| Store::nothing(blocks.len())))
        })
    }

    #[pyo3(signature = (loan, ranges, after = None))]
    fn lend(
        &self,
        py: Python<'_>,
        loan: &Bound<'_, PyAny>,
        ranges: &Bound<'_, PyAny>,
        after: Option<&Bound<'_, Mark>>,
    ) -> PyResult<()> {
        let loan = arguments::number("loan", loan)?;
        let ranges = UnusedRange::read(ranges)?;
        let after = after.map_or(Point::Over, |mark| mark.get().0.clone());
        unlocked(py, || match after {
            Point::Over => self.0.lend(loan, ranges, None),
            Point::At(ticket) => self.0.lend(loan, ranges, Some(ticket)),
            Point::Unknown => Err(Failure::argument("after", "nobody can say when it is over")),
        })
    }

    fn take_back(&self, py: Python<'_>, loans: &Bound<'_, PyAny>) -> PyResult<()> {
        let loans: Vec<u64> = arguments::number("loans", loans)?;
        unlocked(py, || {
            self.0.lending.take_back(&loans);
            Ok(())
        })
    }

    fn returned_loans(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        unlocked(py, || Ok(self.0.lending.take_returned()))
    }

    fn lend_problem(&self, py: Python<'_>) -> PyResult<String> {
        unlocked(py, || Ok(self.0.lending.problem()))
    }

    fn stats(&self, py: Python<'_>) -> PyResult<HashMap<&'static str, f64>> {
        unlocked(py, || {
            let stats = self.0.with_open(|open| Some(open.borrower.stats()));
            let open = stats.is_some();
            let borrowed = stats::flat(&stats.unwrap_or_default());
            let lent = stats::lent(&self.0.lending.status());
            let mut flat: HashMap<_, _> = (borrowed.into_iter().chain(lent))
                .map(|(name, value)| (name, value as f64))
                .collect();
            flat.insert("connected", f64::from(self.0.is_connected()));
            flat.insert("open", f64::from(open));
            Ok(flat)
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        unlocked(py, || {
            self.0.close();
            Ok(())
        })
    }
}

impl Cache {
    fn layers(&self) -> usize {
        self.0.settings.config.layout.layer_bytes.len()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let worker = Arc::clone(&self.0);
        drop_unlocked(Closing(worker));
    }
}

/// Closes a worker when dropped.
struct Closing(Arc<Worker>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn point(open: &Opened, stream: EngineStream) -> Point {
    match stream.mark(&open.place) {
        Ok(Some(ticket)) => Point::At(ticket),
        Ok(None) => Point::Over,
        Err(error) => {
            tracing::warn!(%error, "the engine's stream cannot be marked: nothing is stored from it");
            Point::Unknown
        }
    }
}
