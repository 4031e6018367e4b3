//! Log lines, on standard error; and spans, for the collector, if there is one.

use std::io::{self, IsTerminal};

use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::FilterExt, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{
    config::{Config, LogFormat},
    error::BrokerError,
    traces::{self, Traces},
};

/// Starts logging as the settings say. Once a process.
///
/// # Errors
/// When the filter is refused.
pub fn start(config: &Config, traces: Option<&Traces>) -> Result<(), BrokerError> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| BrokerError::Config(format!("log: {error}")))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        // Complaining about a line that could not be written (its disk is full) would panic in the middle of a request.
        .log_internal_errors(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match config.log_format {
        LogFormat::Text => Box::new(lines),
        LogFormat::Json => Box::new(lines.json()),
    };
    // A line is the same with and without a collector: it does not name the RPC's span.
    let lines = lines.with_filter(filter.and(traces::no_spans()));
    let spans = traces.map(Traces::layer);
    // Fails only when the process logs already, as in tests: then it goes on doing so.
    drop(
        tracing_subscriber::registry()
            .with(lines)
            .with(spans)
            .try_init(),
    );
    Ok(())
}
