//! Sessions' reports about their copies, for operators. No decision of the broker depends on them, so the core does not
//! know them and a restart forgets them.

use std::collections::HashMap;

use swiftcache_proto::{domain::SessionId, traffic::Traffic};

use super::Owner;
use crate::{
    core::{Caller, State},
    error::Refused,
};

/// The reports of all sessions, and their sum.
#[derive(Default)]
pub(crate) struct Reports {
    sessions: HashMap<SessionId, Traffic>,
    total: Traffic,
}

impl Reports {
    /// Takes a session's totals. Returns by how much they have grown since its last report.
    pub(crate) fn take(&mut self, session: SessionId, told: &Traffic) -> Traffic {
        let known = self.sessions.entry(session).or_default();
        let more = told.since(known);
        *known += more;
        self.total += more;
        more
    }

    /// The totals that the session reported, if it has reported.
    pub(crate) fn of(&self, session: SessionId) -> Option<&Traffic> {
        self.sessions.get(&session)
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
    /// Reads the state and the sessions' reports.
    pub(crate) fn read_reports<T>(&self, look: impl FnOnce(&State, &Reports) -> T) -> T {
        let inner = self.inner.lock();
        look(&inner.state, &inner.reports)
    }

    /// Takes a session's report.
    ///
    /// # Errors
    /// When the session is not the caller's.
    pub(crate) fn report(&self, caller: Caller, traffic: &Traffic) -> Result<(), Refused> {
        let mut inner = self.inner.lock();
        inner.state.check_caller(caller)?;
        let more = inner.reports.take(caller.session, traffic);
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

    #[test]
    fn totals_are_counted_once_and_outlive_their_sessions() {
        let (one, other) = (SessionId(1), SessionId(2));
        let mut reports = Reports::default();
        assert_eq!(reports.take(one, &loaded(5)), loaded(5));
        assert_eq!(reports.take(one, &loaded(7)), loaded(2));
        assert_eq!(reports.take(one, &loaded(7)), loaded(0), "sent again");
        assert_eq!(reports.take(one, &loaded(3)), loaded(0), "it fell");
        assert_eq!(reports.take(one, &loaded(8)), loaded(1));
        reports.take(other, &loaded(10));
        reports.forget(one);
        assert_eq!(reports.total(), &loaded(18));
        assert_eq!(
            (reports.of(one), reports.of(other)),
            (None, Some(&loaded(10)))
        );
    }
}
