//! How far apart arrivals must be for the server to be busy, but not swamped.

use super::{Recompute, ReplayError, Request, Serving, serve};

/// Arrivals are stretched or squeezed by no more than this.
const MOST_STRETCH: f64 = 1024.0;
/// How often the bracket around the right stretch is halved: to a thousandth of it.
const STRETCH_ROUNDS: u32 = 10;

/// The stretch of arrival times at which the recompute arm's server is taken `utilisation` of the time.
///
/// # Errors
/// None of its own: the recompute arm has no data path that could fail.
pub fn stretch_for(
    requests: &[Request],
    serving: &Serving,
    utilisation: f64,
) -> Result<f64, ReplayError> {
    let taken = |stretch: f64| -> Result<f64, ReplayError> {
        let serving = Serving {
            stretch,
            ..*serving
        };
        let outcome = serve(requests, &serving, &mut Recompute, &mut |_| ())?;
        Ok(outcome.utilisation())
    };
    // The wider arrivals are apart, the less the server is taken: bracket the answer, then halve the bracket.
    let (mut narrow, mut wide) = (1.0, 1.0);
    while wide < MOST_STRETCH && taken(wide)? > utilisation {
        narrow = wide;
        wide *= 2.0;
    }
    while narrow > 1.0 / MOST_STRETCH && taken(narrow)? < utilisation {
        wide = narrow;
        narrow /= 2.0;
    }
    for _ in 0..STRETCH_ROUNDS {
        let middle = f64::midpoint(narrow, wide);
        if taken(middle)? > utilisation {
            narrow = middle;
        } else {
            wide = middle;
        }
    }
    Ok(wide)
}
