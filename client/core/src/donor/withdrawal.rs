//! Regions on their way back.

use std::{mem, time::Instant};

use swiftcache_proto::domain::RegionId;
use tonic::Code;
use tracing::{debug, warn};

use super::{
    core::Core,
    offer::is_refused,
    region::{Known, Phase, Region},
    state::{Answer, Asking, State, Task},
};
use crate::{
    Error, Result,
    session::{Call, WithdrawWhat, Withdrawing},
};

impl Core {
    pub(super) fn withdraw(&self, bytes: u64) -> Result<u64> {
        if bytes == 0 {
            return Ok(0);
        }
        let (asked, call) = self.ask(bytes);
        let answer = call.wait();
        if answer.as_ref().is_err_and(Error::may_be_done) {
            self.state.lock().doubt();
            self.tell(Task::Tell);
        }
        let withdrawing = answer?;
        self.mark_withdrawing(&withdrawing.regions, asked, true);
        Ok(withdrawing.bytes)
    }

    fn ask(&self, bytes: u64) -> (Instant, Call<Withdrawing>) {
        let asked = Instant::now();
        self.state.lock().asked = Some(asked);
        let what = WithdrawWhat::Bytes {
            device: self.device.clone(),
            bytes,
        };
        (asked, self.session.withdraw(what, self.drain))
    }

    /// Asks for bytes back without waiting for the answer, which [`hear`](Self::hear) takes.
    pub(super) fn ask_back(&self, bytes: u64) {
        let (since, call) = self.ask(bytes);
        let answer = Answer::Awaited(call);
        self.state.lock().asking.push(Asking {
            since,
            bytes,
            answer,
        });
    }

    /// Takes the answers that have come: bytes on their way back, or why not.
    pub(super) fn hear(&self) -> Vec<Result<u64>> {
        let mut answers = Vec::new();
        let mut state = self.state.lock();
        for mut asking in mem::take(&mut state.asking) {
            let since = asking.since;
            match asking.answer {
                Answer::Awaited(ref mut call) => match call.try_take() {
                    None => state.asking.push(asking),
                    Some(answer) => {
                        // Under the same lock, so that a status shows bytes as asked for or as on their way.
                        match &answer {
                            Ok(withdrawing) => {
                                state.mark_withdrawing(&withdrawing.regions, since, true);
                            }
                            Err(error) if error.may_be_done() => {
                                asking.answer = Answer::Lost(state.doubt());
                                state.asking.push(asking);
                                self.tell(Task::Tell);
                            }
                            Err(_) => {}
                        }
                        answers.push(answer.map(|withdrawing| withdrawing.bytes));
                    }
                },
                // Asked for again before it is known what came of it, twice as much could come back.
                Answer::Lost(ref regions) => {
                    if regions.iter().any(|id| state.is_in_doubt(*id)) {
                        state.asking.push(asking);
                    }
                }
            }
        }
        answers
    }

    /// Asks for everything back.
    pub(super) fn withdraw_all(&self) {
        let mut state = self.state.lock();
        state.target = None;
        let all: Vec<RegionId> = state.regions.keys().copied().collect();
        drop(state);
        if all.is_empty() {
            return;
        }
        let asked = Instant::now();
        self.state.lock().asked = Some(asked);
        self.mark_asked_back(&all, asked);
        self.withdraw_unheard();
    }

    /// Has the donor's thread ask for regions back. Those that the broker cannot have heard of are back at once.
    pub(super) fn ask_back_these(&self, ids: &[RegionId]) {
        self.mark_asked_back(ids, Instant::now());
        self.tell(Task::Tell);
    }

    fn mark_asked_back(&self, ids: &[RegionId], asked: Instant) {
        let mut unknown: Vec<Region> = Vec::new();
        {
            let mut state = self.state.lock();
            for id in ids {
                if (state.regions.get(id)).is_some_and(|region| region.known == Known::No) {
                    unknown.extend(state.regions.remove(id));
                }
            }
        }
        drop(unknown);
        self.returned.notify_all();
        self.mark_withdrawing(ids, asked, false);
    }

    pub(super) fn mark_withdrawing(&self, regions: &[RegionId], since: Instant, heard: bool) {
        (self.state.lock()).mark_withdrawing(regions, since, heard);
    }

    /// Asks again for what the broker has not said it knows to be asked for: a call that failed may never have
    /// reached it, and it may be this connection's last word for hours.
    pub(super) fn withdraw_unheard(&self) {
        if !self.session.is_connected() {
            return;
        }
        let mut unheard = Vec::new();
        let mut unsettled = Vec::new();
        for region in self.state.lock().regions.values() {
            let waits = matches!(region.phase, Phase::Withdrawing { heard: false, .. });
            // What another thread offers is asked for when that is over.
            if waits && !region.offering {
                unheard.push(region.id);
                if region.known != Known::Yes {
                    unsettled.push(region.id);
                }
            }
        }
        // An offer whose outcome is unknown may still be on its way. Once it has been answered, or refused, none
        // that comes later can put freed memory on offer.
        for id in unsettled {
            match self.offer(id) {
                Some(Ok(())) => {}
                Some(Err(error)) if is_refused(&error, Code::FailedPrecondition) => {}
                outcome => {
                    debug!(?outcome, region = %id, "not withdrawn yet");
                    unheard.retain(|other| *other != id);
                }
            }
        }
        if !unheard.is_empty() {
            self.withdraw_these(unheard);
        }
    }

    pub(super) fn withdraw_these(&self, ids: Vec<RegionId>) {
        let what = WithdrawWhat::Regions(ids.clone());
        match self.session.withdraw(what, self.drain).wait() {
            Ok(withdrawing) => {
                for id in ids {
                    if withdrawing.regions.contains(&id) {
                        self.mark_heard(id);
                    } else {
                        // Already returned, and the word got lost.
                        self.take_back(id);
                    }
                }
            }
            // One that the broker does not know is nobody's but this donor's.
            Err(error) if is_refused(&error, Code::NotFound) => match ids[..] {
                [id] => self.take_back(id),
                // The refusal of all does not say which.
                _ => ids.into_iter().for_each(|id| self.withdraw_these(vec![id])),
            },
            Err(error) => warn!(%error, regions = ids.len(), "not withdrawn; asked again soon"),
        }
    }

    fn mark_heard(&self, id: RegionId) {
        if let Some(region) = self.state.lock().regions.get_mut(&id)
            && let Phase::Withdrawing { heard, .. } = &mut region.phase
        {
            *heard = true;
        }
    }

    /// A region is this donor's own again: frees its memory, or lets the engine have it.
    pub(super) fn take_back(&self, id: RegionId) {
        let mut state = self.state.lock();
        let asked = match state.regions.get(&id).map(|region| region.phase) {
            Some(Phase::Withdrawing { since, .. }) => Some(since),
            Some(Phase::Offered) => state.asked,
            // Told twice after a lost stream; or by a broker that cannot know.
            None | Some(Phase::Stranded) => return,
        };
        let Some(region) = state.regions.remove(&id) else {
            return;
        };
        state.freeing += 1;
        drop(state);
        self.own_again(region, asked);
    }

    /// Frees the memory of a region that is no longer listed and is counted as being freed, or lets the engine have it.
    pub(super) fn own_again(&self, region: Region, asked: Option<Instant>) {
        let id = region.id;
        // Freeing or zeroing takes the driver a while. It counts as given back when it is done.
        drop(region);
        let mut state = self.state.lock();
        state.freeing -= 1;
        state.returned += 1;
        if let Some(asked) = asked {
            let took = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
            state.give_back.saturating_record(took.max(1));
            debug!(region = %id, took_us = took, "region given back");
        } else {
            debug!(region = %id, "region given back unasked");
        }
        drop(state);
        self.returned.notify_all();
    }
}

impl State {
    fn mark_withdrawing(&mut self, regions: &[RegionId], since: Instant, heard: bool) {
        for id in regions {
            if let Some(region) = self.regions.get_mut(id)
                && region.phase == Phase::Offered
            {
                region.phase = Phase::Withdrawing { since, heard };
            }
        }
    }

    /// The broker may have begun to give back some of the regions on offer. Which, it says when they are offered again.
    fn doubt(&mut self) -> Vec<RegionId> {
        let certain = (self.regions.values_mut())
            .filter(|region| region.phase == Phase::Offered && region.confirmed);
        let doubted = certain.map(|region| {
            region.confirmed = false;
            region.doubted = true;
            region.id
        });
        doubted.collect()
    }

    fn is_in_doubt(&self, id: RegionId) -> bool {
        let region = self.regions.get(&id);
        region.is_some_and(|region| region.phase == Phase::Offered && region.doubted)
    }
}
