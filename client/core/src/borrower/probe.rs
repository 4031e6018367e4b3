//! Tries routes that are down, so that they come back by themselves, and no request has to find out.

use std::{sync::Arc, time::Instant};

use tracing::debug;

use super::{
    core::Core,
    op::{Op, Purpose, Queueing},
    pipeline::{self, Refused},
    slab::{Slab, SlabMemory},
};
use crate::device::Memory;

/// What is copied, bytes.
const BYTES: u64 = 4096;

/// Copies that try a route.
#[derive(Debug)]
pub(super) struct Probe(Arc<Op>);

/// Where copies that try routes go.
#[derive(Debug, Default)]
pub(super) struct Prober {
    scratch: Option<Memory>,
    probe: Option<Probe>,
}

impl Prober {
    /// Whether there is something to look after.
    pub(super) fn is_busy(&self) -> bool {
        self.probe.is_some()
    }

    /// Takes the outcome of a probe that is over, and tries the next route that is due. Never waits for copies.
    pub(super) fn advance(&mut self, core: &Core) {
        if let Some(Probe(op)) = &self.probe {
            let Some(outcome) = op.outcome() else {
                return;
            };
            core.state.lock().end_op(op);
            core.note_outcome(op, &outcome);
            self.probe = None;
        }
        if core.state.lock().routes.down() > 0 {
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
        let Some((op, slab)) = core.next_to_try() else {
            return;
        };
        let mut queueing = Queueing::new(&op);
        let tried = try_route(core, &slab, scratch, &mut queueing);
        // It keeps the slab mapped.
        drop(slab);
        drop(queueing);
        if let Err(refused) = tried {
            core.refused(&op, &refused);
        }
        self.probe = Some(Probe(op));
    }
}

impl Core {
    /// A slab behind a route that is to be tried now, with the copies registered that will try it.
    fn next_to_try(&self) -> Option<(Arc<Op>, Arc<SlabMemory>)> {
        let now = Instant::now();
        let mut state = self.state.lock();
        let due: Vec<_> = state.routes.due(now).collect();
        let is_due = |slab: &Slab| slab.is_active() && due.contains(&slab.route);
        let found = state.slabs.iter().find(|(_, slab)| is_due(slab));
        let (index, route, memory) =
            found.map(|(index, slab)| (index, slab.route, Arc::clone(&slab.memory)))?;
        state.routes.tries(route, now);
        let op = Arc::new(Op::new(Purpose::Probe, vec![index], Vec::new()));
        state.begin_op(&op);
        Some((op, memory))
    }
}

/// Copies a few bytes out of a slab as loads do: in one piece, and in two, which may go another way.
fn try_route(
    core: &Core,
    slab: &SlabMemory,
    scratch: &Memory,
    queueing: &mut Queueing<'_>,
) -> Result<(), Refused> {
    let bytes = core.config.layout.layer_bytes[0].min(BYTES);
    for pieces in [1, 2] {
        pipeline::issue_probe(slab, scratch, bytes, pieces, queueing)?;
    }
    Ok(())
}
