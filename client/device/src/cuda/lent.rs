//! Parts of an engine's pool that other processes are given.

use super::{
    arena::{Arena, Kind},
    context::Entered,
    route::Route,
};
use crate::{DeviceError, Memory, Result};

impl Arena {
    /// Lends a range of adopted memory. Its export opens the whole allocation that it lies in, and `base` says where.
    ///
    /// # Safety
    /// Nothing but copies with the result, and other processes, reads or writes the range as long as the result lives.
    pub(super) unsafe fn lend(memory: &Memory, offset: u64, bytes: u64) -> Result<Memory> {
        let pool = Self::of(memory)?;
        let failed = |problem: &str| DeviceError::Failed {
            operation: "lending memory",
            device: memory.device().clone(),
            problem: problem.to_owned(),
        };
        if !matches!(pool.kind, Kind::Adopted) {
            return Err(failed("only an engine's own memory is lent in place"));
        }
        if bytes == 0 {
            return Err(failed("the range is empty"));
        }
        let address = memory.at(offset, bytes)?;
        // Asked of the driver before any byte is given up: it refuses some kinds of memory.
        pool.export()?;
        let lent = Self::new(&pool.context, address, Kind::Lent(bytes), Route::Device);
        lent.zero(bytes, &pool.context.enter()?)?;
        let lent = lent.into_memory(bytes);
        lent.keep(Box::new(memory.clone()));
        Ok(lent)
    }

    /// The engine's kernels multiply what they mask, so what a borrower left there must not be a NaN.
    pub(super) fn zero_returned(&self, bytes: u64, entered: &Entered<'_>) {
        if let Err(error) = self.zero(bytes, entered) {
            tracing::error!(%error, "lent memory comes back with what borrowers left in it");
        }
    }
}
