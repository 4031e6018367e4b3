//! Offers: made, made again while nobody knows what became of them, and given up when they are refused.

use std::{collections::VecDeque, time::Instant};

use swiftcache_proto::domain::{HandleKind, RegionId};
use tonic::Code;
use tracing::{debug, warn};

use super::{
    core::Core,
    region::{Known, Phase, Region},
    state::Task,
};
use crate::{Error, Result};

impl Core {
    /// Takes one slab and offers it. False when nobody knows what became of the offer: the slab is kept, and offered again.
    ///
    /// # Errors
    /// When it could not be taken, or the broker has not taken the offer: it is freed.
    pub(super) fn offer_one(&self, slab_bytes: u64, handle: Option<HandleKind>) -> Result<bool> {
        let best = || self.layer.handle_kinds().first().copied();
        let kind = handle.or_else(best).ok_or_else(|| {
            let problem = format!("the {} backend exports nothing", self.layer.name());
            Error::config("device", problem)
        })?;
        let region = Region::new(self.layer.allocate(&self.device, slab_bytes, kind)?);
        let id = region.id;
        // Known here before it is offered, so that it can come back at any time.
        self.state.lock().regions.insert(id, region);
        match self.offer(id) {
            Some(Ok(())) => Ok(true),
            Some(Err(error)) if !error.may_be_done() => {
                self.drop_unknown(id);
                Err(error)
            }
            // Another thread offers it, or it came back meanwhile.
            None | Some(Err(_)) => {
                self.tell(Task::Tell);
                Ok(false)
            }
        }
    }

    /// Offers a region and waits for the answer. Nothing when it is gone, another thread is at it, or it
    /// must be zeroed first.
    pub(super) fn offer(&self, id: RegionId) -> Option<Result<()>> {
        let (offer, memory, before, connection) = {
            let mut state = self.state.lock();
            let connection = state.connection;
            let region = state.regions.get_mut(&id)?;
            if region.offering || region.soiled {
                return None;
            }
            region.offering = true;
            region.epoch = connection;
            let before = region.known;
            if before == Known::No {
                region.known = Known::Perhaps;
            }
            (
                region.offer(self.source),
                region.memory.clone(),
                before,
                connection,
            )
        };
        let export = self.layer.export(&memory).map_err(Error::from);
        let answer = export.and_then(|export| {
            let call = self.session.offer(offer, &export, connection);
            call.wait()
        });
        drop(memory);
        let mut state = self.state.lock();
        let latest = state.connection == connection;
        if let Some(region) = state.regions.get_mut(&id) {
            region.offering = false;
            match &answer {
                Ok(()) => {
                    region.known = Known::Yes;
                    region.doubted = false;
                    // The broker has its handle anew, and lends it to all again.
                    region.unmappable_by = 0;
                    // The broker may have restarted since it said so.
                    region.confirmed = latest;
                }
                Err(error) if error.may_be_done() => {}
                Err(_) => region.known = before,
            }
        }
        drop(state);
        // Nothing is on its way back, perhaps, that was thought to be.
        self.returned.notify_all();
        debug!(region = %id, ?answer, "offered");
        Some(answer)
    }

    /// The regions on offer that the broker has not confirmed.
    pub(super) fn due_offers(&self) -> VecDeque<RegionId> {
        if !self.session.is_connected() {
            return VecDeque::new();
        }
        let state = self.state.lock();
        let due = (state.regions.values())
            .filter(|region| region.phase == Phase::Offered && region.wants_offer());
        due.map(|region| region.id).collect()
    }

    /// Offers a region that the broker has not confirmed.
    pub(super) fn offer_again(&self, id: RegionId) {
        let Some(Err(error)) = self.offer(id) else {
            return;
        };
        let known = (self.state.lock().regions.get(&id)).map(|region| region.known);
        if known == Some(Known::No) && matches!(error, Error::Refused { .. }) {
            warn!(%error, region = %id, "a slab is not on offer any more");
            self.drop_unknown(id);
        } else if known.is_some() && is_refused(&error, Code::FailedPrecondition) {
            debug!(%error, region = %id, "the broker takes it for given back");
            let asked = self.state.lock().asked;
            self.mark_withdrawing(&[id], asked.unwrap_or_else(Instant::now), false);
            self.withdraw_these(vec![id]);
        } else {
            debug!(%error, region = %id, "not offered again yet");
        }
    }

    /// Frees a region that the broker does not know, or lets the engine have it.
    fn drop_unknown(&self, id: RegionId) {
        let mut state = self.state.lock();
        let unknown = |region: &Region| region.known == Known::No && !region.offering;
        if !state.regions.get(&id).is_some_and(unknown) {
            return;
        }
        let region = state.regions.remove(&id);
        state.freeing += 1;
        drop(state);
        drop(region);
        self.state.lock().freeing -= 1;
        self.returned.notify_all();
    }
}

pub(super) fn is_refused(error: &Error, code: Code) -> bool {
    matches!(error, Error::Refused { status, .. } if status.code() == code)
}
