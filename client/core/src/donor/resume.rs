//! What a connection says of a donor's regions: which of them the broker knows.

use std::{collections::HashSet, mem};

use swiftcache_proto::domain::RegionId;
use tracing::{error, warn};

use super::{
    core::Core,
    region::{Known, Phase, Region, Source},
    state::{Sequel, State},
};
use crate::session::Connected;

impl State {
    /// Takes note of which regions the broker knows. What was offered on this connection already is not in its list.
    pub(super) fn take_note(&mut self, connected: &Connected, source: Source) -> Sequel {
        self.connection = self.connection.max(connected.epoch);
        let sequel = match (connected.replaced, source) {
            (false, _) => self.compare(connected),
            (true, Source::Allocations { .. }) => self.replace(connected.epoch),
            (true, Source::Pool) => self.strand(connected.epoch),
        };
        self.freeing += sequel.returned.len() + sequel.forgotten.len();
        sequel
    }

    fn compare(&mut self, connected: &Connected) -> Sequel {
        let listed: HashSet<RegionId> = connected.regions.iter().copied().collect();
        let mut returned = Vec::new();
        for region in self.regions.values_mut() {
            if !region.was_offered_before(connected.epoch) || region.phase == Phase::Stranded {
                continue;
            }
            if let Phase::Withdrawing { heard, .. } = &mut region.phase {
                *heard = false;
            }
            match (region.known, listed.contains(&region.id)) {
                (Known::Yes, false) => returned.push(region.id),
                // Whatever was on its way to the broker of before is lost. But it may have lent the region and returned it.
                (Known::Perhaps, false) if connected.restarted => match region.phase {
                    Phase::Offered => region.soil(),
                    Phase::Withdrawing { .. } | Phase::Stranded => returned.push(region.id),
                },
                (Known::Perhaps, false) => {}
                (_, true) => {
                    region.known = Known::Yes;
                    // A broker that has restarted lacks the handle.
                    region.confirmed &= !connected.restarted;
                }
                (Known::No, false) => {}
            }
        }
        let take = |id| {
            let region = self.regions.remove(&id)?;
            let asked = match region.phase {
                Phase::Withdrawing { since, .. } => Some(since),
                Phase::Offered | Phase::Stranded => self.asked,
            };
            Some((region, asked))
        };
        Sequel {
            returned: returned.into_iter().filter_map(take).collect(),
            ..Sequel::default()
        }
    }

    /// Frees what the broker has forgotten, and offers as much anew. Safe whoever may still have the old allocations
    /// mapped, since an allocation outlives its importers' mappings.
    fn replace(&mut self, epoch: u64) -> Sequel {
        let (forgotten, kept) = mem::take(&mut self.regions)
            .into_iter()
            .partition(|(_, region)| region.was_offered_before(epoch));
        self.regions = kept;
        let forgotten: Vec<Region> = Vec::from_iter(forgotten.into_values());
        let offered = forgotten
            .iter()
            .filter(|region| region.phase == Phase::Offered);
        Sequel {
            anew: offered.count(),
            forgotten,
            ..Sequel::default()
        }
    }

    /// Nobody can tell any more who has the pool's lent parts mapped and still writes there, so they stay unused.
    fn strand(&mut self, epoch: u64) -> Sequel {
        let mut stranded = 0;
        for region in self.regions.values_mut() {
            if region.was_offered_before(epoch) && region.phase != Phase::Stranded {
                region.phase = Phase::Stranded;
                stranded += region.memory.bytes();
            }
        }
        if stranded > 0 {
            error!(
                bytes = stranded,
                "the broker lost its records of what this engine lent; it stays out of use until the engine restarts"
            );
        }
        Sequel::default()
    }
}

impl Core {
    /// Does what is left to do about a connection.
    pub(super) fn follow_up(&self, sequel: Sequel, source: Source) {
        for (region, asked) in sequel.returned {
            self.own_again(region, asked);
        }
        if !sequel.forgotten.is_empty() {
            let regions = sequel.forgotten.len();
            warn!(
                regions,
                "the broker forgot this donor; offering fresh memory"
            );
            drop(sequel.forgotten);
            self.state.lock().freeing -= regions;
            self.returned.notify_all();
        }
        let Source::Allocations {
            slab_bytes, handle, ..
        } = source
        else {
            return;
        };
        if self.state.lock().target.is_some() {
            // The thread keeps what is to be on offer there.
            return;
        }
        for _ in 0..sequel.anew {
            if let Err(error) = self.offer_one(slab_bytes, handle) {
                warn!(%error, "a slab is not on offer again");
            }
        }
    }
}

impl Region {
    /// Whether the broker may know it from an earlier connection than this.
    fn was_offered_before(&self, epoch: u64) -> bool {
        self.known != Known::No && self.epoch < epoch
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::device::{DeviceLayer, host::HostLayer};
    use swiftcache_proto::domain::{Device, HandleKind};

    const EPOCH: u64 = 5;
    const ALLOCATIONS: Source = Source::Allocations {
        slab_bytes: 4096,
        handle: None,
        elastic: false,
    };

    /// Calls `check` with a region of every kind, before and after every kind of connection took note of it.
    fn every_case(check: impl Fn(&Region, &Connected, Source, Option<&Region>, &Sequel)) {
        let device = Device {
            uuid: "SIM-0".parse().unwrap(),
            name: "simulated GPU".to_owned(),
            hbm_bytes: 1 << 20,
            ordinal: 0,
        };
        let layer = HostLayer::new(vec![device.clone()], Vec::new(), Default::default()).unwrap();
        let memory = (layer.allocate(&device.uuid, 4096, HandleKind::PosixFd)).unwrap();
        let withdrawing = Phase::Withdrawing {
            since: Instant::now(),
            heard: true,
        };
        let phases = [Phase::Offered, withdrawing, Phase::Stranded];
        for case in 0..3 * 3 * 2 * 2 * 8 {
            let mut before = Region::new(memory.clone());
            before.known = [Known::No, Known::Perhaps, Known::Yes][case % 3];
            before.phase = phases[case / 3 % 3];
            before.confirmed = before.known == Known::Yes;
            before.epoch = EPOCH - (case / 9 % 2) as u64;
            let source = [ALLOCATIONS, Source::Pool][case / 18 % 2];
            let flags = case / 36;
            let connected = Connected {
                epoch: EPOCH,
                restarted: flags & 1 != 0,
                replaced: flags & 2 != 0,
                refused: Vec::new(),
                regions: Vec::from_iter((flags & 4 != 0).then_some(before.id)),
            };
            let mut state = State::new();
            state.regions.insert(before.id, before.twin());
            let sequel = state.take_note(&connected, source);
            let leaving = sequel.returned.len() + sequel.forgotten.len();
            assert_eq!(state.freeing, leaving);
            assert_eq!(state.regions.len() + leaving, 1, "a region is lost");
            assert_eq!(state.connection, EPOCH);
            check(
                &before,
                &connected,
                source,
                state.regions.get(&before.id),
                &sequel,
            );
        }
    }

    impl Region {
        fn twin(&self) -> Self {
            let mut twin = Self::new(self.memory.clone());
            twin.id = self.id;
            (twin.known, twin.phase, twin.epoch) = (self.known, self.phase, self.epoch);
            twin.confirmed = self.confirmed;
            twin
        }
    }

    #[test]
    fn memory_leaves_only_when_the_broker_cannot_know_it() {
        every_case(|before, connected, source, after, sequel| {
            if after.is_some() {
                return;
            }
            assert!(before.epoch < EPOCH, "the list is older than the offer");
            assert_ne!(before.known, Known::No, "it is still to be offered");
            let frees = matches!(source, Source::Allocations { .. });
            if connected.replaced {
                assert!(
                    frees,
                    "an engine's pool may be written to by whoever has it mapped"
                );
            } else {
                assert!(!connected.regions.contains(&before.id), "the broker has it");
                assert_ne!(before.phase, Phase::Stranded);
                let sure = before.known == Known::Yes || connected.restarted;
                assert!(sure, "its offer may yet arrive");
                assert_eq!(sequel.returned.len(), 1);
            }
        });
    }

    #[test]
    fn what_may_hold_a_tenants_bytes_is_not_offered_as_it_is() {
        every_case(|before, connected, _, after, _| {
            let Some(after) = after else { return };
            let offered_before = before.known != Known::No && before.epoch < EPOCH;
            let unknown = !connected.replaced && !connected.regions.contains(&before.id);
            let fresh = after.known == Known::No && after.phase == Phase::Offered;
            assert!(!(offered_before && unknown && fresh) || after.soiled);
            assert!(after.soiled <= (fresh && connected.restarted));
        });
    }

    #[test]
    fn what_is_left_is_asked_for_or_offered_again() {
        every_case(|before, connected, source, after, _| {
            let Some(after) = after else { return };
            if before.known == Known::No || before.epoch == EPOCH {
                assert_eq!((after.known, after.phase), (before.known, before.phase));
                return;
            }
            if let Phase::Withdrawing { heard, .. } = after.phase {
                assert!(!heard, "the word may be lost");
            }
            if connected.replaced {
                assert_eq!(after.phase, Phase::Stranded);
                assert!(matches!(source, Source::Pool));
            } else if after.phase == Phase::Offered {
                let has_it = connected.regions.contains(&before.id) && !connected.restarted;
                let coming = after.wants_offer() || after.soiled;
                assert_eq!(coming, !(has_it && before.confirmed));
            }
        });
    }
}
