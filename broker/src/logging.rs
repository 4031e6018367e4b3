//! Log lines, on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::{
    config::{Config, LogFormat},
    error::BrokerError,
};

/// Starts logging as the settings say. Once a process.
///
/// # Errors
/// When the filter is refused.
pub fn start(config: &Config) -> Result<(), BrokerError> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| BrokerError::Config(format!("log: {error}")))?;
    let logger = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    // Fails only when the process logs already, as in tests: then it goes on doing so.
    drop(match config.log_format {
        LogFormat::Text => logger.try_init(),
        LogFormat::Json => logger.json().try_init(),
    });
    Ok(())
}
