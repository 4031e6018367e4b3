//! Parts of an engine's pool that other processes are given.

use std::time::Duration;

use super::{
    arena::{Arena, Kind},
    route::Route,
};
use crate::{DeviceError, Memory, Result};

/// How long to wait before memory that comes back is zeroed again, and the longest such pause: twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(512);

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
        lent.zero(bytes)?;
        let lent = lent.into_memory(bytes);
        lent.keep(Box::new(memory.clone()));
        Ok(lent)
    }

    /// The engine's kernels multiply what they mask, so what a borrower left there must not be a NaN. A driver that fails
    /// for a moment is asked again.
    pub(super) fn zero_returned(&self, bytes: u64) {
        let mut pause = FIRST_PAUSE;
        while let Err(error) = self.zero(bytes) {
            if pause > LAST_PAUSE || self.context.death().is_some() {
                tracing::error!(%error, "lent memory comes back with what borrowers left in it");
                return;
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
    }
}
