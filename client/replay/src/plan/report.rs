//! The document of a plan. Names end in their unit; fields may be added and are never renamed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    report::{Holds, LentPoint, Ttft},
    serving::Tier,
};

/// The version of the document.
pub const SCHEMA: u32 = 1;

/// The whole document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What to do, in one sentence or two.
    pub advice: String,
    /// Says that all of it is modelled, and how. The text belongs beside every figure.
    pub basis: String,
    /// The traffic.
    pub workload: PlannedWorkload,
    /// The node and the model.
    pub node: PlannedNode,
    /// vLLM as it is and its alternatives, then SwiftCache with 0, 1, ... donors.
    pub arms: Vec<PlanArm>,
    /// The same with other sizes of host memory, and all donors.
    pub host_sweep: Vec<HostPoint>,
}

/// The traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedWorkload {
    /// The trace's file.
    pub trace: String,
    /// Its format.
    pub format: String,
    /// What the reader had to assume or to leave out.
    pub notes: Vec<String>,
    /// Requests.
    pub requests: u64,
    /// Requests too long for the engine's own pool, which no other figure counts.
    pub refused: u64,
    /// Tokens in a block.
    pub block_tokens: u64,
    /// Blocks of all requests.
    pub blocks: u64,
    /// The share of blocks that a cache without bounds would find.
    pub unbounded_hit_rate: f64,
    /// The factor that arrival times were multiplied by.
    pub stretch: f64,
}

/// The node and the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedNode {
    /// The node.
    pub name: String,
    /// Its GPUs.
    pub gpu: String,
    /// The model.
    pub model: String,
    /// GPUs that the model is spread over; one of them is planned for.
    pub tensor_parallel: u32,
    /// Where donors' memory comes from.
    pub lending: String,
    /// What a block takes, bytes.
    pub block_bytes: u64,
    /// The engine's own pool, bytes.
    pub pool_bytes: u64,
    /// Host memory for blocks, bytes.
    pub host_bytes: u64,
    /// The rate of NVLink, bytes per second in one direction.
    pub nvlink_bytes_per_second: f64,
    /// The rate between GPU and host memory.
    pub host_bytes_per_second: f64,
}

/// One way to keep the prefix cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanArm {
    /// `no-cache`, `vllm`, `vllm-offload`, `offload-ideal`, `offload-equal-bytes`, or `swiftcache-N` with N donors.
    pub name: String,
    /// What it is, for people.
    pub what: String,
    /// Donors.
    pub donors: u64,
    /// Its capacities.
    pub holds: Holds,
    /// Modelled times to first token.
    pub ttft: Ttft,
    /// Times to first token that 0, 5, ... 95 and 100 of 100 requests stay under, milliseconds.
    pub ttft_curve_ms: Vec<f64>,
    /// The share of blocks found anywhere.
    pub hit_rate: f64,
    /// The share of blocks found, by tier.
    pub hit_rate_by_tier: BTreeMap<Tier, f64>,
    /// The share of the time that the GPU prefilled, or waited for room.
    pub utilisation: f64,
    /// Requests a second that were served at this load.
    pub requests_per_second: f64,
    /// Requests a second that would keep the server busy all the time.
    pub most_requests_per_second: f64,
    /// The longest context that a request may have: what the engine's own pool holds.
    pub longest_context_tokens: u64,
    /// The same with a stitched pool over what donors lend at all times.
    pub longest_stitched_tokens: u64,
    /// What donors lent on average, bytes.
    pub lent_mean_bytes: u64,
    /// What donors lent at least, bytes.
    pub lent_least_bytes: u64,
    /// Slabs with blocks that donors took back.
    pub revocations: u64,
    /// What donors lent over time.
    pub lent: Vec<LentPoint>,
}

/// The arms that use host memory, with another size of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostPoint {
    /// Host memory for blocks, bytes.
    pub host_bytes: u64,
    /// SwiftCache's hit rate with all donors.
    pub swiftcache_hit_rate: f64,
    /// Its p99 time to first token.
    pub swiftcache_p99_ms: f64,
    /// The hit rate of vLLM's offloading.
    pub offload_hit_rate: f64,
    /// Its p99 time to first token.
    pub offload_p99_ms: f64,
}

impl PlanReport {
    /// The arm with this name.
    pub fn arm(&self, name: &str) -> Option<&PlanArm> {
        self.arms.iter().find(|arm| arm.name == name)
    }

    /// SwiftCache's arms, by the number of donors.
    pub fn ladder(&self) -> impl Iterator<Item = &PlanArm> {
        self.arms
            .iter()
            .filter(|arm| arm.name.starts_with("swiftcache-"))
    }
}
