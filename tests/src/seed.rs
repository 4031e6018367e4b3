//! The seed that makes a random test repeatable, and the time that the test runs.

use std::{
    env,
    io::{self, Write},
    time::{Duration, Instant},
};

use rand::{SeedableRng, rngs::StdRng};

/// The default seed.
const SEED: u64 = 0x5717_caca;

/// The course of a random test. `SWIFTCACHE_FAULT_SEED` sets its seed. `SWIFTCACHE_FAULT_SECONDS` makes it go on for at
/// least that long, also when its usual number of steps is done.
#[derive(Debug)]
pub struct Course {
    /// Draws the same numbers in every run with the same seed.
    pub rng: StdRng,
    /// The seed.
    pub seed: u64,
    steps: u32,
    until: Instant,
}

impl Course {
    /// A course of `steps` steps. Prints the seed, so that the course can be repeated.
    #[must_use]
    pub fn new(test: &str, steps: u32) -> Self {
        let number = |name| env::var(name).ok()?.parse().ok();
        let seed = number("SWIFTCACHE_FAULT_SEED").unwrap_or(SEED);
        let seconds = number("SWIFTCACHE_FAULT_SECONDS").unwrap_or(0);
        // The test can go on also when its seed cannot be printed.
        let _ = writeln!(io::stderr(), "{test}: SWIFTCACHE_FAULT_SEED={seed}");
        Self {
            rng: StdRng::seed_from_u64(seed),
            seed,
            steps,
            until: Instant::now() + Duration::from_secs(seconds),
        }
    }

    /// Whether the test must take another step.
    pub fn goes_on(&mut self) -> bool {
        let left = self.steps > 0;
        self.steps = self.steps.saturating_sub(1);
        left || Instant::now() < self.until
    }
}
