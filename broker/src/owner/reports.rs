//! Sessions' reports about their copies, for operators. No decision of the broker depends on them, so the core does not
//! know them and a restart forgets them. What no engine can have done is not believed: a session's totals grow no faster than
//! hardware does.

use std::collections::HashMap;

use parking_lot::MutexGuard;
use swiftcache_proto::{
    domain::{HomeBytes, SessionId},
    traffic::Traffic,
};

use super::Owner;
use crate::{
    core::{Caller, Now},
    error::Refused,
};

/// The reports of all sessions, and their sum.
#[derive(Default)]
pub(crate) struct Reports {
    sessions: HashMap<SessionId, Believed>,
    total: Traffic,
}

/// What a session has reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reported {
    /// Its totals.
    pub(crate) traffic: Traffic,
    /// Ways on which its copies fail now.
    pub(crate) routes_down: u32,
    /// Where its stitched pools are now, if it has any.
    pub(crate) homes: Option<HomeBytes>,
}

/// What a session has reported, as far as it is believed.
struct Believed {
    reported: Reported,
    /// When it last reported, or was opened; milliseconds.
    at: u64,
}

/// The most ways of one session that may be down: more than a node has pairs of devices.
const MOST_ROUTES: u32 = 1_024;
/// The most bytes of one session that may be in one kind of memory: more than a node has.
const MOST_BYTES: u64 = 1 << 50;

impl Reports {
    /// Takes the report of a session that was opened at `since`. Returns by how much its totals have grown since its last one.
    pub(crate) fn take(
        &mut self,
        session: SessionId,
        since: u64,
        told: &Reported,
        now: Now,
    ) -> Traffic {
        let known = self.sessions.entry(session).or_insert(Believed {
            reported: Reported::default(),
            at: since,
        });
        // The clock ticks in milliseconds.
        let ms = now.0.saturating_sub(known.at).max(1);
        known.at = now.0;
        let its = &mut known.reported;
        let more = told.traffic.since(&its.traffic).at_most_in(ms);
        its.traffic += more;
        its.routes_down = told.routes_down.min(MOST_ROUTES);
        let most = |homes: HomeBytes| homes.zip(homes, |bytes, _| bytes.min(MOST_BYTES));
        its.homes = told.homes.map(most);
        self.total += more;
        more
    }

    /// What the session reported, if it has reported.
    pub(crate) fn of(&self, session: SessionId) -> Option<&Reported> {
        self.sessions.get(&session).map(|known| &known.reported)
    }

    /// Ways on which copies fail now, over all sessions.
    pub(crate) fn routes_down(&self) -> u32 {
        let down = self
            .sessions
            .values()
            .map(|known| known.reported.routes_down);
        down.fold(0, u32::saturating_add)
    }

    /// The sum over all sessions, also those that have ended.
    pub(crate) fn total(&self) -> &Traffic {
        &self.total
    }

    /// Forgets a session that is over. Its traffic stays in the sum.
    pub(crate) fn forget(&mut self, session: SessionId) {
        self.sessions.remove(&session);
    }
}

impl Owner {
    /// What the sessions reported.
    pub(crate) fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock()
    }

    /// Takes a session's report.
    ///
    /// # Errors
    /// When the session is not the caller's.
    pub(crate) fn report(&self, caller: Caller, reported: &Reported) -> Result<(), Refused> {
        // Both at once: a session that is over must not come back here.
        let state = self.state.lock();
        state.check_caller(caller)?;
        let since = state.session(caller.session).map_or(0, |its| its.since_ms);
        let (mut reports, now) = (self.reports.lock(), self.now());
        let more = reports.take(caller.session, since, reported, now);
        drop(reports);
        drop(state);
        self.metrics.moved(&more);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use swiftcache_proto::domain::LinkKind;

    use super::*;

    fn loaded(bytes: u64) -> Traffic {
        let mut traffic = Traffic::default();
        traffic.loaded[LinkKind::Nvlink] = bytes;
        traffic
    }

    fn report(bytes: u64, routes_down: u32) -> Reported {
        Reported {
            traffic: loaded(bytes),
            routes_down,
            homes: None,
        }
    }

    /// A report long after the last one.
    fn take(reports: &mut Reports, session: SessionId, told: &Reported) -> Traffic {
        let last = reports.sessions.get(&session).map_or(0, |known| known.at);
        reports.take(session, 0, told, Now(last + 1_000))
    }

    #[test]
    fn routes_are_down_as_long_as_their_session_says_so() {
        let (one, other) = (SessionId(1), SessionId(2));
        let mut reports = Reports::default();
        take(&mut reports, one, &report(5, 2));
        take(&mut reports, other, &report(5, 1));
        assert_eq!(reports.routes_down(), 3);
        take(&mut reports, one, &report(5, 1));
        assert_eq!(reports.routes_down(), 2);
        reports.forget(other);
        assert_eq!(reports.routes_down(), 1);
        take(&mut reports, one, &report(5, 0));
        assert_eq!(reports.routes_down(), 0);
    }

    #[test]
    fn totals_are_counted_once_and_outlive_their_sessions() {
        let (one, other) = (SessionId(1), SessionId(2));
        let mut reports = Reports::default();
        assert_eq!(take(&mut reports, one, &report(5, 0)), loaded(5));
        assert_eq!(take(&mut reports, one, &report(7, 0)), loaded(2));
        assert_eq!(
            take(&mut reports, one, &report(7, 0)),
            loaded(0),
            "sent again"
        );
        assert_eq!(take(&mut reports, one, &report(3, 0)), loaded(0), "it fell");
        assert_eq!(take(&mut reports, one, &report(8, 0)), loaded(1));
        take(&mut reports, other, &report(10, 0));
        reports.forget(one);
        assert_eq!(reports.total(), &loaded(18));
        assert_eq!(
            (reports.of(one), reports.of(other)),
            (None, Some(&report(10, 0)))
        );
    }

    /// Whoever reports nonsense is believed as much as an engine could have done, and what others report still counts. The twin:
    /// what an engine can have done is believed to the byte.
    #[test]
    fn nobody_has_moved_more_than_hardware_can() {
        const SECOND: u64 = 1_000;
        let (liar, engine) = (SessionId(1), SessionId(2));
        let mut reports = Reports::default();
        let most = Traffic {
            lookup_blocks: u64::MAX,
            failed_operations: u64::MAX,
            ..loaded(u64::MAX)
        };
        let lie = Reported {
            traffic: most,
            routes_down: u32::MAX,
            homes: Some(HomeBytes {
                leased: u64::MAX,
                spare: 7,
                host: u64::MAX,
            }),
        };
        for second in 1..4 {
            let believed = reports.take(liar, 0, &lie, Now(second * SECOND));
            assert_eq!(believed, most.at_most_in(SECOND));
            // Again within the same millisecond.
            let again = reports.take(liar, 0, &lie, Now(second * SECOND));
            assert_eq!(again, most.at_most_in(1));
        }
        assert!(reports.routes_down() <= MOST_ROUTES);
        let homes = reports.of(liar).and_then(|reported| reported.homes);
        let believed = homes.map(|homes| (homes.leased, homes.spare, homes.host));
        assert_eq!(believed, Some((MOST_BYTES, 7, MOST_BYTES)));
        let before = *reports.total();
        let honest = 380_000_000_000;
        let told = report(honest, 0);
        assert_eq!(reports.take(engine, 0, &told, Now(SECOND)), loaded(honest));
        assert_eq!(reports.total().since(&before), loaded(honest));
        // A session that was opened late has had less time.
        let late = reports.take(SessionId(3), 2 * SECOND, &lie, Now(2 * SECOND + 5));
        assert_eq!(late, most.at_most_in(5));
    }
}
