//! Adopting: a granted slab is mapped and handed to the holder, or the broker is told that it is not held.

use std::{sync::Arc, time::Duration};

use swiftcache_proto::domain::{Hold, LeaseId};
use tracing::debug;

use super::{
    core::Leases,
    holder::{Arrival, Holder},
    slabs::{LeaseKey, Slab},
    state::Pending,
};
use crate::{
    Error, Result,
    session::{Call, Grant, Left, Opening, Session},
    transfer::BlockArea,
};

/// What became of a grant.
#[derive(Debug)]
pub(super) enum Adopted {
    /// It is in use.
    Yes,
    /// It must not be used, or not any more.
    No,
    /// It cannot be mapped in this process.
    Unmapped(Error),
}

impl Leases {
    /// Maps a granted slab and hands it to the holder. Otherwise an own lease is the caller's to release.
    pub(super) fn adopt(
        &self,
        holder: &dyn Holder,
        session: &Session,
        grant: &Grant,
        hold: Hold,
        epoch: u64,
        left: Left,
    ) -> Adopted {
        {
            let mut state = self.state.lock();
            let medium = grant.device.medium();
            let own = hold == Hold::Own;
            if own {
                let seen = state.slab_bytes.of_mut(medium);
                *seen = Some(seen.map_or(grant.slab_bytes, |seen| seen.min(grant.slab_bytes)));
            }
            let most = self.settings.most(medium);
            let left = most.saturating_sub(state.leased_bytes(medium));
            let too_much = own && state.is_too_large(medium, grant.slab_bytes, left);
            // A grant of an earlier connection: the broker has been told since that it is not held.
            let stale = session.epoch() != epoch;
            let revoked = state.revoked_early.contains(&grant.lease);
            let known = state.slabs.of_lease(grant.lease).is_some()
                || state.pending.contains_key(&grant.lease);
            if too_much || stale || revoked || known {
                return if known && !own {
                    Adopted::Yes
                } else {
                    Adopted::No
                };
            }
            let pending = Pending {
                hold,
                medium,
                bytes: grant.slab_bytes,
                revoked: false,
                refused: false,
            };
            state.pending.insert(grant.lease, pending);
        }
        // From here on the lease is claimed when the session resumes, and its revocations are remembered.
        let key = LeaseKey {
            lease: grant.lease,
            generation: grant.generation,
        };
        let mapped = self.map(session, grant).and_then(|area| {
            // Closed until it is in the table: a holder that is told to forget it has heard of it before.
            area.set_open(false);
            holder.granted(Arrival {
                area: Arc::clone(&area),
                key,
                region: grant.region,
                hold,
                left,
            })?;
            Ok(area)
        });
        let mut state = self.state.lock();
        let pending = state.pending.remove(&grant.lease);
        let taken = pending.is_none_or(|pending| pending.revoked || pending.refused);
        match mapped {
            Ok(area) if !taken => {
                debug!(
                    lease = %grant.lease, bytes = grant.slab_bytes, device = %grant.device,
                    link = %grant.link, slots = grant.slots, ?hold, "lease mapped"
                );
                area.set_open(true);
                let slab = Slab::new(Some(key), hold, grant.slab_bytes, area);
                state.slabs.insert(slab);
                state.map_pause = Duration::ZERO;
                Adopted::Yes
            }
            outcome => {
                drop(state);
                // Unmaps before anyone is told.
                let error = match outcome {
                    Ok(area) => {
                        holder.forget(&[area.id]);
                        None
                    }
                    Err(error) => Some(error),
                };
                if pending.is_some_and(|pending| pending.revoked) {
                    session.acknowledge(grant.lease, grant.generation);
                }
                error.map_or(Adopted::No, Adopted::Unmapped)
            }
        }
    }

    fn map(&self, session: &Session, grant: &Grant) -> Result<Arc<BlockArea>> {
        let route = self.routes.to(grant.device.medium(), &grant.device)?;
        let (layer, device) = (self.layer.as_ref(), &self.settings.device);
        let mapping = self.mappings.open(session, layer, device, grant)?;
        let layers = &self.settings.layer_bytes;
        let memory = mapping.memory.clone();
        let (base, slots, link) = (grant.offset, grant.slots, grant.link);
        let area = BlockArea::new(memory, base, slots, layers, link, route);
        // What a descriptor stands for goes with its last mapping, what a legacy handle stands for with its process.
        let lasts = matches!(grant.opening, Opening::Token(_));
        Ok(Arc::new(area.lasting(lasts).keeping(mapping)))
    }
}

/// Tells the broker that a lease is not held, or not read; perhaps because its memory cannot be mapped.
pub(super) fn give_back(session: &Session, lease: LeaseId, unmappable: bool) -> Call<()> {
    match unmappable {
        true => session.cannot_map(vec![lease]),
        // What was inherited goes back to where it was; there is nothing in others.
        false => session.bequeath(vec![lease]),
    }
}
