//! Sessions' reports about their copies, for operators. No decision of the broker depends on them, so the core does not
//! know them and a restart forgets them.

use std::collections::HashMap;

use parking_lot::MutexGuard;
use swiftcache_proto::{domain::SessionId, traffic::Traffic};

use super::Owner;
use crate::{core::Caller, error::Refused};

/// The reports of all sessions, and their sum.
#[derive(Default)]
pub(crate) struct Reports {
    sessions: HashMap<SessionId, Reported>,
    total: Traffic,
}

/// What a session has reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reported {
    /// Its totals.
    pub(crate) traffic: Traffic,
    /// Ways on which its copies fail now.
    pub(crate) routes_down: u32,
}

impl Reports {
    /// Takes a session's report. Returns by how much its totals have grown since its last one.
    pub(crate) fn take(&mut self, session: SessionId, told: &Reported) -> Traffic {
        let known = self.sessions.entry(session).or_default();
        let more = told.traffic.since(&known.traffic);
        known.traffic += more;
        known.routes_down = told.routes_down;
        self.total += more;
        more
    }

    /// What the session reported, if it has reported.
    pub(crate) fn of(&self, session: SessionId) -> Option<&Reported> {
        self.sessions.get(&session)
    }

    /// Ways on which copies fail now, over all sessions.
    pub(crate) fn routes_down(&self) -> u32 {
        let down = self.sessions.values().map(|reported| reported.routes_down);
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
        let more = self.reports.lock().take(caller.session, reported);
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
        }
    }

    #[test]
    fn routes_are_down_as_long_as_their_session_says_so() {
        let (one, other) = (SessionId(1), SessionId(2));
        let mut reports = Reports::default();
        reports.take(one, &report(5, 2));
        reports.take(other, &report(5, 1));
        assert_eq!(reports.routes_down(), 3);
        reports.take(one, &report(5, 1));
        assert_eq!(reports.routes_down(), 2);
        reports.forget(other);
        assert_eq!(reports.routes_down(), 1);
        reports.take(one, &report(5, 0));
        assert_eq!(reports.routes_down(), 0);
    }

    #[test]
    fn totals_are_counted_once_and_outlive_their_sessions() {
        let (one, other) = (SessionId(1), SessionId(2));
        let mut reports = Reports::default();
        assert_eq!(reports.take(one, &report(5, 0)), loaded(5));
        assert_eq!(reports.take(one, &report(7, 0)), loaded(2));
        assert_eq!(reports.take(one, &report(7, 0)), loaded(0), "sent again");
        assert_eq!(reports.take(one, &report(3, 0)), loaded(0), "it fell");
        assert_eq!(reports.take(one, &report(8, 0)), loaded(1));
        reports.take(other, &report(10, 0));
        reports.forget(one);
        assert_eq!(reports.total(), &loaded(18));
        assert_eq!(
            (reports.of(one), reports.of(other)),
            (None, Some(&report(10, 0)))
        );
    }
}
