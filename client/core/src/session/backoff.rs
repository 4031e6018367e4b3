//! How long to wait before the next attempt.

use std::time::Duration;

use rand::Rng;

/// The first pause is up to this long.
const FIRST: Duration = Duration::from_millis(20);
/// No pause is longer: a restarted broker is found within this time.
const LONGEST: Duration = Duration::from_secs(2);

/// Exponential pauses with jitter, so that the node's clients do not all return in the same instant.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The next pause: between half and all of `FIRST * 2^failures`, at most [`LONGEST`].
    pub(super) fn next(&mut self, random: &mut impl Rng) -> Duration {
        let whole = FIRST
            .saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX))
            .min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        whole.mul_f64(random.random_range(0.5..=1.0))
    }

    /// An attempt succeeded.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_over() {
        let mut backoff = Backoff::default();
        let mut random = rand::rng();
        for failures in 0..100 {
            let whole = FIRST
                .saturating_mul(2_u32.saturating_pow(failures))
                .min(LONGEST);
            let pause = backoff.next(&mut random);
            assert!(pause <= whole && pause * 2 >= whole, "{pause:?} {whole:?}");
        }
        backoff.reset();
        assert!(backoff.next(&mut random) <= FIRST);
    }
}
