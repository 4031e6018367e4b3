//! `Mark`: a point on an engine's stream.

use pyo3::prelude::*;
use swiftcache_client::device::Ticket;

use crate::{promised::EngineStream, worker::Opened};

/// A point on an engine's stream.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Mark(pub(crate) Point);

#[derive(Clone, Debug)]
pub(crate) enum Point {
    /// Already over.
    Over,
    At(Ticket),
    /// Nobody can say when it is over.
    Unknown,
}

impl Point {
    /// What a caller waits for; without a mark, nothing.
    pub(crate) fn of(mark: Option<&Bound<'_, Mark>>) -> Self {
        mark.map_or(Self::Over, |mark| mark.get().0.clone())
    }

    /// The present end of a stream.
    pub(crate) fn on(open: &Opened, stream: EngineStream) -> Self {
        match stream.mark(&open.place) {
            Ok(Some(ticket)) => Self::At(ticket),
            Ok(None) => Self::Over,
            Err(error) => {
                tracing::warn!(%error, "the engine's stream cannot be marked: nothing is stored from it");
                Self::Unknown
            }
        }
    }
}
