//! Warnings that anybody can cause as often as they like.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The shortest time between two warnings of one kind.
const PAUSE: Duration = Duration::from_secs(1);

/// Says when one kind of warning may be written: at most once a second.
pub(crate) struct Sparse {
    /// When the last one was written, and how many were withheld since.
    last: Mutex<(Option<Instant>, u64)>,
}

impl Sparse {
    pub(crate) const fn new() -> Self {
        Self {
            last: Mutex::new((None, 0)),
        }
    }

    /// How many warnings were withheld since the last one, if this one may be written.
    pub(crate) fn turn(&self) -> Option<u64> {
        self.turn_at(Instant::now())
    }

    fn turn_at(&self, now: Instant) -> Option<u64> {
        let mut last = self.last.lock();
        if last
            .0
            .is_some_and(|last| now.saturating_duration_since(last) < PAUSE)
        {
            last.1 += 1;
            return None;
        }
        last.0 = Some(now);
        Some(std::mem::take(&mut last.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_is_written_and_says_how_many_were_not() {
        let (sparse, start) = (Sparse::new(), Instant::now());
        assert_eq!(sparse.turn_at(start), Some(0));
        for _ in 0..5 {
            assert_eq!(sparse.turn_at(start + PAUSE / 2), None);
        }
        assert_eq!(sparse.turn_at(start + PAUSE), Some(5));
        assert_eq!(sparse.turn_at(start + PAUSE * 3), Some(0));
    }
}
