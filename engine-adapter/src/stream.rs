//! `StreamPool`: a KV cache of local memory and leased slabs, at addresses that stay.

use std::{fmt, sync::Arc};

use pyo3::prelude::*;
use swiftcache_client::{
    device::{Choice, StepEnd, Steps, open_node},
    stream::{self, StreamConfig, Tensor},
};
use swiftcache_proto::domain::DeviceUuid;
use tracing::debug;

use crate::{
    arguments::{self, named},
    connection::Connection,
    failure::{Failure, Result},
    gil::{drop_unlocked, unlocked},
    place::Place,
    promised::{EngineStream, engine_word},
    stats,
};

/// A KV cache of local memory and leased slabs, at addresses that stay.
#[pyclass(frozen, module = "swiftcache")]
pub(crate) struct StreamPool {
    /// Something as long as it lives.
    held: Option<Arc<Held>>,
}

struct Held {
    pool: stream::StreamPool,
    place: Place,
}

/// What Python says a pool is to be.
struct Wanted {
    namespace: String,
    stream_bytes: u64,
    unit_bytes: Option<u64>,
    spare_units: u32,
    device: Option<DeviceUuid>,
    backend: Choice,
    step_ms: f64,
    patience_s: f64,
}

impl Wanted {
    fn open(self, connection: &Connection) -> Result<Held> {
        let closed = || Failure::argument("connection", "is closed");
        let session = connection.session().ok_or_else(closed)?;
        let patience = arguments::duration("patience_s", self.patience_s)?;
        session.wait_connected(patience)?;
        let lost = || {
            let problem = session.problem().unwrap_or_default();
            Failure::argument("connection", format!("is lost: {problem}"))
        };
        let (devices, links) = session.node().ok_or_else(lost)?;
        let layer = open_node(self.backend, &devices, &links, None)
            .map_err(swiftcache_client::Error::from)?;
        let first = layer.devices().first().map(|device| device.uuid.clone());
        let device = self.device.or(first);
        let device = device.ok_or_else(|| Failure::argument("device", "the backend has none"))?;
        let mut config = StreamConfig::new(device.clone(), self.namespace, self.stream_bytes);
        config.unit_bytes = self.unit_bytes;
        config.spare_units = self.spare_units;
        config.step = arguments::duration("step_ms", self.step_ms / 1_000.0)?;
        config.patience = patience;
        let pool = stream::StreamPool::open(session, Arc::clone(&layer), config)?;
        Ok(Held {
            pool,
            place: Place { layer, device },
        })
    }
}

impl StreamPool {
    fn held(&self) -> Result<&Arc<Held>> {
        self.held
            .as_ref()
            .ok_or_else(|| Failure::Bug("a pool without a pool".to_owned()))
    }

    /// Its steps, once it is laid out.
    pub(crate) fn steps(&self) -> Option<Arc<Steps>> {
        self.held.as_ref().and_then(|held| held.pool.steps())
    }
}

#[pymethods]
impl StreamPool {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "Python callers name them")]
    #[pyo3(signature = (connection, *, namespace, stream_bytes, unit_bytes = None, spare_units = None, device = None, backend = "auto", step_ms = 10.0, patience_s = 30.0))]
    fn new(
        py: Python<'_>,
        connection: &Bound<'_, Connection>,
        namespace: String,
        stream_bytes: &Bound<'_, PyAny>,
        unit_bytes: Option<&Bound<'_, PyAny>>,
        spare_units: Option<&Bound<'_, PyAny>>,
        device: Option<&str>,
        backend: &str,
        step_ms: f64,
        patience_s: f64,
    ) -> PyResult<Self> {
        let wanted = Wanted {
            namespace,
            stream_bytes: arguments::number("stream_bytes", stream_bytes)?,
            unit_bytes: arguments::optional("unit_bytes", unit_bytes)?,
            spare_units: arguments::optional("spare_units", spare_units)?.unwrap_or(0),
            device: named("device", device)?,
            backend: (backend.parse())
                .map_err(|problem: String| Failure::argument("backend", problem))?,
            step_ms,
            patience_s,
        };
        let connection = connection.get();
        let held = unlocked(py, || wanted.open(connection))?;
        Ok(Self {
            held: Some(Arc::new(held)),
        })
    }

    #[getter]
    fn unit_bytes(&self) -> PyResult<u64> {
        Ok(self.held()?.pool.unit_bytes())
    }

    #[getter]
    fn units(&self) -> PyResult<u32> {
        Ok(self.held()?.pool.units())
    }

    #[getter]
    fn device(&self) -> PyResult<String> {
        Ok(self.held()?.place.device.to_string())
    }

    #[getter]
    fn granularity(&self, py: Python<'_>) -> PyResult<u64> {
        unlocked(py, || Ok(self.held()?.pool.granularity()?))
    }

    fn lay_out(
        &self,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<(u64, u64, u64)>> {
        let said: Vec<(u64, u32)> = arguments::number("tensors", tensors)?;
        let tensors: Vec<Tensor> = (said.into_iter())
            .map(|(bytes, units)| Tensor { bytes, units })
            .collect();
        unlocked(py, || {
            let laid_out = self.held()?.pool.lay_out(&tensors, engine_word())?;
            let plain = laid_out.into_iter();
            Ok(plain
                .map(|its| (its.address, its.bytes, its.local_bytes))
                .collect())
        })
    }

    fn begin_step(&self, py: Python<'_>) -> PyResult<u32> {
        unlocked(py, || Ok(self.held()?.pool.begin_step()?))
    }

    fn end_step(&self, py: Python<'_>, stream: &Bound<'_, PyAny>) -> PyResult<()> {
        let stream = EngineStream::read(stream)?;
        unlocked(py, || {
            let held = self.held()?;
            let end = match stream.mark(&held.place) {
                Ok(Some(ticket)) => StepEnd::At(ticket),
                Ok(None) => StepEnd::Over,
                Err(error) => {
                    debug!(%error, "the end of a step is not known");
                    StepEnd::Unknown
                }
            };
            Ok(held.pool.end_step(end)?)
        })
    }

    fn homes(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        unlocked(py, || Ok(self.held()?.pool.homes()))
    }

    fn generation(&self) -> PyResult<u64> {
        Ok(self.held()?.pool.generation())
    }

    fn stats(&self, py: Python<'_>) -> PyResult<std::collections::HashMap<&'static str, f64>> {
        unlocked(py, || {
            let flat = stats::stitched(&self.held()?.pool.stats());
            Ok(flat
                .into_iter()
                .map(|(name, value)| (name, value as f64))
                .collect())
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        unlocked(py, || {
            self.held()?.pool.close();
            Ok(())
        })
    }
}

impl Drop for StreamPool {
    fn drop(&mut self) {
        drop_unlocked(self.held.take());
    }
}

impl fmt::Debug for StreamPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.held {
            Some(held) => held.pool.fmt(f),
            None => f.write_str("StreamPool"),
        }
    }
}
