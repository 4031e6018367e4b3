//! What the driver refuses, as errors about memory.

use swiftcache_proto::domain::HandleKind;

use super::{
    context::Context,
    driver::{Code, OUT_OF_MEMORY},
};
use crate::{DeviceError, Result};

/// Turns an allocation's refusal into an error that says how much was asked for.
pub(super) fn allocated(
    context: &Context,
    code: Code,
    operation: &'static str,
    bytes: u64,
) -> Result<()> {
    if code == OUT_OF_MEMORY {
        return Err(DeviceError::OutOfMemory {
            uuid: context.uuid.clone(),
            bytes,
            problem: context.driver.describe(code),
        });
    }
    context.check(code, operation)
}

/// A handle cannot be opened here.
pub(super) fn refuse_import(kind: HandleKind, problem: String) -> DeviceError {
    DeviceError::Handle {
        action: "import",
        kind,
        problem,
    }
}

/// A memory cannot be exported so.
pub(super) fn refuse_export(kind: HandleKind, problem: &str) -> DeviceError {
    DeviceError::Handle {
        action: "export",
        kind,
        problem: problem.to_owned(),
    }
}
