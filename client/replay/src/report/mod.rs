//! What a replay says in the end: a JSON document with stable names, and the same as tables for people.
//!
//! Names end in their unit. `*_full_bytes` are bytes of the full-size model, `*_moved_bytes` those that really
//! moved on the scaled node. Fields are added, never renamed; [`SCHEMA`] changes when one goes.

mod text;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::serving::{Outcome, Tier};
use swiftcache_client::borrower::{Latency, Stats};

pub use text::{bytes, table};

/// The version of the document.
pub const SCHEMA: u32 = 1;

/// The whole document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The node's devices are not real: their bytes moved in this machine's memory.
    #[serde(default)]
    pub simulated: bool,
    /// What is modelled and what is real, in one sentence. Belongs beside every figure taken from here.
    pub basis: String,
    /// The model and its GPU.
    pub compute: Compute,
    /// The links' modelled rates.
    pub links: Links,
    /// The trace.
    pub workload: Workload,
    /// Sizes.
    pub capacity: Capacity,
    /// SwiftCache, PCIe offload, recompute, in this order.
    pub arms: Vec<ArmReport>,
    /// Donors coming and going during the SwiftCache arm.
    pub donors: Donors,
}

/// The model and its GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compute {
    /// The busy model.
    pub model: String,
    /// GPUs it is spread over; one of them is replayed.
    pub tensor_parallel: u32,
    /// The GPU.
    pub gpu: String,
    /// Where the GPU's numbers are from.
    pub gpu_source: String,
    /// Share of peak FLOP/s taken as reached in prefill.
    pub compute_efficiency: f64,
    /// Share of peak HBM bytes/s taken as reached in decode.
    pub memory_efficiency: f64,
    /// What decoding costs a prefill.
    pub interference: String,
}

/// Modelled rates, bytes per second, one direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Links {
    /// The topology they come from.
    pub topology: String,
    /// Donor HBM over NVLink.
    pub nvlink_bytes_per_second: f64,
    /// Donor HBM over PCIe peer access.
    pub pcie_bytes_per_second: f64,
    /// Pinned host memory.
    pub host_bytes_per_second: f64,
}

/// The trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Its file.
    pub trace: String,
    /// Requests replayed.
    pub requests: u64,
    /// Requests too long for the local pool: in no other figure.
    pub refused: u64,
    /// Blocks of all requests.
    pub blocks: u64,
    /// Blocks that an unbounded cache would find.
    pub unbounded_hits: u64,
    /// Their share.
    pub unbounded_hit_rate: f64,
    /// Arrival times were multiplied by this.
    pub stretch: f64,
    /// The neighbours' load.
    pub donor_load: String,
    /// Trace seconds per wall-clock second, at most, while donors follow.
    pub pace: f64,
}

/// Sizes, in blocks of the full-size node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Full-size bytes for each byte that moves.
    pub scale: f64,
    /// Bytes of a block of the full-size model.
    pub block_full_bytes: u64,
    /// Bytes of a block that really move.
    pub block_moved_bytes: u64,
    /// The busy model's own pool.
    pub local_blocks: u64,
    /// The host tier, in the SwiftCache and PCIe arms alike.
    pub host_blocks: u64,
    /// Donor processes.
    pub donors: u64,
    /// The most the donors lent at one time.
    pub leased_peak_blocks: u64,
}

/// Time to first token, milliseconds of modelled time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ttft {
    /// Average.
    pub mean_ms: f64,
    /// Half are at most this.
    pub p50_ms: f64,
    /// 95 of 100 are at most this.
    pub p95_ms: f64,
    /// 99 of 100 are at most this.
    pub p99_ms: f64,
}

/// One way to keep the prefix cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmReport {
    /// `swiftcache`, `pcie-offload` or `recompute`.
    pub name: String,
    /// Modelled.
    pub ttft: Ttft,
    /// Share of all blocks found anywhere.
    pub hit_rate: f64,
    /// Blocks found, by tier.
    pub hit_blocks: BTreeMap<Tier, u64>,
    /// Share of the time the server was taken: prefilling, or waiting for room in the local pool.
    pub utilisation: f64,
    /// Loaded over each link (`nvlink`, `pcie`, `host`).
    pub loaded_full_bytes: BTreeMap<String, u64>,
    /// Written back over each link; what later moved from donors to the host tier counts again, under `host`.
    pub stored_full_bytes: BTreeMap<String, u64>,
    /// Bytes that were read back and checked; all were right, or there would be no report.
    pub verified_moved_bytes: u64,
    /// Blocks found but lost before they arrived: recomputed.
    pub failed_blocks: u64,
    /// Blocks for which no tier had room.
    pub unplaced_blocks: u64,
    /// Wall-clock time this arm took, seconds.
    pub wall_s: f64,
}

/// A distribution of real durations, wall clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallLatency {
    /// How many were measured.
    pub count: u64,
    /// Half are at most this.
    pub p50_us: u64,
    /// 99 of 100 are at most this.
    pub p99_us: u64,
    /// The longest.
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

/// Donors coming and going.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Donors {
    /// Revocations the borrower received.
    pub revocations: u64,
    /// From a revocation's arrival at the borrower to its acknowledgement, moving blocks included.
    pub acknowledge_wall: WallLatency,
    /// Slabs that were not given up within the drain window.
    pub zombies: u64,
    /// Blocks moved from a revoked lease to another lease.
    pub moved_to_donor_blocks: u64,
    /// Blocks moved from a revoked lease to the host tier.
    pub moved_to_host_blocks: u64,
    /// Blocks lost with a revoked lease.
    pub dropped_blocks: u64,
}

impl Donors {
    /// The borrower's own count, and the broker's of zombies.
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
    /// Exact percentiles by nearest rank.
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

impl ArmReport {
    /// What the model alone says; the data path's figures are zero.
    pub fn modelled(name: &str, outcome: &Outcome) -> Self {
        let hits: u64 = outcome.hits.values().sum();
        Self {
            name: name.to_owned(),
            ttft: Ttft::of(&outcome.ttft_s),
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
    /// The arm of that name.
    pub fn arm(&self, name: &str) -> Option<&ArmReport> {
        self.arms.iter().find(|arm| arm.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
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
            3,
            "in every table\n{text}"
        );
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
