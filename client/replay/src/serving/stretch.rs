//! Stretches arrival times until the server is busy, but can still serve every request in time.

use super::{Recompute, ReplayError, Request, Serving, serve};

/// The largest factor by which arrival times are stretched or squeezed.
const MOST_STRETCH: f64 = 1024.0;
/// How many times the bracket around the right stretch is halved. Ten times make it a thousandth of its size.
const STRETCH_ROUNDS: u32 = 10;

/// Arrival times are stretched until the server of the recompute arm is busy for this share of the time.
pub const TARGET_UTILISATION: f64 = 0.8;

/// The stretch of arrival times at which the recompute arm's server is busy for the share `utilisation` of the time.
///
/// # Errors
/// It does not fail in practice: the recompute arm has no data path that could fail.
pub fn stretch_for(
    requests: &[Request],
    serving: &Serving,
    utilisation: f64,
) -> Result<f64, ReplayError> {
    let busy = |stretch: f64| -> Result<f64, ReplayError> {
        let serving = Serving {
            stretch,
            ..*serving
        };
        let outcome = serve(requests, &serving, &mut Recompute, &mut |_| ())?;
        Ok(outcome.utilisation())
    };
    // The further apart the arrivals are, the less busy the server is. So bracket the answer, then halve the bracket.
    let (mut narrow, mut wide) = (1.0, 1.0);
    while wide < MOST_STRETCH && busy(wide)? > utilisation {
        narrow = wide;
        wide *= 2.0;
    }
    while narrow > 1.0 / MOST_STRETCH && busy(narrow)? < utilisation {
        wide = narrow;
        narrow /= 2.0;
    }
    for _ in 0..STRETCH_ROUNDS {
        let middle = f64::midpoint(narrow, wide);
        if busy(middle)? > utilisation {
            narrow = middle;
        } else {
            wide = middle;
        }
    }
    Ok(wide)
}
