//! How much everybody gets when there is not enough: max-min shares by weight.

/// What everybody gets for each unit of weight, as a fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Level {
    bytes: u64,
    weights: u64,
}

impl Level {
    /// What a claimant of this weight gets; no bound when there is enough for all.
    pub(super) fn share(level: Option<Self>, weight: u64) -> u64 {
        level.map_or(u64::MAX, |level| {
            scaled(level.bytes, weight, level.weights.max(1))
        })
    }
}

/// `bytes * numerator / denominator`.
pub(super) fn scaled(bytes: u64, numerator: u64, denominator: u64) -> u64 {
    let scaled = u128::from(bytes) * u128::from(numerator) / u128::from(denominator);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// The largest level at which claimants of these demands and weights together get no more than `pool`; `None` when
/// there is enough for all.
pub(super) fn max_min_level(mut demands: Vec<(u64, u64)>, mut pool: u64) -> Option<Level> {
    let mut weights: u64 = demands.iter().map(|(_, weight)| weight).sum();
    // The first to be met is who wants least for its weight.
    demands.sort_unstable_by(|(one, its), (other, theirs)| {
        let one = u128::from(*one) * u128::from(*theirs);
        one.cmp(&(u128::from(*other) * u128::from(*its)))
    });
    for (demand, weight) in demands {
        let level = Level {
            bytes: pool,
            weights,
        };
        if demand > Level::share(Some(level), weight) {
            return Some(level);
        }
        pool -= demand;
        weights -= weight;
    }
    None
}
