//! `Cache`: a worker's cache.

use std::{collections::HashMap, sync::Arc, time::Duration};

use pyo3::prelude::*;
use swiftcache_client::{
    cache::{BorrowerConfig, Layout},
    device::Choice,
    donor::DonorStatus,
};
use swiftcache_proto::domain::{BorrowerId, DeviceUuid};

use crate::{
    arguments::{self, named},
    claim::Claim,
    connection::Connection,
    failure::{Failure, Result},
    gil::{at_once, drop_unlocked, unlocked, unlocked_if},
    hit::Hit,
    load::Load,
    mark::{Mark, Point},
    pool::Pool,
    promised::{EngineMemory, EngineStream, UnusedRange},
    stats,
    store::Store,
    stream::StreamPool,
    worker::{Opened, Settings, Worker},
};

/// A worker's cache in leased HBM, and host memory.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Cache(Arc<Worker>);

/// What Python says a cache is to be. What it leaves out is as the client would have it.
#[derive(Debug)]
struct Wanted {
    layout: Layout,
    max_leased_bytes: u64,
    max_host_leased_bytes: Option<u64>,
    lease_step_bytes: Option<u64>,
    host_tier_bytes: Option<u64>,
    device: Option<DeviceUuid>,
    backend: Choice,
    share: Option<bool>,
    lookup_ms: Option<u64>,
    lend_drain_ms: Option<u64>,
    borrower: Option<BorrowerId>,
}

impl Wanted {
    fn settings(self) -> Result<Settings> {
        // Until the backend is open nobody knows its first device.
        let named = self.device.clone().map_or_else(|| "unknown".parse(), Ok);
        let named = named.map_err(|problem: String| Failure::argument("device", problem))?;
        let mut config = BorrowerConfig::new(named, self.layout, self.max_leased_bytes);
        config.max_host_leased_bytes =
            (self.max_host_leased_bytes).unwrap_or(config.max_host_leased_bytes);
        config.lease_step_bytes = self.lease_step_bytes.unwrap_or(config.lease_step_bytes);
        config.host_tier_bytes = self.host_tier_bytes.unwrap_or(config.host_tier_bytes);
        config.share = self.share.unwrap_or(config.share);
        config.id = self.borrower;
        if let Some(limit) = self.lookup_ms {
            config.lookup_limit = arguments::milliseconds(limit);
        }
        config.check()?;
        Ok(Settings {
            config,
            device: self.device,
            choice: self.backend,
            lend_drain: (self.lend_drain_ms).map_or(Duration::ZERO, arguments::milliseconds),
        })
    }
}

#[pymethods]
impl Cache {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "Python callers name them")]
    #[pyo3(signature = (connection, *, namespace, layer_bytes, max_leased_bytes, max_host_leased_bytes = None, lease_step_bytes = None, host_tier_bytes = None, device = None, backend = "auto", share = None, lookup_ms = None, lend_drain_ms = None, borrower_id = None))]
    fn new(
        py: Python<'_>,
        connection: &Bound<'_, Connection>,
        namespace: String,
        layer_bytes: &Bound<'_, PyAny>,
        max_leased_bytes: &Bound<'_, PyAny>,
        max_host_leased_bytes: Option<&Bound<'_, PyAny>>,
        lease_step_bytes: Option<&Bound<'_, PyAny>>,
        host_tier_bytes: Option<&Bound<'_, PyAny>>,
        device: Option<&str>,
        backend: &str,
        share: Option<bool>,
        lookup_ms: Option<&Bound<'_, PyAny>>,
        lend_drain_ms: Option<&Bound<'_, PyAny>>,
        borrower_id: Option<Vec<u8>>,
    ) -> PyResult<Self> {
        let connection = connection.get();
        let parsed = |problem| Failure::argument("backend", problem);
        let borrower = borrower_id.map(|id| arguments::borrower("borrower_id", &id));
        let wanted = Wanted {
            layout: Layout {
                namespace,
                layer_bytes: arguments::number("layer_bytes", layer_bytes)?,
            },
            max_leased_bytes: arguments::number("max_leased_bytes", max_leased_bytes)?,
            max_host_leased_bytes: arguments::optional(
                "max_host_leased_bytes",
                max_host_leased_bytes,
            )?,
            lease_step_bytes: arguments::optional("lease_step_bytes", lease_step_bytes)?,
            host_tier_bytes: arguments::optional("host_tier_bytes", host_tier_bytes)?,
            device: named("device", device)?,
            backend: backend.parse().map_err(parsed)?,
            share,
            lookup_ms: arguments::optional("lookup_ms", lookup_ms)?,
            lend_drain_ms: arguments::optional("lend_drain_ms", lend_drain_ms)?,
            borrower: borrower.transpose()?,
        };
        unlocked(py, || {
            let settings = wanted.settings()?;
            let session = connection
                .session()
                .ok_or_else(|| Failure::argument("connection", "is closed"))?;
            Ok(Self(Worker::start(session, settings)?))
        })
    }

    #[pyo3(signature = (layers, blocks, owner, *, stream_pool = None))]
    fn register_pool(
        &self,
        py: Python<'_>,
        layers: &Bound<'_, PyAny>,
        blocks: &Bound<'_, PyAny>,
        owner: Py<PyAny>,
        stream_pool: Option<&Bound<'_, StreamPool>>,
    ) -> PyResult<()> {
        let steps = match stream_pool {
            Some(pool) => {
                let steps = pool.get().steps();
                let missing = || Failure::argument("stream_pool", "is not laid out");
                Some(steps.ok_or_else(missing)?)
            }
            None => None,
        };
        let layers = EngineMemory::read(layers, owner, steps.as_ref())?;
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
        let after = Point::of(after);
        unlocked(py, || {
            let (asked, layers) = (hashes.len(), self.0.layers());
            let load = self.0.with_open(|open| {
                // Whoever loads was promised these blocks.
                let patience = open.borrower.config().lookup_limit;
                let hit = open.borrower.lookup_promised(&hashes, patience);
                let found = &blocks[..hit.blocks() as usize];
                Load::start(open, &hit, found, &after, asked)
            });
            Ok(load.unwrap_or_else(|| Load::miss(asked, layers)))
        })
    }

    #[pyo3(signature = (hashes, *, ask = true))]
    fn lookup(&self, py: Python<'_>, hashes: &[u8], ask: bool) -> PyResult<Hit> {
        let hashes = arguments::hashes(hashes)?;
        let own = |open: &Opened| Some(open.borrower.lookup_own(&hashes));
        let all = |open: &Opened| {
            let patience = open.borrower.config().lookup_limit;
            Some(open.borrower.lookup_within(&hashes, patience))
        };
        match ask {
            true => unlocked(py, || Ok(Hit::new(&self.0, self.0.with_open(all)))),
            false => at_once(|| Ok(Hit::new(&self.0, self.0.with_open(own)))),
        }
    }

    fn claim(&self, hashes: &[u8], most_bytes: &Bound<'_, PyAny>) -> PyResult<Option<Claim>> {
        let hashes = arguments::hashes(hashes)?;
        let most_bytes = arguments::number("most_bytes", most_bytes)?;
        at_once(|| {
            let claimed = (self.0).with_open(|open| open.borrower.claim(&hashes, most_bytes));
            Ok(claimed.map(|claimed| Claim::new(&self.0, claimed)))
        })
    }

    fn mark(&self, stream: &Bound<'_, PyAny>) -> PyResult<Mark> {
        let stream = EngineStream::read(stream)?;
        at_once(|| {
            let point = self.0.with_open(|open| Some(Point::on(open, stream)));
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
        if !marks.is_empty() && marks.len() != self.0.layers() {
            let problem = format!("has {} entries for {} layers", marks.len(), self.0.layers());
            return Err(Failure::argument("marks", problem).into());
        }
        let marks: Vec<Point> = marks.iter().map(|mark| mark.get().0.clone()).collect();
        let may_wait = self.0.with_open(|open| {
            let (kv, asked) = (open.kv()?, u32::try_from(blocks.len()).unwrap_or(u32::MAX));
            Some(open.borrower.store_may_wait(asked, &kv))
        });
        unlocked_if(py, may_wait.unwrap_or(false), || {
            let blocks: Vec<_> = hashes.into_iter().zip(blocks).collect();
            let unknown = marks.iter().any(|point| matches!(point, Point::Unknown));
            let store = self.0.with_open(|open| {
                let kv = open.kv().filter(|_| !unknown)?;
                let ready = |layer: usize| match marks.get(layer) {
                    Some(Point::At(ticket)) => Some(ticket.clone()),
                    _ => None,
                };
                let store = open.borrower.store(&blocks, &kv, &ready);
                Some(Store::running(store, blocks.len()))
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
            if self.0.is_here() {
                self.0.lending.take_back(&loans);
            }
            Ok(())
        })
    }

    fn returned_loans(&self) -> PyResult<Vec<u64>> {
        at_once(|| {
            Ok(match self.0.is_here() {
                true => self.0.lending.take_returned(),
                false => Vec::new(),
            })
        })
    }

    fn lend_problem(&self) -> PyResult<String> {
        at_once(|| {
            Ok(match self.0.is_here() {
                true => self.0.lending.problem(),
                false => self.0.problem(),
            })
        })
    }

    fn stats(&self) -> PyResult<HashMap<&'static str, f64>> {
        at_once(|| {
            let stats = self.0.with_open(|open| Some(open.borrower.stats()));
            let open = stats.is_some();
            let borrowed = stats::flat(&stats.unwrap_or_default());
            let lent = match self.0.is_here() {
                true => self.0.lending.status(),
                false => DonorStatus::default(),
            };
            let lent = stats::lent(&lent);
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

impl Drop for Cache {
    fn drop(&mut self) {
        if !self.0.is_here() {
            return;
        }
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
