//! Which regions which sessions said that they cannot map. To them they are as good as not there.

use std::collections::BTreeSet;

use swiftcache_proto::domain::SessionId;

use super::{arena::RegionKey, check::hold};

/// Who cannot map what.
#[derive(Clone, Debug, Default)]
pub(super) struct Unmappable {
    by_session: BTreeSet<(SessionId, RegionKey)>,
    by_region: BTreeSet<(RegionKey, SessionId)>,
}

impl Unmappable {
    pub(super) fn add(&mut self, session: SessionId, region: RegionKey) {
        self.by_session.insert((session, region));
        self.by_region.insert((region, session));
    }

    pub(super) fn contains(&self, session: SessionId, region: RegionKey) -> bool {
        self.by_session.contains(&(session, region))
    }

    /// The session is over.
    pub(super) fn forget_session(&mut self, session: SessionId) {
        while let Some((_, region)) = (self.by_session.range((session, RegionKey::LEAST)..))
            .next()
            .copied()
            .filter(|(of, _)| *of == session)
        {
            self.remove(session, region);
        }
    }

    /// The region is returned, or has another handle.
    pub(super) fn forget_region(&mut self, region: RegionKey) {
        while let Some((_, session)) = (self.by_region.range((region, SessionId(0))..))
            .next()
            .copied()
            .filter(|(of, _)| *of == region)
        {
            self.remove(session, region);
        }
    }

    fn remove(&mut self, session: SessionId, region: RegionKey) {
        self.by_session.remove(&(session, region));
        self.by_region.remove(&(region, session));
    }

    /// Verifies that both ways say the same, of sessions that are not over and regions that are known.
    pub(super) fn check(
        &self,
        lives: impl Fn(SessionId) -> bool,
        known: impl Fn(RegionKey) -> bool,
    ) -> Result<(), String> {
        let turned = self.by_region.iter().map(|(region, id)| (*id, *region));
        hold!(
            turned.collect::<BTreeSet<_>>() == self.by_session,
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
