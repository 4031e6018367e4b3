//! What a plan comes to, in plain words.

use super::report::{PlanArm, PlanReport};
use crate::report::bytes;

/// A gain of fewer hits than this is none: one point.
const NOTHING: f64 = 0.01;
/// The share of the gain that is worth having.
const MOST_OF_IT: f64 = 0.9;

/// Times that differ by less than this share are about the same.
const ABOUT: f64 = 0.05;

/// The advice for a plan.
pub(super) fn advice(report: &PlanReport) -> String {
    let advice = donors_or_not(report);
    let all = report.ladder().last();
    match (report.arm("offload-equal-bytes"), all) {
        (Some(equal), Some(all)) if all.donors > 0 && advice.contains("% of the gain") => {
            let ratio = equal.ttft.p99_ms / all.ttft.p99_ms.max(f64::MIN_POSITIVE);
            match (ratio - 1.0).abs() < ABOUT && (equal.hit_rate - all.hit_rate).abs() < ABOUT {
                true => format!(
                    "{advice} Host memory of as many bytes ({}), loaded layer by layer as no engine does yet, would do about the same.",
                    bytes(equal.holds.host_bytes)
                ),
                false => advice,
            }
        }
        _ => advice,
    }
}

fn donors_or_not(report: &PlanReport) -> String {
    let ladder: Vec<&PlanArm> = report.ladder().collect();
    let (Some(own), Some(none), Some(all)) = (report.arm("vllm"), ladder.first(), ladder.last())
    else {
        return String::new();
    };
    let bound = report.workload.unbounded_hit_rate;
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    if bound < NOTHING {
        return "No prompt of this trace begins like an earlier one, so no prefix cache finds anything: \
                SwiftCache gives nothing here."
            .to_owned();
    }
    if bound - own.hit_rate < NOTHING {
        return format!(
            "vLLM's own pool already finds {} of the blocks, which is all that repeats: SwiftCache gives nothing here.",
            percent(own.hit_rate)
        );
    }
    let gain = all.hit_rate - own.hit_rate;
    if gain < NOTHING {
        return format!(
            "What repeats lies further apart than this node holds: {} of the blocks repeat, and {} donors and {} of host \
             memory find no more than vLLM's own pool.",
            percent(bound),
            all.donors,
            bytes(all.holds.host_bytes)
        );
    }
    let enough = ladder
        .iter()
        .find(|arm| arm.hit_rate - own.hit_rate >= MOST_OF_IT * gain);
    let enough = enough.unwrap_or(all);
    let rest = match bound - all.hit_rate {
        rest if rest >= 2.0 * NOTHING => {
            format!(
                "; another {} lie further apart than this node holds",
                percent(rest)
            )
        }
        _ => "; that is all that repeats".to_owned(),
    };
    let from_donors = all.hit_rate - none.hit_rate;
    let faster = |arm: &PlanArm| {
        let change = 1.0 - arm.ttft.p99_ms / own.ttft.p99_ms.max(f64::MIN_POSITIVE);
        format!("p99 time to first token {:+.0} %", -100.0 * change)
    };
    if enough.donors == 0 && from_donors < NOTHING {
        let p99 = 1.0 - all.ttft.p99_ms / none.ttft.p99_ms.max(f64::MIN_POSITIVE);
        return format!(
            "{} of host memory already find {} of the blocks against {} of vLLM's own pool, and donors find no more{rest}; \
             what they add is speed: p99 time to first token {:+.0} % with {}.",
            bytes(none.holds.host_bytes),
            percent(none.hit_rate),
            percent(own.hit_rate),
            -100.0 * p99,
            donors(all),
        );
    }
    let share = (enough.hit_rate - own.hit_rate) / gain;
    match enough.donors {
        0 => format!(
            "Host memory of {} alone gives {} of the gain ({} of the blocks found against {} of vLLM's own pool, {}){rest}.",
            bytes(enough.holds.host_bytes),
            percent(share),
            percent(enough.hit_rate),
            percent(own.hit_rate),
            faster(enough),
        ),
        count => format!(
            "{} {} {} of the gain ({} of the blocks found against {} of vLLM's own pool, {}){rest}.",
            donors(enough),
            if count == 1 { "gives" } else { "give" },
            percent(share),
            percent(enough.hit_rate),
            percent(own.hit_rate),
            faster(enough),
        ),
    }
}

fn donors(arm: &PlanArm) -> String {
    let each = bytes(arm.lent_mean_bytes / arm.donors.max(1));
    match arm.donors {
        1 => format!("One donor of {each}"),
        count => format!("{count} donors of {each} each"),
    }
}
