//! Tries routes that are down, so that they come back by themselves, and no request has to find out.

use std::{sync::Arc, time::Instant};

use tracing::debug;

use super::{
    core::Leases,
    slabs::{Flight, Slab},
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
    probe: Option<Arc<Flight>>,
}

impl Prober {
    /// Whether there is something to look after.
    pub(super) fn is_busy(&self) -> bool {
        self.probe.is_some()
    }

    /// Takes the outcome of a probe that is over, and tries the next route that is due. Never waits for copies.
    pub(super) fn advance(&mut self, leases: &Leases) {
        if let Some(flight) = &self.probe {
            let Some(outcome) = flight.transfer.outcome() else {
                return;
            };
            leases.end(flight);
            leases.routes.note_outcome(&flight.transfer, &outcome);
            self.probe = None;
        }
        if leases.routes.down() > 0 {
            self.begin(leases);
        }
    }

    fn begin(&mut self, leases: &Leases) {
        let scratch = match &self.scratch {
            Some(scratch) => scratch,
            None => match leases.layer.allocate_host(&leases.settings.device, BYTES) {
                Ok(memory) => self.scratch.insert(memory),
                Err(error) => {
                    debug!(%error, "no memory to try a route with");
                    return;
                }
            },
        };
        let Some((flight, area)) = leases.next_to_try() else {
            return;
        };
        let bytes = leases.settings.layer_bytes[0].min(BYTES);
        let mut queueing = Queueing::new(&flight.transfer, Direction::Load);
        let tried = issue_probe(&area, scratch, bytes, &mut queueing);
        // It keeps the slab mapped.
        drop(area);
        drop(queueing);
        if let Err(refused) = tried {
            debug!(error = %refused.error, "a route still fails");
            leases.routes.note_refusal(&flight.transfer, &refused);
        }
        self.probe = Some(flight);
    }
}

impl Leases {
    /// A slab behind a route that is to be tried now, with the transfer registered that will try it.
    fn next_to_try(&self) -> Option<(Arc<Flight>, Arc<BlockArea>)> {
        let now = Instant::now();
        let mut registering = self.registering();
        let is_due =
            |slab: &&Slab| slab.draining.is_none() && self.routes.is_due(&slab.area.route, now);
        let found = registering.0.slabs.iter().find(is_due);
        let area = found.map(|slab| Arc::clone(&slab.area))?;
        Some((registering.begin(vec![area.id]), area))
    }
}
