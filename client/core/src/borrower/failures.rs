//! What becomes of a borrower when copies fail: the operation has failed, and a route that fails repeatedly is down.

use std::sync::Arc;

use tracing::{debug, warn};

use super::{
    core::Core,
    op::{Op, Purpose},
};
use crate::{
    device::Result,
    transfer::{Refused, Route},
};

impl Core {
    /// Some copies of an op could not be queued.
    pub(super) fn refused(&self, op: &Op, refused: &Refused) {
        match op.purpose {
            Purpose::Probe => debug!(error = %refused.error, "a route still fails"),
            purpose => warn!(error = %refused.error, ?purpose, "copies could not be queued"),
        }
        op.transfer.poison();
        self.failed(op, refused.suspect.as_slice());
    }

    /// An op that is over has worked or failed on every stream that it used. Called outside the state's lock.
    pub(super) fn note_outcome(&self, op: &Op, outcome: &Result<()>) {
        if outcome.is_err() {
            self.failed(op, &op.transfer.failed_on());
            return;
        }
        // What is known of a poisoned op is only that it is not in flight any more.
        if !op.transfer.is_poisoned() && !self.routes.all_work() {
            self.routes.worked(&op.transfer.worked_on());
        }
    }

    fn failed(&self, op: &Op, routes: &[Arc<Route>]) {
        if op.purpose != Purpose::Probe && op.transfer.note_failure() {
            self.state.lock().counts.failed_operations += 1;
        }
        self.routes.failed(routes);
    }
}
