//! Who has the GIL while Rust works; and panics, which become exceptions that engines can catch.
//!
//! Whoever gives the GIL up while another Python thread computes gets it back after Python's switch interval, 5 ms by default.
//! An engine's thread that schedules has such neighbours: vLLM hashes the prompts that come in beside it, for milliseconds each.
//! So it is given up where something is waited for, and kept where it is not.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use pyo3::prelude::*;

use crate::failure::{Failure, Result};

/// Does work that may wait: for a device, the broker or another thread. Other Python threads run meanwhile. A panic becomes
/// an exception, as in [`at_once`].
pub(crate) fn unlocked<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    py.detach(|| at_once(work))
}

/// Does work that has to wait only where `may_wait` says so: as [`unlocked`] does, or as [`at_once`].
pub(crate) fn unlocked_if<T: Send>(
    py: Python<'_>,
    may_wait: bool,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    match may_wait {
        true => unlocked(py, work),
        false => at_once(work),
    }
}

/// Does work that waits for nothing but locks which nobody holds while waiting, and takes less than a millisecond or two. No
/// other Python thread runs meanwhile. A panic becomes an exception that engines can catch.
pub(crate) fn at_once<T>(work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    // What a panic leaves behind is behind locks that are not poisoned, and each holds one value that is set at once.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => Ok(result?),
        Err(panic) => Err(Failure::Bug(said(&*panic)).into()),
    }
}

/// Drops what may have to wait for copies. At the interpreter's end there is no GIL to give up any more.
pub(crate) fn drop_unlocked<T: Send>(value: T) {
    let mut value = Some(value);
    let dropped = Python::try_attach(|py| {
        let value = value.take();
        unlocked(py, || {
            drop(value);
            Ok(())
        })
    });
    if let Some(Err(error)) = dropped {
        tracing::error!(%error, "while letting go");
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}
