//! Writes log lines to standard error, and spans to the collector, if there is one. Nobody waits for standard error: it
//! may be a pipe that is not read.

mod lines;
mod sparse;

use std::{
    io::{self, IsTerminal},
    sync::OnceLock,
    time::Duration,
};

use lines::Lines;

use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::FilterExt, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{
    config::{Config, LogFormat},
    error::BrokerError,
    traces::{self, Traces},
};

pub(crate) use sparse::Sparse;

/// Clients can cause HTTP/2's warnings, one with each call that they abandon. A setting that names `h2` shows them.
const QUIET: &str = "h2=error";
/// How long the last lines may take when the process ends.
const FLUSH: Duration = Duration::from_secs(1);

/// The lines of this process.
static LINES: OnceLock<Lines> = OnceLock::new();

/// How many log lines were dropped since the start, because standard error did not take them.
pub fn dropped() -> u64 {
    LINES.get().map_or(0, Lines::dropped)
}

/// Waits a moment until the last lines are written.
pub fn flush() {
    if let Some(lines) = LINES.get() {
        lines.flush(FLUSH);
    }
}

/// Starts logging with these settings. A process can do this once.
///
/// # Errors
/// When the filter is not valid.
pub fn start(config: &Config, traces: Option<&Traces>) -> Result<(), BrokerError> {
    let filter = EnvFilter::try_new(format!("{QUIET},{}", config.log))
        .map_err(|error| BrokerError::Config(format!("log: {error}")))?;
    let notice = match config.log_format {
        LogFormat::Text => {
            |lines| format!("{lines} log lines were dropped, because standard error was not read\n")
        }
        LogFormat::Json => |lines| {
            format!(
                "{{\"level\":\"WARN\",\"fields\":{{\"message\":\"log lines were dropped, because standard error was not read\",\"lines\":{lines}}}}}\n"
            )
        },
    };
    let writer = Lines::start(io::stderr(), notice)
        .map_err(BrokerError::file("start", "the thread that writes the log"))?;
    let writer = LINES.get_or_init(|| writer).clone();
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(writer)
        // If a line cannot be formatted, an error message about that would panic in the middle of a request.
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
