//! Withdrawal: a region's way back to its donor.

use std::collections::BTreeSet;

use swiftcache_proto::domain::{AllocationId, RegionId, RevokeReason, SessionId};

use super::{
    Caller, Effect, Note, Outgoing, Record, Refusal, Reply, Withdraw, WithdrawWhat, account::Place,
    arena::Key, regions::Region, state::State,
};

/// The returned regions a session is told of again when it attaches; a donor that missed older ones learns of them
/// from the regions listed when it resumes.
const RETURNED_REMEMBERED: usize = 4_096;

/// The bytes asked back, which must be some.
pub(super) fn need_of(bytes: u64) -> Result<u64, Refusal> {
    match bytes {
        0 => Err(Refusal::Invalid {
            field: "bytes",
            problem: "is 0, and no region is named".to_owned(),
        }),
        bytes => Ok(bytes),
    }
}

impl State {
    pub(super) fn withdraw(&mut self, withdraw: Withdraw) -> Result<Reply, Refusal> {
        let chosen = match withdraw.what {
            WithdrawWhat::Regions(ids) => self.named_regions(withdraw.caller, &ids)?,
            WithdrawWhat::Bytes { device, bytes } => {
                self.session_of(withdraw.caller)?;
                let device = self.devices.number(&device)?;
                let bytes = need_of(bytes)?;
                let own = self.regions_of(withdraw.caller.session);
                self.cheapest_regions(own, device, bytes)
            }
        };
        let regions = chosen.iter().map(|key| self.regions[*key].id).collect();
        let bytes = chosen.iter().map(|key| self.regions[*key].bytes).sum();
        for key in chosen {
            self.withdraw_region(key, RevokeReason::Withdrawn, withdraw.drain_ms);
        }
        Ok(Reply::Withdrawing { regions, bytes })
    }

    /// The caller's regions of these ids, without those it already has back.
    fn named_regions(&self, caller: Caller, ids: &[RegionId]) -> Result<Vec<Key<Region>>, Refusal> {
        let session = self.session_of(caller)?;
        let mut chosen = BTreeSet::new();
        for id in ids {
            let Some(key) = self.region_ids.get(id) else {
                if session.returned.contains(id) {
                    continue;
                }
                return Err(Refusal::Unknown {
                    what: "region",
                    which: id.to_string(),
                });
            };
            if self.regions[*key].donor != caller.session {
                return Err(Refusal::NotYours {
                    what: "region",
                    which: id.to_string(),
                });
            }
            chosen.insert((*id, *key));
        }
        Ok(chosen.into_iter().map(|(_, key)| key).collect())
    }

    pub(super) fn regions_of(&self, donor: SessionId) -> impl Iterator<Item = Key<Region>> {
        let ids = self.sessions[&donor].regions.iter();
        ids.map(|id| self.region_ids[id])
    }

    /// At least `bytes` of those of `candidates` that lie on a device, or all there are: regions without a lease first,
    /// then those with the fewest published blocks, then those whose blocks were found longest ago.
    pub(super) fn cheapest_regions(
        &self,
        candidates: impl IntoIterator<Item = Key<Region>>,
        device: usize,
        bytes: u64,
    ) -> Vec<Key<Region>> {
        let mut regions: Vec<_> = candidates
            .into_iter()
            .filter(|key| {
                let region = &self.regions[*key];
                region.device == device && !region.withdrawing
            })
            .collect();
        regions.sort_by_key(|key| {
            let region = &self.regions[*key];
            let lent = region.leases > 0;
            (lent, region.published, region.last_hit, region.id)
        });
        let mut chosen = Vec::new();
        let mut sum = 0;
        for key in regions {
            if sum >= bytes {
                break;
            }
            sum += self.regions[key].bytes;
            chosen.push(key);
        }
        chosen
    }

    /// Sends a region on its way back: revokes its leases, and returns it once nobody holds a slab of it.
    pub(super) fn withdraw_region(
        &mut self,
        key: Key<Region>,
        reason: RevokeReason,
        drain_ms: u32,
    ) {
        if !self.regions[key].withdrawing {
            let (region, bytes) = (self.regions[key].id, self.regions[key].bytes);
            self.out
                .push(Effect::Record(Record::RegionWithdrawn { region }));
            self.note(Note::Withdrawing { region, bytes });
            self.stop_lending(key);
        }
        for lease in self.regions[key].leased() {
            self.revoke(lease, reason, drain_ms, None);
        }
        if self.regions[key].leases == 0 {
            self.return_region(key);
        }
    }

    pub(super) fn stop_lending(&mut self, key: Key<Region>) {
        self.edit_region(key, |region| {
            region.withdrawing = true;
            // Its donor is the one zeroing them: nothing to wait for.
            for slab in region.in_place(Place::Scrubbing).collect::<Vec<_>>() {
                region.put(slab, Place::Free);
            }
        });
    }

    /// Nobody can touch the region any more: it is its donor's own.
    pub(super) fn return_region(&mut self, key: Key<Region>) {
        let (region, bytes) = (self.regions[key].id, self.regions[key].bytes);
        self.out
            .push(Effect::Record(Record::RegionReturned { region }));
        self.note(Note::Returned { region, bytes });
        let donor = self.regions[key].donor;
        // The broker's own hold on the memory goes before its donor hears that nobody has any.
        if let Some(allocation) = self.remove_region(key) {
            self.out.push(Effect::DropHandle(allocation));
        }
        self.send(donor, Outgoing::Returned(region));
        self.bury(donor);
    }

    /// Forgets a region; names its allocation if that was its last.
    pub(super) fn remove_region(&mut self, key: Key<Region>) -> Option<AllocationId> {
        self.unlist(key);
        let region = self.regions.remove(key);
        self.slabs -= region.slabs.len();
        self.region_ids.remove(&region.id);
        for session in &region.unmappable_by {
            if let Some(session) = self.sessions.get_mut(session) {
                session.unmappable.remove(&region.id);
            }
        }
        if let Some(donor) = self.sessions.get_mut(&region.donor) {
            donor.regions.remove(&region.id);
            donor.donated_bytes -= region.bytes;
            if donor.returned.len() >= RETURNED_REMEMBERED {
                donor.returned.pop_front();
            }
            donor.returned.push_back(region.id);
        }
        let neighbours = self.allocations.get_mut(&region.allocation)?;
        neighbours.remove(&region.offset);
        if !neighbours.is_empty() {
            return None;
        }
        self.allocations.remove(&region.allocation);
        Some(region.allocation)
    }
}
