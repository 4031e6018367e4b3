//! Work without the GIL, and without panics.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use pyo3::prelude::*;

use crate::failure::{Failure, Result};

/// Does work while other Python threads run. A panic becomes an exception that engines can catch.
pub(crate) fn unlocked<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    // What a panic leaves behind is behind locks that are not poisoned, and each holds one value that is set at once.
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    match outcome {
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
