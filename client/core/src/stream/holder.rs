//! The stitched pool as a holder of slabs. A slab that is asked back is let go of when no unit is in it or on the way, however long
//! that takes: units move at step boundaries only.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    core::Core,
    state::{Leased, slab_id},
};
use crate::{
    Error, Result,
    device::DeviceError,
    leases::{Arrival, Holder, Progress, Wants},
    transfer::AreaId,
};

/// Nobody gives up moving a unit because time is over: its bytes are needed.
const FOR_EVER: Duration = Duration::from_secs(366 * 24 * 3600);

pub(super) struct StreamHolder(pub(super) Arc<Core>);

impl StreamHolder {
    /// Why a slab is no home for a unit, if it is none.
    fn unsuitable(&self, slab: &Arrival) -> Option<DeviceError> {
        let core = &self.0;
        let (area, unit) = (&slab.area, core.unit_bytes);
        let device = &core.config.device;
        let refuse = |problem: String| DeviceError::Failed {
            operation: "using a slab as a unit",
            device: device.clone(),
            problem,
        };
        if area.layer_offsets != [0] || area.memory.bytes() != unit {
            let bytes = area.memory.bytes();
            return Some(refuse(format!(
                "units have {unit} bytes, and each is an allocation of its own; this slab lies in one of {bytes}. Use \
                 donors whose --slab is {unit}"
            )));
        }
        if core.state.lock().spoiled.contains(&slab.region) {
            return Some(refuse(
                "its memory could not be mapped at a unit's address".to_owned(),
            ));
        }
        let spaces = core.layer.address_spaces()?;
        spaces.accepts(device, &area.memory).err()
    }
}

impl Holder for StreamHolder {
    fn granted(&self, slab: Arrival) -> Result<()> {
        if let Some(error) = self.unsuitable(&slab) {
            return Err(Error::Device(error));
        }
        let core = &self.0;
        let Arrival { area, region, .. } = slab;
        let mut state = core.state.lock();
        state.homes.granted(slab_id(area.id))?;
        (state.slabs).insert(slab_id(area.id), Leased { area, region });
        core.note(&state);
        Ok(())
    }

    fn wants(&self) -> Wants {
        let state = self.0.state.lock();
        Wants {
            hbm: !state.closing && state.missing_slabs() > 0,
            host: false,
        }
    }

    fn give_up_unused(&self) -> Vec<AreaId> {
        let mut state = self.0.state.lock();
        let gone = match state.places {
            Some(_) => state.take_surplus(),
            None => Vec::new(),
        };
        let unused = std::mem::take(&mut state.unused);
        drop(state);
        drop(gone);
        unused
    }

    fn evacuate(&self, slab: AreaId, window: Duration) -> Option<Instant> {
        let core = &self.0;
        let now = Instant::now();
        let mut state = core.state.lock();
        let deadline = now.saturating_duration_since(core.opened) + window;
        let deadline = u64::try_from(deadline.as_micros()).unwrap_or(u64::MAX);
        state.homes.asked_back(slab_id(slab), deadline);
        // It may have failed to move what is asked back now for another reason.
        state.quiet_until = now;
        let gone = state.take_vacated();
        core.note(&state);
        drop(state);
        drop(gone);
        // Perhaps there is another one to move to.
        core.leases.grow_soon();
        Some(now + FOR_EVER)
    }

    fn is_moving(&self, slab: AreaId) -> bool {
        (self.0.state.lock().homes)
            .occupant(slab_id(slab))
            .is_some()
    }

    fn advance(&self) -> Progress {
        Progress::Idle
    }

    /// With a unit in one this means that the broker does not know its lease any more.
    fn forget(&self, slabs: &[AreaId]) {
        let core = &self.0;
        let mut state = core.state.lock();
        for slab in slabs {
            state.homes.asked_back(slab_id(*slab), 0);
        }
        let gone = state.take_vacated();
        state.unused.retain(|unused| !slabs.contains(unused));
        for slab in slabs {
            if let Some(unit) = state.homes.occupant(slab_id(*slab)) {
                // Its bytes may be another's by now: they are copied nowhere. One on its way has left, or arrives and leaves.
                let _ = state.homes.set_live(unit, false);
                let why = format!(
                    "the broker does not know the lease of a slab that unit {} is in; its bytes may be another's. Was the \
                     broker's ledger lost?",
                    unit.0
                );
                core.lose(&mut state, why);
            }
        }
        core.note(&state);
        drop(state);
        drop(gone);
    }
}
