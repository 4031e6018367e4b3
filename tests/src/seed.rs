//! What makes a random test repeatable, and how long it soaks.

use std::{
    env,
    io::{self, Write},
    time::{Duration, Instant},
};

use rand::{SeedableRng, rngs::StdRng};

/// The seed when nobody names one.
const SEED: u64 = 0x5717_caca;

/// A random test's course: `SWIFTCACHE_FAULT_SEED` names its seed, and with `SWIFTCACHE_FAULT_SECONDS` it goes on for
/// that long after its usual number of steps.
#[derive(Debug)]
pub struct Course {
    /// Draws the same numbers in every run of a seed.
    pub rng: StdRng,
    /// The seed.
    pub seed: u64,
    steps: u32,
    until: Instant,
}

impl Course {
    /// A course of `steps` steps. Prints the seed, for whoever has to repeat it.
    #[must_use]
    pub fn new(test: &str, steps: u32) -> Self {
        let number = |name| env::var(name).ok()?.parse().ok();
        let seed = number("SWIFTCACHE_FAULT_SEED").unwrap_or(SEED);
        let seconds = number("SWIFTCACHE_FAULT_SECONDS").unwrap_or(0);
        // A test without its seed on the screen is still a test.
        let _ = writeln!(io::stderr(), "{test}: SWIFTCACHE_FAULT_SEED={seed}");
        Self {
            rng: StdRng::seed_from_u64(seed),
            seed,
            steps,
            until: Instant::now() + Duration::from_secs(seconds),
        }
    }

    /// Whether another step is to be taken.
    pub fn goes_on(&mut self) -> bool {
        let left = self.steps > 0;
        self.steps = self.steps.saturating_sub(1);
        left || Instant::now() < self.until
    }
}
