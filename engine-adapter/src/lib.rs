//! The Python module `swiftcache._native`: the client, for engines.
//!
//! Thin on purpose: arguments in, results out (`arguments`, `failure`), the GIL kept or given up meanwhile (`gil`), and
//! the objects that Python holds. What it knows beyond that is how a cache opens in the background (`worker`), where
//! an engine's pool is (`pool`), and what of Python's word has to be believed (`promised`, the only `unsafe`). `python/swiftcache/_native.pyi` says what each method promises.

mod arguments;
mod cache;
mod claim;
mod connection;
mod failure;
mod gil;
mod hit;
mod index;
mod load;
mod loans;
mod mark;
mod place;
mod pool;
mod promised;
mod starter;
mod stats;
mod store;
mod stream;
mod worker;

use std::io::IsTerminal;

/// The client of SwiftCache, in Rust.
#[pyo3::pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::{
        cache::Cache, claim::Claim, connection::Connection, hit::Hit, index::IndexWatch,
        load::Load, loans::Loans, mark::Mark, store::Store, stream::StreamPool,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::log();
        let lookup_limit = swiftcache_client::cache::BorrowerConfig::LOOKUP_LIMIT;
        module.add("DEFAULT_LOOKUP_MS", lookup_limit.as_millis() as u64)?;
        module.add("MAX_DRAIN_MS", swiftcache_proto::convert::MAX_DRAIN_MS)?;
        module.add(
            "MAX_TENANT_BYTES",
            swiftcache_proto::convert::MAX_TENANT_BYTES,
        )?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

/// Logs go to standard error; `RUST_LOG` chooses them, as for the commands.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // Another Rust module of this process may have set one.
    let _ = log.try_init();
}
