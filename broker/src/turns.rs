//! Whose turn it is. The broker serves on one thread, so a client that asks without a pause would have everybody else wait for
//! all that it asked at once. Calls of one user therefore wait for each other where they would hold up others':
//!
//! * Of those that change who may touch what, one is at the owner's desk or waits for it, and the rest waits here.
//! * Of those that list, one is being answered.
//! * Of those that are answered at once, lookups above all, any number is.
//!
//! All that up to a share of the time. Beyond it, one call of each kind is served each time that everybody else has had a turn.
//!
//! Nobody sleeps for it: a user alone on the node has all the time that there is. Of root, each process counts by itself.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::core::Process;

/// In each stretch of this length ...
const STRETCH: Duration = Duration::from_millis(10);
/// ... a user's calls are served so long before they let everybody else go first.
const AT_ONCE: Duration = Duration::from_millis(1);
/// Users that are known at a time before those that ask for nothing are forgotten.
const KNOWN: usize = 64;

/// How a call is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// At once, on the serving thread.
    Answered,
    /// By a turn at the owner's desk.
    AtDesk,
    /// In pages, on the serving thread.
    Listed,
    /// By waiting: streams. And health, which costs nothing.
    Free,
}

impl Kind {
    /// The kind of the calls with this path.
    pub(crate) fn of(path: &str) -> Self {
        let Some((service, call)) = path.trim_start_matches('/').split_once('/') else {
            return Self::Free;
        };
        match (service, call) {
            ("swiftcache.v1.Broker", "Lookup" | "Keep" | "Publish" | "Unpublish" | "Report") => {
                Self::Answered
            }
            ("swiftcache.v1.Broker", "Session") => Self::Free,
            ("swiftcache.v1.Broker", _) => Self::AtDesk,
            ("swiftcache.v1.Admin", "GetNode" | "PreviewWithdraw") => Self::Listed,
            ("swiftcache.v1.Admin", call) if call.starts_with("List") => Self::Listed,
            ("swiftcache.v1.Admin", _) => Self::AtDesk,
            _ => Self::Free,
        }
    }
}

/// Whose calls wait for each other: a user's, or a process's of root.
type Who = (u32, Option<Process>);

/// Everybody's turns. Clones are the same turns.
#[derive(Clone, Default)]
pub(crate) struct Turns {
    known: Arc<Mutex<HashMap<Who, Arc<Turn>>>>,
}

/// One user's turns.
struct Turn {
    at_desk: Arc<Semaphore>,
    listed: Arc<Semaphore>,
    answered: Arc<Semaphore>,
    spent: Mutex<Spent>,
}

/// How long a user's calls have been served since a stretch began.
struct Spent {
    since: Instant,
    took: Duration,
}

/// A call that is being served. Drop gives the turn to the next one of its user.
pub(crate) struct Served {
    turn: Option<(Arc<Turn>, Instant)>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some((turn, since)) = &self.turn {
            turn.spent.lock().took += since.elapsed();
        }
    }
}

impl Turns {
    /// Waits for the turn of a call.
    pub(crate) async fn take(&self, process: Process, kind: Kind) -> Served {
        let turn = (kind != Kind::Free).then(|| self.of(process));
        let share = turn.as_ref().is_some_and(|turn| turn.has_had_its_share());
        let permit = match (&turn, kind) {
            (Some(turn), Kind::AtDesk) => next(&turn.at_desk).await,
            (Some(turn), Kind::Listed) => next(&turn.listed).await,
            (Some(turn), Kind::Answered) if share => next(&turn.answered).await,
            _ => None,
        };
        if share {
            // Everybody whose call has arrived has a turn first.
            tokio::task::yield_now().await;
        }
        Served {
            turn: turn.map(|turn| (turn, Instant::now())),
            _permit: permit,
        }
    }

    fn of(&self, process: Process) -> Arc<Turn> {
        let who = (process.uid, (process.uid == 0).then_some(process));
        let mut known = self.known.lock();
        if known.len() >= KNOWN && !known.contains_key(&who) {
            known.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        Arc::clone(known.entry(who).or_insert_with(|| Arc::new(Turn::new())))
    }
}

/// The next turn, first come, first served.
async fn next(turns: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    // This fails only for a semaphore that is closed, and none is.
    Arc::clone(turns).acquire_owned().await.ok()
}

impl Turn {
    fn new() -> Self {
        let one = || Arc::new(Semaphore::new(1));
        Self {
            at_desk: one(),
            listed: one(),
            answered: one(),
            spent: Mutex::new(Spent {
                since: Instant::now(),
                took: Duration::ZERO,
            }),
        }
    }

    fn has_had_its_share(&self) -> bool {
        let mut spent = self.spent.lock();
        if spent.since.elapsed() >= STRETCH {
            *spent = Spent {
                since: Instant::now(),
                took: Duration::ZERO,
            };
        }
        spent.took >= AT_ONCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOD: usize = 200;

    fn process(uid: u32, pid: u32) -> Process {
        Process { pid, birth: 1, uid }
    }

    /// A user makes calls, all at once, and then another one makes one. Returns how many of the first user's calls are served
    /// before it. It has had its share of the time.
    async fn before_the_others(turns: &Turns, kind: Kind, flood: Process, other: Process) -> usize {
        // In this stretch, which does not end within the test.
        *turns.of(flood).spent.lock() = Spent {
            since: Instant::now() + Duration::from_secs(3_600),
            took: AT_ONCE,
        };
        let served = Arc::new(Mutex::new(Vec::new()));
        let call = |of: Process| {
            let (turns, served) = (turns.clone(), Arc::clone(&served));
            tokio::spawn(async move {
                let turn = turns.take(of, kind).await;
                if kind != Kind::Answered {
                    // It waits for a thread or for its next page.
                    tokio::task::yield_now().await;
                }
                served.lock().push(of);
                drop(turn);
            })
        };
        let mut calls: Vec<_> = (0..FLOOD).map(|_| call(flood)).collect();
        calls.push(call(other));
        for call in calls {
            call.await.unwrap();
        }
        let served = served.lock();
        served.iter().position(|of| *of == other).unwrap()
    }

    #[tokio::test]
    async fn a_flood_of_one_user_holds_up_no_other() {
        for kind in [Kind::Answered, Kind::AtDesk, Kind::Listed] {
            for (flood, other) in [
                (process(1_000, 1), process(2_000, 2)),
                // Root's processes are apart too.
                (process(0, 1), process(0, 2)),
            ] {
                let before = before_the_others(&Turns::default(), kind, flood, other).await;
                assert!(before <= 2, "{kind:?}: {before} calls came first");
            }
        }
        // The twins: where calls take no turns, and for another process of the same user, the flood comes first.
        let (flood, other) = (process(1_000, 1), process(2_000, 2));
        let before = before_the_others(&Turns::default(), Kind::Free, flood, other).await;
        assert!(before > FLOOD / 2, "{before} calls came first");
        let same = process(1_000, 2);
        for kind in [Kind::Answered, Kind::AtDesk, Kind::Listed] {
            let before = before_the_others(&Turns::default(), kind, flood, same).await;
            assert!(before > FLOOD / 2, "{kind:?}: {before} calls came first");
        }
    }

    #[tokio::test]
    async fn who_asks_for_nothing_is_forgotten() {
        let turns = Turns::default();
        for pid in 1..10 * KNOWN as u32 {
            drop(turns.take(process(0, pid), Kind::AtDesk).await);
        }
        assert!(turns.known.lock().len() <= KNOWN);
    }

    #[test]
    fn every_call_is_of_a_kind() {
        for (path, kind) in [
            ("/swiftcache.v1.Broker/Lookup", Kind::Answered),
            ("/swiftcache.v1.Broker/Report", Kind::Answered),
            ("/swiftcache.v1.Broker/Lease", Kind::AtDesk),
            ("/swiftcache.v1.Broker/Session", Kind::Free),
            ("/swiftcache.v1.Admin/ListLeases", Kind::Listed),
            ("/swiftcache.v1.Admin/SetQuota", Kind::AtDesk),
            ("/grpc.health.v1.Health/Check", Kind::Free),
            ("", Kind::Free),
        ] {
            assert_eq!(Kind::of(path), kind, "{path}");
        }
    }
}
