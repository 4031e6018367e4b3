//! The page of a plan, and that of a replay.

use super::{
    Page,
    chart::{Axis, Bar, Curve, bars, curves},
};
use crate::{
    plan::{DONORS, PlanArm, PlanReport},
    report::{LentPoint, Report, Ttft},
    serving::Tier,
};

const PERCENT: Axis<'static> = Axis {
    name: "blocks found, %",
    log: false,
};
const MILLISECONDS: Axis<'static> = Axis {
    name: "time to first token, ms",
    log: true,
};
const REQUESTS: Axis<'static> = Axis {
    name: "share of requests, %",
    log: false,
};
const MOMENTS: Axis<'static> = Axis {
    name: "time in the trace, s",
    log: false,
};
const LENT: Axis<'static> = Axis {
    name: "HBM lent, GB",
    log: false,
};
const TAKEN_BACK: Axis<'static> = Axis {
    name: "slabs revoked so far",
    log: false,
};
const TIERS: [&str; 3] = ["own pool", "donors' HBM", "host memory"];

/// The page of a plan.
pub fn plan_page(report: &PlanReport) -> String {
    let title = format!(
        "SwiftCache plan: {} on {}",
        report.node.model, report.node.name
    );
    let mut page = Page::new(&title, &report.advice);
    page.paragraph(&report.traffic());
    for note in &report.workload.notes {
        page.paragraph(&format!("Note: {note}"));
    }
    page.heading("Blocks found");
    let found = report.arms.iter().map(|arm| Bar {
        name: short(arm),
        parts: parts(|tiers| arm.found_in(tiers)),
    });
    let drawn = bars(PERCENT, &TIERS, &found.collect::<Vec<_>>());
    let bound = report.workload.unbounded_hit_rate * 100.0;
    page.figure(
        &drawn,
        &format!("Hit rate against donors. A cache without bounds would find {bound:.1} %."),
    );
    page.table(&report.found());
    page.heading("Time to first token");
    let most = report.ladder().last().map_or(0, |arm| arm.donors);
    let shown = report.arms.iter().filter(|arm| {
        let named = [
            "vllm",
            "vllm-offload",
            "offload-equal-bytes",
            "swiftcache-0",
        ];
        // Enough donors to see what they do, and few enough to tell the curves apart.
        let some = [1, most / 2, most].contains(&arm.donors) && arm.donors > 0;
        named.contains(&arm.name.as_str()) || some
    });
    let times = shown.map(|arm| (arm.what.clone(), quantiles(&arm.ttft_curve_ms)));
    let drawn = curves(
        REQUESTS,
        MILLISECONDS,
        &times.collect::<Vec<Curve>>(),
        false,
    );
    page.figure(
        &drawn,
        "So many requests have their first token within that time (modelled).",
    );
    page.table(&report.times());
    if let Some(all) = report.ladder().last() {
        lent(&mut page, &all.lent, &all.what);
    }
    page.heading("Capacities");
    page.table(&report.capacities());
    if !report.host_sweep.is_empty() {
        page.heading("Other sizes of host memory");
        let points = |rate: fn(&crate::plan::HostPoint) -> f64| {
            let points = report.host_sweep.iter();
            let point =
                |at: &crate::plan::HostPoint| (at.host_bytes as f64 / 1e9, rate(at) * 100.0);
            points.map(point).collect()
        };
        let sweep = [
            ("SwiftCache".to_owned(), points(|at| at.swiftcache_hit_rate)),
            (
                "vLLM offload (measured)".to_owned(),
                points(|at| at.offload_hit_rate),
            ),
        ];
        let across = Axis {
            name: "host memory, GB",
            log: false,
        };
        page.figure(
            &curves(across, PERCENT, &sweep, false),
            "Hit rate against host memory.",
        );
        page.table(&report.sweep());
    }
    page.heading("What this rests on");
    page.paragraph(&report.basis);
    page.finish()
}

/// The page of a replay.
pub fn replay_page(report: &Report) -> String {
    let title = format!(
        "SwiftCache replay: {} on {}",
        report.compute.model, report.compute.gpu
    );
    let mut page = Page::new(&title, &report.headline());
    page.paragraph(&report.traffic());
    page.heading("Blocks found");
    let found = report.arms.iter().map(|arm| Bar {
        name: arm.name.clone(),
        parts: parts(|tiers| arm.hit_share(tiers)),
    });
    page.figure(
        &bars(PERCENT, &TIERS, &found.collect::<Vec<_>>()),
        "Hit rate of each arm, by where blocks were found.",
    );
    page.table(&report.hits_table());
    page.heading("Time to first token");
    let times = report.arms.iter().map(|arm| {
        let points = match arm.ttft_curve_ms.is_empty() {
            true => coarse(&arm.ttft),
            false => quantiles(&arm.ttft_curve_ms),
        };
        (arm.name.clone(), points)
    });
    let drawn = curves(
        REQUESTS,
        MILLISECONDS,
        &times.collect::<Vec<Curve>>(),
        false,
    );
    page.figure(
        &drawn,
        "So many requests have their first token within that time (modelled).",
    );
    page.table(&report.ttft_table());
    lent(&mut page, &report.lent, "the SwiftCache arm");
    page.paragraph(&report.revoked());
    page.heading("Capacities");
    page.table(&report.capacities_table());
    page.heading("Bytes");
    page.table(&report.bytes_table());
    page.heading("What this rests on");
    page.paragraph(&report.basis);
    page.finish()
}

fn lent(page: &mut Page, points: &[LentPoint], whose: &str) {
    if points.len() < 2 {
        return;
    }
    page.heading("What donors lent");
    let over_time = points
        .iter()
        .map(|point| (point.at_s, point.bytes as f64 / 1e9));
    let curve = [(whose.to_owned(), over_time.collect())];
    page.figure(&curves(MOMENTS, LENT, &curve, true), "HBM lent over time.");
    let mut sum = 0;
    let revoked = points.iter().map(|point| {
        sum += point.revocations;
        (point.at_s, sum as f64)
    });
    let curve = [(whose.to_owned(), revoked.collect())];
    page.figure(
        &curves(MOMENTS, TAKEN_BACK, &curve, true),
        "Slabs that held blocks and were taken back.",
    );
}

fn parts(found: impl Fn(&[Tier]) -> f64) -> Vec<f64> {
    let tiers: [&[Tier]; 3] = [&[Tier::Local], &DONORS, &[Tier::Host]];
    tiers.iter().map(|tiers| found(tiers) * 100.0).collect()
}

/// An arm's name under a bar.
fn short(arm: &PlanArm) -> String {
    match arm.name.as_str() {
        "no-cache" => "none".to_owned(),
        "vllm" => "vLLM".to_owned(),
        "vllm-offload" => "offload".to_owned(),
        "offload-ideal" => "ideal".to_owned(),
        "offload-equal-bytes" => "equal".to_owned(),
        _ => format!("{} don.", arm.donors),
    }
}

/// Points at equal distances from 0 to 100.
fn quantiles(times: &[f64]) -> Vec<(f64, f64)> {
    let last = times.len().saturating_sub(1).max(1) as f64;
    let points = times.iter().enumerate();
    points
        .map(|(index, time)| (100.0 * index as f64 / last, *time))
        .collect()
}

fn coarse(ttft: &Ttft) -> Vec<(f64, f64)> {
    vec![
        (50.0, ttft.p50_ms),
        (95.0, ttft.p95_ms),
        (99.0, ttft.p99_ms),
    ]
}
