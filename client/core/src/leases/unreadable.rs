//! Replicas' leases that this borrower cannot read: no block in them is found again.
//!
//! A lease that cannot be read for good is remembered as long as it may live; other trouble, such as a broker that is
//! away, only for a moment.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use swiftcache_proto::domain::LeaseId;

/// How long a lease is left alone after trouble that may pass: twice as long each time, at first and at most.
const MOMENTS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// Leases remembered at a time: as many as a session may read. The oldest is tried once more.
const MOST: usize = 65_536;

/// How long what is wrong with a lease lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lasting {
    /// As long as the lease lives.
    ForGood,
    /// It may pass.
    Moment,
}

#[derive(Clone, Copy, Debug)]
struct Barred {
    /// `None`: for good.
    until: Option<Instant>,
    /// How long it was last left alone for.
    pause: Duration,
}

impl Barred {
    fn holds(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// The leases that cannot be read.
#[derive(Debug, Default)]
pub(super) struct Unreadable {
    leases: HashMap<LeaseId, Barred>,
    /// Those barred for good, the oldest first.
    for_good: VecDeque<LeaseId>,
}

impl Unreadable {
    pub(super) fn contains(&self, lease: LeaseId, now: Instant) -> bool {
        (self.leases.get(&lease)).is_some_and(|barred| barred.holds(now))
    }

    /// The lease cannot be read.
    pub(super) fn add(&mut self, lease: LeaseId, lasting: Lasting, now: Instant) {
        let barred = self.leases.entry(lease).or_insert(Barred {
            until: Some(now),
            pause: Duration::ZERO,
        });
        match (lasting, barred.until) {
            (_, None) => {}
            (Lasting::Moment, _) => {
                barred.pause = (2 * barred.pause).clamp(MOMENTS[0], MOMENTS[1]);
                barred.until = Some(now + barred.pause);
            }
            (Lasting::ForGood, _) => {
                barred.until = None;
                self.for_good.push_back(lease);
            }
        }
        while self.for_good.len() > MOST {
            if let Some(oldest) = self.for_good.pop_front()
                && let Some(barred) = self.leases.get_mut(&oldest)
            {
                barred.until = Some(now);
            }
        }
    }

    /// Forgets what has passed.
    pub(super) fn expire(&mut self, now: Instant) {
        // The same trouble soon again is remembered to be the same.
        let lasts = |barred: &Barred| barred.until.is_none_or(|until| now < until + barred.pause);
        self.leases.retain(|_, barred| lasts(barred));
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.leases.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_that_may_pass_does_and_other_lasts() {
        let mut unreadable = Unreadable::default();
        let now = Instant::now();
        let later = now + MOMENTS[0];
        let [passing, lasting, fine] = [1, 2, 3].map(LeaseId);
        unreadable.add(passing, Lasting::Moment, now);
        unreadable.add(lasting, Lasting::ForGood, now);
        assert!(unreadable.contains(passing, now) && unreadable.contains(lasting, now));
        assert!(!unreadable.contains(fine, now));
        assert!(!unreadable.contains(passing, later));
        assert!(unreadable.contains(lasting, later + MOMENTS[1]));
        // The worse of two wins.
        unreadable.add(lasting, Lasting::Moment, now);
        assert!(unreadable.contains(lasting, later));
        unreadable.expire(later + MOMENTS[0]);
        assert_eq!(unreadable.len(), 1);
    }

    #[test]
    fn what_fails_again_and_again_is_tried_less_and_less_often() {
        let mut unreadable = Unreadable::default();
        let mut now = Instant::now();
        let lease = LeaseId(1);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            unreadable.add(lease, Lasting::Moment, now);
            let begun = now;
            while unreadable.contains(lease, now) {
                now += Duration::from_secs(1);
            }
            pauses.push((now - begun).as_secs());
            unreadable.expire(now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut unreadable = Unreadable::default();
        let now = Instant::now();
        for lease in 0..MOST as u64 + 10 {
            unreadable.add(LeaseId(lease), Lasting::ForGood, now);
        }
        unreadable.expire(now);
        assert_eq!(unreadable.len(), MOST);
        assert!(!unreadable.contains(LeaseId(9), now));
        assert!(unreadable.contains(LeaseId(10), now));
    }
}
