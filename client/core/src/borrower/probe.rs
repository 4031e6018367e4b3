//! Tries routes that are down, so that they come back by themselves, and no request has to find out.

use std::{sync::Arc, time::Instant};

use tracing::debug;

use super::{
    core::Core,
    op::{Op, Purpose},
    slab::Slab,
};
use crate::{
    device::Memory,
    transfer::{BlockArea, Direction, Queueing, issue_probe},
};

/// What is copied, bytes.
const BYTES: u64 = 4096;

/// Where copies that try routes go, and those that are under way.
#[derive(Debug, Default)]
pub(super) struct Prober {
    scratch: Option<Memory>,
    probe: Option<Arc<Op>>,
}

impl Prober {
    /// Whether there is something to look after.
    pub(super) fn is_busy(&self) -> bool {
        self.probe.is_some()
    }

    /// Takes the outcome of a probe that is over, and tries the next route that is due. Never waits for copies.
    pub(super) fn advance(&mut self, core: &Core) {
        if let Some(op) = &self.probe {
            let Some(outcome) = op.transfer.outcome() else {
                return;
            };
            core.state.lock().end_op(op);
            core.note_outcome(op, &outcome);
            self.probe = None;
        }
        if core.routes.down() > 0 {
            self.begin(core);
        }
    }

    fn begin(&mut self, core: &Core) {
        let scratch = match &self.scratch {
            Some(scratch) => scratch,
            None => match core.layer.allocate_host(&core.config.device, BYTES) {
                Ok(memory) => self.scratch.insert(memory),
                Err(error) => {
                    debug!(%error, "no memory to try a route with");
                    return;
                }
            },
        };
        let Some((op, area)) = core.next_to_try() else {
            return;
        };
        let bytes = core.config.layout.layer_bytes[0].min(BYTES);
        let mut queueing = Queueing::new(&op.transfer, Direction::Load);
        let tried = issue_probe(&area, scratch, bytes, &mut queueing);
        // It keeps the slab mapped.
        drop(area);
        drop(queueing);
        if let Err(refused) = tried {
            core.refused(&op, &refused);
        }
        self.probe = Some(op);
    }
}

impl Core {
    /// A slab behind a route that is to be tried now, with the copies registered that will try it.
    fn next_to_try(&self) -> Option<(Arc<Op>, Arc<BlockArea>)> {
        let now = Instant::now();
        let mut state = self.state.lock();
        let is_due = |slab: &Slab| slab.is_active() && self.routes.is_due(&slab.area.route, now);
        let found = state.slabs.iter().find(|(_, slab)| is_due(slab));
        let area = found.map(|(_, slab)| Arc::clone(&slab.area))?;
        let op = Op::new(Purpose::Probe, vec![area.id], Vec::new());
        state.begin_op(&op);
        Some((op, area))
    }
}
