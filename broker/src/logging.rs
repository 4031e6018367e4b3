//! Writes log lines to standard error, and spans to the collector, if there is one.

use std::io::{self, IsTerminal};

use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::FilterExt, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{
    config::{Config, LogFormat},
    error::BrokerError,
    traces::{self, Traces},
};

/// Starts logging with these settings. A process can do this once.
///
/// # Errors
/// When the filter is not valid.
pub fn start(config: &Config, traces: Option<&Traces>) -> Result<(), BrokerError> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| BrokerError::Config(format!("log: {error}")))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        // If a line cannot be written, for example because the disk is full, an error message about that would panic in
        // the middle of a request.
        .log_internal_errors(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match config.log_format {
        LogFormat::Text => Box::new(lines),
        LogFormat::Json => Box::new(lines.json()),
    };
    // Lines do not name the RPC's span, so they are the same with and without a collector.
    let lines = lines.with_filter(filter.and(traces::no_spans()));
    let spans = traces.map(Traces::layer);
    // This fails only when the process already logs, as in tests. Then it goes on logging as before.
    drop(
        tracing_subscriber::registry()
            .with(lines)
            .with(spans)
            .try_init(),
    );
    Ok(())
}
