//! The broker daemon: parses its flags, builds the broker, serves, and drains within a time.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use swiftcache_broker::{
    config::{Config, Flags},
    error::BrokerError,
    logging, probe,
    serve::{Broker, check},
    traces::Traces,
};
use tikv_jemallocator::Jemalloc;
use tokio::signal::unix::{SignalKind, signal};

/// Gives memory back to the system some seconds after it was freed, by a thread of its own. glibc keeps it:
/// `docs/decisions/0041-memory-handed-back.md`.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

fn main() -> ExitCode {
    let started = Instant::now();
    match run(&Flags::parse(), started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Logging may not have started yet.
            drop(writeln!(io::stderr(), "swiftcache-broker: {error}"));
            ExitCode::from(error.exit_status())
        }
    }
}

fn run(flags: &Flags, started: Instant) -> Result<(), BrokerError> {
    let config = Config::load(flags.config.as_deref(), &flags.settings)?;
    if flags.print_config {
        let text = config.to_toml()?;
        return io::stdout()
            .write_all(text.as_bytes())
            .map_err(BrokerError::file("write", "standard output"));
    }
    check(&config)?;
    if flags.check_config {
        return Ok(());
    }
    // One thread, because requests take microseconds. To hand them between threads costs more than that, and makes the
    // slowest of a hundred ten times slower. Only while that thread waits for a disk does another one serve.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(BrokerError::file("start", "the runtime"))?;
    let served = runtime.block_on(traced(&config, started));
    // Waits for no thread: one may be writing the ledger to a disk that does not answer.
    runtime.shutdown_background();
    logging::flush();
    served
}

/// Serves, and then sends the last spans, also when serving failed.
async fn traced(config: &Config, started: Instant) -> Result<(), BrokerError> {
    let traces = config.otlp_endpoint.as_deref().map(Traces::open);
    let traces = traces.transpose()?;
    logging::start(config, traces.as_ref())?;
    let served = serve(config, started).await;
    if let Some(traces) = traces {
        traces
            .close(Duration::from_millis(config.shutdown_ms))
            .await;
    }
    served
}

async fn serve(config: &Config, started: Instant) -> Result<(), BrokerError> {
    let listen = |kind| signal(kind).map_err(BrokerError::file("listen for", "signals"));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let probe = probe::open(config.probe, config.topology.as_deref())?;
    let source = probe.source();
    let broker = Broker::start(config, probe).await?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %config.socket.display(),
        tcp = broker.tcp_address().map(tracing::field::display),
        metrics = broker.metrics_address().map(tracing::field::display),
        probe = source,
        ms = started.elapsed().as_millis(),
        "ready"
    );
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    let in_time = broker.drain().await;
    tracing::info!(in_time, "drained");
    Ok(())
}
