//! The report of a replay: a JSON document with stable names, and the same figures as tables for people.
//!
//! Names end in their unit. `*_full_bytes` are bytes of the full-size model; `*_moved_bytes` are the bytes that really
//! moved on the scaled node. Fields may be added and are never renamed. [`SCHEMA`] changes when a field is removed.

mod text;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::serving::{Outcome, Tier};
use swiftcache_client::cache::{Latency, Stats};

pub use text::{bytes, duration, fold, table};

/// Parts of a curve of times.
const QUANTILES: usize = 20;

/// The version of the document.
pub const SCHEMA: u32 = 1;

/// The whole document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Whether the node's devices are simulated: then the bytes moved in this machine's memory.
    #[serde(default)]
    pub simulated: bool,
    /// Says what is modelled and what is real. The text belongs beside every figure that is taken from this document.
    pub basis: String,
    /// The model and its GPU.
    pub compute: Compute,
    /// The links' modelled rates.
    pub links: Links,
    /// The trace.
    pub workload: Workload,
    /// Sizes.
    pub capacity: Capacity,
    /// The arms. SwiftCache is the first, recompute the last.
    pub arms: Vec<ArmReport>,
    /// How donors came and went during the SwiftCache arm.
    pub donors: Donors,
    /// What was leased from donors over time in the SwiftCache arm.
    #[serde(default)]
    pub lent: Vec<LentPoint>,
}

/// The model and its GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compute {
    /// The busy model.
    pub model: String,
    /// The number of GPUs that the model is spread over. One of them is replayed.
    pub tensor_parallel: u32,
    /// The GPU.
    pub gpu: String,
    /// The source of the GPU's numbers.
    pub gpu_source: String,
    /// The share of peak FLOP/s that prefill is assumed to reach.
    pub compute_efficiency: f64,
    /// The share of peak HBM bytes/s that decode is assumed to reach.
    pub memory_efficiency: f64,
    /// How much decoding slows a prefill down.
    pub interference: String,
}

/// Modelled rates of the links, in bytes per second in one direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Links {
    /// The topology that the rates come from.
    pub topology: String,
    /// The rate to a donor's HBM over NVLink.
    pub nvlink_bytes_per_second: f64,
    /// The rate to a donor's HBM over PCIe peer access.
    pub pcie_bytes_per_second: f64,
    /// The rate to pinned host memory.
    pub host_bytes_per_second: f64,
}

/// The trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// The file of the trace.
    pub trace: String,
    /// The number of requests in the trace.
    pub requests: u64,
    /// Requests that are too long for the local pool. No other figure counts them.
    pub refused: u64,
    /// Blocks of all requests.
    pub blocks: u64,
    /// Blocks that an unbounded cache would find.
    pub unbounded_hits: u64,
    /// `unbounded_hits` as a share of `blocks`.
    pub unbounded_hit_rate: f64,
    /// The factor that arrival times were multiplied by.
    pub stretch: f64,
    /// The neighbours' load.
    pub donor_load: String,
    /// The most trace seconds per wall-clock second while donors follow their load.
    pub pace: f64,
}

/// Sizes in blocks of the full-size node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Full-size bytes for each byte that really moves.
    pub scale: f64,
    /// Bytes of a block of the full-size model.
    pub block_full_bytes: u64,
    /// Bytes of a block that really move.
    pub block_moved_bytes: u64,
    /// The size of the busy model's own pool.
    pub local_blocks: u64,
    /// The size of the host tier. It is the same in the SwiftCache and the PCIe arm.
    pub host_blocks: u64,
    /// The number of donor processes.
    pub donors: u64,
    /// The most blocks that the donors lent at one time.
    pub leased_peak_blocks: u64,
}

/// Time to first token in milliseconds of modelled time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ttft {
    /// The average.
    pub mean_ms: f64,
    /// Half of the times are at most this.
    pub p50_ms: f64,
    /// 95 of 100 times are at most this.
    pub p95_ms: f64,
    /// 99 of 100 times are at most this.
    pub p99_ms: f64,
}

/// The results of one arm: of one way to keep the prefix cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmReport {
    /// `swiftcache`; `pcie-offload` with the same host tier; `offload-equal-bytes` with a host tier as large as SwiftCache's tiers
    /// together; `vllm-offload`, which is modelled as it was measured; or `recompute`.
    pub name: String,
    /// The modelled times to first token.
    pub ttft: Ttft,
    /// Times to first token that 0, 5, ... 95 and 100 of 100 requests stay under, milliseconds.
    #[serde(default)]
    pub ttft_curve_ms: Vec<f64>,
    /// What it holds blocks in.
    #[serde(default)]
    pub holds: Holds,
    /// The share of all blocks that was found in any tier.
    pub hit_rate: f64,
    /// Blocks found, by tier.
    pub hit_blocks: BTreeMap<Tier, u64>,
    /// The share of the time in which the server was busy: it prefilled, or waited for room in the local pool.
    pub utilisation: f64,
    /// Bytes loaded over each link (`nvlink`, `pcie`, `host`).
    pub loaded_full_bytes: BTreeMap<String, u64>,
    /// Bytes written back over each link. Bytes that later moved from donors to the host tier count again, under
    /// `host`.
    pub stored_full_bytes: BTreeMap<String, u64>,
    /// Bytes that were read back and checked. All of them were right; otherwise there would be no report.
    pub verified_moved_bytes: u64,
    /// Blocks that were found, got lost before they arrived, and were recomputed.
    pub failed_blocks: u64,
    /// Blocks for which no tier had room.
    pub unplaced_blocks: u64,
    /// The wall-clock time that this arm took, in seconds.
    pub wall_s: f64,
}

/// What one arm holds blocks in, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    /// The engine's own pool.
    pub pool_bytes: u64,
    /// Donors, at most.
    pub donor_bytes: u64,
    /// Host memory.
    pub host_bytes: u64,
}

impl Holds {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.pool_bytes + self.donor_bytes + self.host_bytes
    }
}

/// What donors lent at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LentPoint {
    /// Seconds of the stretched trace.
    pub at_s: f64,
    /// Bytes on loan.
    pub bytes: u64,
    /// Slabs with blocks taken back since the point before.
    pub revocations: u64,
}

/// A distribution of durations in wall-clock time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallLatency {
    /// The number of measured durations.
    pub count: u64,
    /// Half of the durations are at most this.
    pub p50_us: u64,
    /// 99 of 100 durations are at most this.
    pub p99_us: u64,
    /// The longest duration.
    pub max_us: u64,
}

impl From<Latency> for WallLatency {
    fn from(latency: Latency) -> Self {
        Self {
            count: latency.count,
            p50_us: latency.p50_us,
            p99_us: latency.p99_us,
            max_us: latency.max_us,
        }
    }
}

/// How donors came and went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Donors {
    /// Revocations the borrower received.
    pub revocations: u64,
    /// The time from a revocation's arrival at the borrower to its acknowledgement, which includes moving blocks.
    pub acknowledge_wall: WallLatency,
    /// Slabs that borrowers did not give up within the drain window.
    pub zombies: u64,
    /// Blocks moved from a revoked lease to another lease.
    pub moved_to_donor_blocks: u64,
    /// Blocks moved from a revoked lease to the host tier.
    pub moved_to_host_blocks: u64,
    /// Blocks that were lost with a revoked lease.
    pub dropped_blocks: u64,
}

impl Donors {
    /// Takes the borrower's counts from `stats`. The broker counts `zombies`.
    pub fn new(stats: &Stats, zombies: u64) -> Self {
        Self {
            revocations: stats.revocations,
            acknowledge_wall: stats.acknowledge.into(),
            zombies,
            moved_to_donor_blocks: stats.moved_to_donor,
            moved_to_host_blocks: stats.moved_to_host,
            dropped_blocks: stats.dropped_blocks,
        }
    }
}

impl Ttft {
    /// Computes exact percentiles by nearest rank.
    pub fn of(seconds: &[f64]) -> Self {
        let mut sorted = seconds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            let rank = (share * sorted.len() as f64).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).map_or(0.0, |s| s * 1e3)
        };
        Self {
            mean_ms: sorted.iter().sum::<f64>() * 1e3 / sorted.len().max(1) as f64,
            p50_ms: rank(0.50),
            p95_ms: rank(0.95),
            p99_ms: rank(0.99),
        }
    }
}

/// The times that 0, 5, ... 100 of 100 requests stay under, milliseconds.
pub(crate) fn curve(seconds: &[f64]) -> Vec<f64> {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return Vec::new();
    };
    let at = |step: usize| sorted[(step * last).div_ceil(QUANTILES)] * 1e3;
    (0..=QUANTILES).map(at).collect()
}

impl ArmReport {
    /// A report with the results of the model. The figures of the data path are zero.
    pub fn modelled(name: &str, outcome: &Outcome) -> Self {
        let hits: u64 = outcome.hits.values().sum();
        Self {
            name: name.to_owned(),
            ttft: Ttft::of(&outcome.ttft_s),
            ttft_curve_ms: curve(&outcome.ttft_s),
            holds: Holds::default(),
            hit_rate: hits as f64 / outcome.blocks.max(1) as f64,
            hit_blocks: outcome.hits.clone(),
            utilisation: outcome.utilisation(),
            loaded_full_bytes: BTreeMap::new(),
            stored_full_bytes: BTreeMap::new(),
            verified_moved_bytes: 0,
            failed_blocks: 0,
            unplaced_blocks: 0,
            wall_s: 0.0,
        }
    }
}

impl Report {
    /// The arm with this name.
    pub fn arm(&self, name: &str) -> Option<&ArmReport> {
        self.arms.iter().find(|arm| arm.name == name)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn report() -> Report {
        let outcome = Outcome {
            ttft_s: (1..=200).map(|ms| f64::from(ms) / 1e3).collect(),
            hits: [(Tier::Local, 30), (Tier::DonorNvlink, 20), (Tier::Host, 10)].into(),
            blocks: 120,
            refused: 2,
            busy_s: 8.0,
            span_s: 10.0,
        };
        let mut swiftcache = ArmReport::modelled("swiftcache", &outcome);
        swiftcache.loaded_full_bytes = [("nvlink".to_owned(), 1_500_000_000)].into();
        swiftcache.verified_moved_bytes = 1 << 20;
        let mut recompute = ArmReport::modelled("recompute", &outcome);
        recompute.ttft.p99_ms *= 4.0;
        Report {
            schema: SCHEMA,
            simulated: true,
            basis: "Modelled: everything.".to_owned(),
            compute: Compute {
                model: "qwen3-8b".to_owned(),
                tensor_parallel: 1,
                gpu: "h100-sxm".to_owned(),
                gpu_source: "datasheet".to_owned(),
                compute_efficiency: 0.5,
                memory_efficiency: 0.8,
                interference: "bounded".to_owned(),
            },
            links: Links {
                topology: "hgx-8".to_owned(),
                nvlink_bytes_per_second: 380e9,
                pcie_bytes_per_second: 50e9,
                host_bytes_per_second: 50e9,
            },
            workload: Workload {
                trace: "chat.jsonl".to_owned(),
                requests: 202,
                refused: 2,
                blocks: 120,
                unbounded_hits: 60,
                unbounded_hit_rate: 0.5,
                stretch: 1.25,
                donor_load: "bundled".to_owned(),
                pace: 60.0,
            },
            capacity: Capacity {
                scale: 1024.0,
                block_full_bytes: 75_497_472,
                block_moved_bytes: 73_728,
                local_blocks: 778,
                host_blocks: 1820,
                donors: 3,
                leased_peak_blocks: 1200,
            },
            arms: vec![swiftcache, recompute],
            donors: Donors {
                revocations: 4,
                ..Donors::default()
            },
            lent: [(0.0, 5), (60.0, 9), (90.0, 2)]
                .map(|(at_s, gigabytes)| LentPoint {
                    at_s,
                    bytes: gigabytes * 1_000_000_000,
                    revocations: 1,
                })
                .into(),
        }
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let ttft = report().arms[0].ttft;
        assert_eq!(
            (ttft.p50_ms, ttft.p95_ms, ttft.p99_ms),
            (100.0, 190.0, 198.0)
        );
        assert_eq!(Ttft::of(&[]), Ttft::default());
        assert_eq!(Ttft::of(&[0.002]).p99_ms, 2.0);
    }

    #[test]
    fn the_document_survives_its_own_json() {
        let report = report();
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }

    #[test]
    fn names_that_scripts_use_stay() {
        let json = serde_json::to_value(report()).unwrap();
        for pointer in [
            "/schema",
            "/workload/unbounded_hit_rate",
            "/arms/0/name",
            "/arms/0/ttft/p99_ms",
            "/arms/0/hit_blocks/donor-nvlink",
            "/arms/0/verified_moved_bytes",
            "/donors/acknowledge_wall/p99_us",
            "/donors/zombies",
            "/basis",
            "/simulated",
        ] {
            assert!(json.pointer(pointer).is_some(), "{pointer}");
        }
    }

    #[test]
    fn people_see_the_ratio_the_tiers_and_that_it_is_modelled() {
        let mut report = report();
        let text = report.text();
        assert_eq!(
            text.matches("SIMULATED").count(),
            5,
            "in every table\n{text}"
        );
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        report.simulated = false;
        assert!(!report.text().contains("SIMULATED"));
        for part in [
            "-75 %",
            "25.0 %",
            "16.7 %",
            "1.5 GB",
            "Modelled: everything.",
            "2 requests too long",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn bytes_are_readable() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (99_960, "100 kB"),
            (999_600, "1.0 MB"),
            (1_234_567_890_123, "1.2 TB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
