//! Which regions which sessions said that they cannot map. To them they are as good as not there.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::domain::SessionId;

use super::{arena::RegionKey, check::hold};

/// Who cannot map what.
#[derive(Clone, Debug, Default)]
pub(super) struct Unmappable {
    by_session: BTreeSet<(SessionId, RegionKey)>,
    by_region: BTreeMap<RegionKey, Of>,
    /// How many such regions there are on each device that has one.
    by_device: BTreeMap<usize, u32>,
}

/// A region that somebody cannot map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Of {
    device: usize,
    sessions: BTreeSet<SessionId>,
}

impl Unmappable {
    /// The session cannot map the region, which lies on that device. Says whether that is news.
    pub(super) fn add(&mut self, session: SessionId, region: RegionKey, device: usize) -> bool {
        let of = self.by_region.entry(region).or_default();
        if of.sessions.is_empty() {
            of.device = device;
            *self.by_device.entry(device).or_default() += 1;
        }
        of.sessions.insert(session);
        self.by_session.insert((session, region))
    }

    pub(super) fn contains(&self, session: SessionId, region: RegionKey) -> bool {
        self.by_session.contains(&(session, region))
    }

    /// The regions that the session cannot map.
    pub(super) fn of(&self, session: SessionId) -> impl Iterator<Item = RegionKey> {
        let from_it_on = self.by_session.range((session, RegionKey::LEAST)..);
        let its = from_it_on.take_while(move |(of, _)| *of == session);
        its.map(|(_, region)| *region)
    }

    /// How many sessions cannot map the region.
    pub(super) fn sessions(&self, region: RegionKey) -> u32 {
        let of = self.by_region.get(&region);
        of.map_or(0, |of| of.sessions.len() as u32)
    }

    /// How many regions on the device some session cannot map.
    pub(super) fn regions_on(&self, device: usize) -> u32 {
        self.by_device.get(&device).copied().unwrap_or(0)
    }

    /// The session is over.
    pub(super) fn forget_session(&mut self, session: SessionId) {
        let regions: Vec<RegionKey> = self.of(session).collect();
        for region in regions {
            self.by_session.remove(&(session, region));
            if let Some(of) = self.by_region.get_mut(&region) {
                of.sessions.remove(&session);
                if of.sessions.is_empty() {
                    self.forget_region(region);
                }
            }
        }
    }

    /// The region is returned, or has another handle.
    pub(super) fn forget_region(&mut self, region: RegionKey) {
        let Some(of) = self.by_region.remove(&region) else {
            return;
        };
        for session in of.sessions {
            self.by_session.remove(&(session, region));
        }
        if let Some(count) = self.by_device.get_mut(&of.device) {
            *count -= 1;
            if *count == 0 {
                self.by_device.remove(&of.device);
            }
        }
    }

    /// Verifies that all ways say the same, of sessions that are not over and regions that are known.
    pub(super) fn check(
        &self,
        lives: impl Fn(SessionId) -> bool,
        known: impl Fn(RegionKey) -> bool,
    ) -> Result<(), String> {
        let mut turned = BTreeSet::new();
        let mut by_device: BTreeMap<usize, u32> = BTreeMap::new();
        for (region, of) in &self.by_region {
            turned.extend(of.sessions.iter().map(|id| (*id, *region)));
            *by_device.entry(of.device).or_default() += 1;
        }
        hold!(
            turned == self.by_session && by_device == self.by_device,
            "regions are mistaken about who cannot map them"
        );
        for (session, region) in &self.by_session {
            hold!(lives(*session), "{session:?} is over and maps nothing");
            hold!(
                known(*region),
                "{session:?} cannot map a region that is gone"
            );
        }
        Ok(())
    }
}
