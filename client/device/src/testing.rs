//! A ticket that a test passes by hand.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::{Result, Ticket, stream::Completion};

/// A point in no stream. It is passed when the test says so.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// A ticket for the point.
    pub fn ticket(self: &Arc<Self>) -> Ticket {
        Ticket(Arc::clone(self) as _)
    }

    /// Passes the point.
    pub fn open(&self) {
        *self.open.lock() = true;
        self.changed.notify_all();
    }
}

impl Completion for Gate {
    fn outcome(&self) -> Option<Result<()>> {
        (*self.open.lock()).then_some(Ok(()))
    }

    fn wait(&self) -> Result<()> {
        let mut open = self.open.lock();
        while !*open {
            self.changed.wait(&mut open);
        }
        Ok(())
    }
}
