//! A plan for people, 80 columns wide.

use std::fmt::Write as _;

use super::report::{PlanArm, PlanReport};
use crate::{
    report::{bytes, duration, fold, table},
    serving::Tier,
};

const COLUMNS: usize = 80;

impl PlanReport {
    /// The report for people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let workload = &self.workload;
        let node = &self.node;
        // Writing to a String cannot fail.
        let mut say = |line: &str| {
            let _ = writeln!(text, "{}", fold(line, COLUMNS));
        };
        say(&self.advice);
        say("");
        say(&self.traffic());
        for note in &workload.notes {
            say(&format!("Note: {note}"));
        }
        say(&format!(
            "{} on {} ({}), donors: {}",
            node.model, node.gpu, node.name, node.lending
        ));
        let _ = writeln!(text, "\n{}", self.times());
        let _ = writeln!(text, "{}", self.found());
        let _ = writeln!(text, "{}", self.capacities());
        if !self.host_sweep.is_empty() {
            let _ = writeln!(text, "{}", self.sweep());
        }
        let longest = self.ladder().last();
        if let Some(longest) = longest {
            let line = format!(
                "Longest context: {} tokens in the engine's own pool; {} in a pool stitched with what {} donors lend at all times.",
                longest.longest_context_tokens, longest.longest_stitched_tokens, longest.donors
            );
            let _ = writeln!(text, "{}\n", fold(&line, COLUMNS));
        }
        let _ = writeln!(text, "{}", fold(&self.basis, COLUMNS));
        text
    }

    /// What is served.
    pub(crate) fn traffic(&self) -> String {
        let workload = &self.workload;
        let refused = match workload.refused {
            0 => String::new(),
            refused => format!("; {refused} requests too long for the engine's pool, left out"),
        };
        format!(
            "{} requests of {} ({}), arrivals stretched x{:.2}; a cache without bounds would find {:.1} % of {} blocks of {} tokens{refused}",
            workload.requests,
            workload.trace,
            workload.format,
            workload.stretch,
            workload.unbounded_hit_rate * 100.0,
            workload.blocks,
            workload.block_tokens,
        )
    }

    pub(crate) fn times(&self) -> comfy_table::Table {
        let rows = self.arms.iter().map(|arm| {
            [
                arm.what.clone(),
                duration(arm.ttft.p50_ms),
                duration(arm.ttft.p95_ms),
                duration(arm.ttft.p99_ms),
                percent(arm.utilisation, 0),
                format!("{:.2}", arm.most_requests_per_second),
            ]
        });
        let header = [
            "first token (MODELLED)",
            "p50",
            "p95",
            "p99",
            "busy",
            "most req/s",
        ];
        table(header, rows)
    }

    pub(crate) fn found(&self) -> comfy_table::Table {
        let mut before: Option<f64> = None;
        let rows = self.arms.iter().map(|arm| {
            let added = match (arm.name.starts_with("swiftcache-"), before) {
                (true, Some(before)) => format!("{:+.1}", (arm.hit_rate - before) * 100.0),
                _ => String::new(),
            };
            if arm.name.starts_with("swiftcache-") {
                before = Some(arm.hit_rate);
            }
            [
                arm.what.clone(),
                percent(arm.hit_rate, 1),
                percent(arm.found_in(&[Tier::Local]), 1),
                percent(arm.found_in(&DONORS), 1),
                percent(arm.found_in(&[Tier::Host]), 1),
                added,
            ]
        });
        let header = [
            "blocks found (MODELLED)",
            "all",
            "own pool",
            "donors",
            "host",
            "adds",
        ];
        table(header, rows)
    }

    pub(crate) fn capacities(&self) -> comfy_table::Table {
        let rows = self.arms.iter().map(|arm| {
            [
                arm.what.clone(),
                bytes(arm.holds.pool_bytes),
                bytes(arm.holds.donor_bytes),
                bytes(arm.holds.host_bytes),
                bytes(arm.holds.total()),
                arm.revocations.to_string(),
            ]
        });
        let header = [
            "holds (at most)",
            "own pool",
            "donors",
            "host",
            "in all",
            "revoked",
        ];
        table(header, rows)
    }

    pub(crate) fn sweep(&self) -> comfy_table::Table {
        let rows = self.host_sweep.iter().map(|point| {
            [
                bytes(point.host_bytes),
                percent(point.swiftcache_hit_rate, 1),
                duration(point.swiftcache_p99_ms),
                percent(point.offload_hit_rate, 1),
                duration(point.offload_p99_ms),
            ]
        });
        let header = [
            "host memory (MODELLED)",
            "SwiftCache",
            "p99",
            "vLLM offload",
            "p99",
        ];
        table(header, rows)
    }
}

/// The tiers that donors are.
pub(crate) const DONORS: [Tier; 3] = [Tier::DonorNvlink, Tier::DonorPcie, Tier::DonorHost];

impl PlanArm {
    /// The share of blocks found in these tiers.
    pub(crate) fn found_in(&self, tiers: &[Tier]) -> f64 {
        // A sum of nothing is -0.
        let found = tiers
            .iter()
            .filter_map(|tier| self.hit_rate_by_tier.get(tier));
        found.sum::<f64>() + 0.0
    }
}

fn percent(share: f64, decimals: usize) -> String {
    format!("{:.decimals$} %", share * 100.0)
}
