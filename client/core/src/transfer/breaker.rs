//! Which routes work: one that fails repeatedly is left alone, and tried again after a pause.
//!
//! A driver may refuse copies on one way for as long as something lasts, while all others work. Promising what lies there
//! would only make the engine wait for failures, so a way that fails repeatedly is *down*: nothing is found behind it and
//! nothing is stored there. It is tried after a pause, and each time that fails the pause doubles.

use std::time::{Duration, Instant};

/// Failures in a row after which a route is down.
const PATIENCE: u32 = 3;
/// How long a route is left alone when it goes down, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// One that goes down again within this time has never really worked.
const RELAPSE: Duration = Duration::from_secs(60);

/// A route's number: those of one borrower are few, and none goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RouteIndex(pub(super) usize);

/// Some routes. Routes that have no bit belong to every set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RouteSet(u64);

impl RouteSet {
    pub(crate) const ALL: Self = Self(u64::MAX);

    pub(super) fn of_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(super) fn bits(self) -> u64 {
        self.0
    }

    pub(super) fn contains(self, route: RouteIndex) -> bool {
        bit(route) == 0 || self.0 & bit(route) != 0
    }
}

impl Default for RouteSet {
    fn default() -> Self {
        Self::ALL
    }
}

fn bit(route: RouteIndex) -> u64 {
    u32::try_from(route.0).map_or(0, |shift| 1_u64.checked_shl(shift).unwrap_or(0))
}

/// What people are told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RouteNews {
    /// The route is left alone for so long.
    Down { pause: Duration },
    /// It works again.
    Up,
}

/// What is known of routes.
#[derive(Debug, Default)]
pub(super) struct Breakers {
    list: Vec<Health>,
    up: RouteSet,
}

#[derive(Clone, Copy, Debug, Default)]
struct Health {
    failures: u32,
    down: Option<Down>,
    /// How long it was left alone last, and when it came back.
    before: Option<(Duration, Instant)>,
}

#[derive(Clone, Copy, Debug)]
struct Down {
    pause: Duration,
    until: Instant,
    /// It is being tried.
    tried: bool,
}

impl Breakers {
    /// Those that work, as far as is known.
    pub(super) fn up(&self) -> RouteSet {
        self.up
    }

    /// Whether none has failed since it last worked.
    pub(super) fn all_work(&self) -> bool {
        self.list.iter().all(|health| health.failures == 0)
    }

    /// How many do not work.
    pub(super) fn down(&self) -> u32 {
        (u64::MAX ^ self.up.0).count_ones()
    }

    /// Whether a route is down and to be tried now.
    pub(super) fn is_due(&self, route: RouteIndex, now: Instant) -> bool {
        let down = self.list.get(route.0).and_then(|health| health.down);
        down.is_some_and(|down| now >= down.until)
    }

    /// A route that is down is being tried. If nothing comes of it, it is tried again after the same pause.
    pub(super) fn tries(&mut self, route: RouteIndex, now: Instant) {
        if let Some(down) = self
            .list
            .get_mut(route.0)
            .and_then(|health| health.down.as_mut())
        {
            down.until = now + down.pause;
            down.tried = true;
        }
    }

    /// An operation failed on a route. Tells if that is down for longer from now on.
    pub(super) fn failed(&mut self, route: RouteIndex, now: Instant) -> Option<RouteNews> {
        if bit(route) == 0 {
            return None;
        }
        if self.list.len() <= route.0 {
            self.list.resize(route.0 + 1, Health::default());
        }
        let health = &mut self.list[route.0];
        health.failures = health.failures.saturating_add(1);
        let longer = |pause: Duration| LONGEST_PAUSE.min(2 * pause);
        let pause = match (health.down, health.before) {
            (None, _) if health.failures < PATIENCE => return None,
            (None, Some((pause, since))) if now < since + RELAPSE => longer(pause),
            (None, _) => FIRST_PAUSE,
            (Some(down), _) if down.tried => longer(down.pause),
            // It was on its way before the route went down.
            (Some(_), _) => return None,
        };
        health.down = Some(Down {
            pause,
            until: now + pause,
            tried: false,
        });
        self.up.0 &= !bit(route);
        Some(RouteNews::Down { pause })
    }

    /// An operation worked on a route. Tells if that was down.
    pub(super) fn worked(&mut self, route: RouteIndex, now: Instant) -> Option<RouteNews> {
        let health = self.list.get_mut(route.0)?;
        health.failures = 0;
        let down = health.down.take()?;
        health.before = Some((down.pause, now));
        self.up.0 |= bit(route);
        Some(RouteNews::Up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: RouteIndex = RouteIndex(0);
    const OTHER: RouteIndex = RouteIndex(1);

    fn goes_down(routes: &mut Breakers, now: Instant) -> u128 {
        for _ in 1..PATIENCE {
            assert_eq!(routes.failed(ONE, now), None);
        }
        pause(routes.failed(ONE, now))
    }

    fn pause(news: Option<RouteNews>) -> u128 {
        match news {
            Some(RouteNews::Down { pause }) => pause.as_millis(),
            other => panic!("{other:?}"),
        }
    }

    fn due(routes: &Breakers, now: Instant) -> bool {
        routes.is_due(ONE, now)
    }

    #[test]
    fn a_route_that_fails_repeatedly_is_tried_less_and_less_often() {
        let mut routes = Breakers::default();
        let mut now = Instant::now();
        assert_eq!(routes.failed(ONE, now), None, "once is not repeatedly");
        assert!(!routes.all_work() && routes.worked(ONE, now).is_none() && routes.all_work());
        let mut pauses = vec![goes_down(&mut routes, now)];
        for _ in 0..7 {
            assert!(
                routes.failed(ONE, now).is_none(),
                "it was on its way before"
            );
            assert!(!due(&routes, now) && !routes.up().contains(ONE));
            assert!(routes.up().contains(OTHER) && routes.down() == 1);
            now += LONGEST_PAUSE;
            assert!(due(&routes, now));
            routes.tries(ONE, now);
            assert!(!due(&routes, now), "one tries at a time");
            pauses.push(pause(routes.failed(ONE, now)));
        }
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
        assert_eq!(routes.worked(ONE, now), Some(RouteNews::Up));
        assert!(routes.up().contains(ONE) && routes.down() == 0 && routes.all_work());
        assert!(!due(&routes, now + LONGEST_PAUSE));
    }

    #[test]
    fn one_that_goes_down_again_soon_has_never_worked() {
        let mut routes = Breakers::default();
        let now = Instant::now();
        assert_eq!(goes_down(&mut routes, now), 200);
        routes.worked(ONE, now);
        assert_eq!(goes_down(&mut routes, now + RELAPSE / 2), 400);
        routes.worked(ONE, now + RELAPSE / 2);
        assert_eq!(goes_down(&mut routes, now + 2 * RELAPSE), 200);
    }

    #[test]
    fn a_try_that_nothing_comes_of_is_made_again() {
        let mut routes = Breakers::default();
        let now = Instant::now();
        goes_down(&mut routes, now);
        routes.tries(ONE, now + FIRST_PAUSE);
        assert!(!due(&routes, now + FIRST_PAUSE) && due(&routes, now + 2 * FIRST_PAUSE));
    }

    #[test]
    fn more_routes_than_bits_are_always_up() {
        let mut routes = Breakers::default();
        let (far, now) = (RouteIndex(64), Instant::now());
        for _ in 0..PATIENCE {
            assert_eq!(routes.failed(far, now), None);
        }
        assert!(routes.up().contains(far) && routes.worked(far, now).is_none());
        assert_eq!((routes.down(), routes.is_due(far, now)), (0, false));
    }
}
