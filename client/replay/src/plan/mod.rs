//! The planner: what SwiftCache would give on a trace, before anything is installed.
//!
//! It serves the trace with the same model of an engine as the replay does (`serving`), asks the cache's own rules what they
//! would find ([`CacheModel`](swiftcache_client::cache::CacheModel)), and asks the donors' own policy what they would lend
//! (`lenders`). Nothing runs, and no byte moves. `tests/tests/plan.rs` holds it against a replay with real processes.

mod advice;
mod arms;
mod lenders;
mod nodes;
mod report;
mod text;

use std::collections::BTreeMap;

use swiftcache_client::cache::Retention;

pub use lenders::{Lenders, Lending};
pub use nodes::NodeShape;
pub use report::{HostPoint, PlanArm, PlanReport, PlannedNode, PlannedWorkload, SCHEMA};

use self::arms::Planned;
pub(crate) use self::{arms::Offload, text::DONORS};
use crate::{
    ReplayError,
    lent::Lent,
    models::ModelShape,
    report::{Holds, Ttft, curve},
    roofline::{Engine, Roofline},
    serving::{Arm, Loading, Outcome, Recompute, Serving, TARGET_UTILISATION, serve, stretch_for},
    sizing::pool_blocks,
    trace::{Trace, unbounded_hits},
};

/// The share of the link's rate at which vLLM's OffloadingConnector brings blocks back before a prefill: 90 ms more than a
/// resident prefix of 20,000 tokens (2.95 GB) on an H200, whose link to host memory does 50 GB/s.
pub const OFFLOAD_SHARE_OF_RATE: f64 = 0.65;
/// Sizes of host memory that the sweep tries, as shares of the one asked for.
const SWEEP: [f64; 5] = [0.0, 0.25, 0.5, 1.0, 2.0];
/// What the shares are of where none was asked for, bytes.
const SWEEP_BASE: u64 = 128 << 30;

/// What is planned.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The traffic.
    pub trace: &'a Trace,
    /// The busy model; one rank of it if it is spread.
    pub model: ModelShape,
    /// GPUs that it is spread over.
    pub tensor_parallel: u32,
    /// The node.
    pub node: NodeShape,
    /// The most donors.
    pub donors: usize,
    /// What donors are.
    pub lenders: Lenders,
    /// Host memory for blocks, bytes.
    pub host_bytes: u64,
    /// The factor for arrival times. `None`: the server of vLLM as it is is busy 80 % of the time.
    pub stretch: Option<f64>,
    /// Whether the hottest blocks of slabs taken back move elsewhere.
    pub move_blocks: bool,
    /// What decides which of SwiftCache's blocks go first.
    pub retention: Retention,
}

impl Plan<'_> {
    fn block_bytes(&self) -> u64 {
        self.trace.block_tokens * self.model.bytes_per_token()
    }

    fn blocks_of(&self, bytes: u64) -> u32 {
        u32::try_from(bytes / self.block_bytes()).unwrap_or(u32::MAX)
    }

    /// Works it out. `progress` is told of each arm before it begins: its number, and how many there are.
    ///
    /// # Errors
    /// For a model that does not fit, more donors than the node has, or donors that lend more than a GPU has.
    pub fn run(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<PlanReport, ReplayError> {
        if self.donors > self.node.others.len() {
            return Err(ReplayError::Flag {
                flag: "--donors",
                problem: format!(
                    "is {}; {} has {} GPUs, one of which the busy model needs",
                    self.donors,
                    self.node.name,
                    self.node.others.len() + 1
                ),
            });
        }
        let gpu = self.node.gpu;
        self.lenders.lending.check(&gpu)?;
        let mut serving = Serving {
            roofline: Roofline {
                model: self.model,
                gpu,
                engine: Engine::VLLM,
            },
            rates: self.node.rates,
            pool_blocks: pool_blocks(&self.model, &gpu, gpu.hbm_bytes, self.trace.block_tokens)?,
            block_tokens: self.trace.block_tokens,
            prefix_caching: true,
            loading: Loading::LayerByLayer,
            stretch: self.stretch.unwrap_or(1.0),
        };
        let arms = 5 + self.donors as u64 + 1 + 2 * SWEEP.len() as u64;
        let mut begun = 0;
        let mut next = || {
            begun += 1;
            progress(begun, arms);
        };
        next();
        if self.stretch.is_none() {
            let requests = &self.trace.requests;
            serving.stretch = stretch_for(requests, &serving, TARGET_UTILISATION)?;
        }
        let mut done = Vec::new();
        let uncached = Serving {
            prefix_caching: false,
            ..serving
        };
        let measured = Serving {
            loading: Loading::Before {
                share_of_rate: OFFLOAD_SHARE_OF_RATE,
            },
            ..serving
        };
        let own = self.holds(&serving, 0, 0);
        let with_host = self.holds(&serving, 0, self.host_bytes);
        let (outcome, requests) = self.serve(&uncached, &mut Recompute)?;
        done.push(self.arm("no-cache", "no prefix cache", own, &outcome));
        next();
        let (outcome, _) = self.serve(&serving, &mut Recompute)?;
        done.push(self.arm("vllm", "vLLM as it is", own, &outcome));
        next();
        let offloaded = self.offload(&measured, self.host_bytes)?;
        let what = "vLLM offload (measured)";
        done.push(self.arm("vllm-offload", what, with_host, &offloaded));
        next();
        let ideal = self.offload(&serving, self.host_bytes)?;
        done.push(self.arm("offload-ideal", "offload, ideal", with_host, &ideal));
        let mut ladder = Vec::new();
        for donors in 0..=self.donors {
            next();
            let (outcome, lent) = self.swiftcache(&serving, donors, self.host_bytes)?;
            let most = lent.most * self.block_bytes();
            let holds = self.holds(&serving, most, self.host_bytes);
            let what = format!("SwiftCache, {donors} donors");
            let what = match donors {
                1 => "SwiftCache, 1 donor",
                _ => &what,
            };
            let mut arm = self.arm(&format!("swiftcache-{donors}"), what, holds, &outcome);
            self.add_donors(&mut arm, donors, &lent);
            ladder.push(arm);
        }
        next();
        let all = ladder.last().map(|arm| arm.holds).unwrap_or_default();
        let equal = self.host_bytes + all.donor_bytes;
        let outcome = self.offload(&serving, equal)?;
        let what = "offload, equal bytes";
        let holds = self.holds(&serving, 0, equal);
        done.push(self.arm("offload-equal-bytes", what, holds, &outcome));
        done.extend(ladder);
        let host_sweep = self.sweep(&serving, &measured, &mut next)?;
        let (hits, blocks) = unbounded_hits(&self.trace.requests);
        let mut report = PlanReport {
            schema: SCHEMA,
            advice: String::new(),
            basis: self.basis(),
            workload: PlannedWorkload {
                trace: self.trace.name.clone(),
                format: self.trace.format.to_owned(),
                notes: self.trace.notes.clone(),
                requests,
                refused: outcome.refused,
                block_tokens: self.trace.block_tokens,
                blocks,
                unbounded_hit_rate: hits as f64 / blocks.max(1) as f64,
                stretch: serving.stretch,
            },
            node: PlannedNode {
                name: self.node.name.clone(),
                gpu: gpu.name.to_owned(),
                model: self.model.name.to_owned(),
                tensor_parallel: self.tensor_parallel,
                lending: self.lenders.lending.to_string(),
                block_bytes: self.block_bytes(),
                pool_bytes: own.pool_bytes,
                host_bytes: self.host_bytes,
                nvlink_bytes_per_second: self.node.rates.nvlink,
                host_bytes_per_second: self.node.rates.host,
            },
            arms: done,
            host_sweep,
        };
        report.advice = advice::advice(&report);
        Ok(report)
    }

    fn serve(&self, serving: &Serving, arm: &mut dyn Arm) -> Result<(Outcome, u64), ReplayError> {
        let requests = &self.trace.requests;
        let outcome = serve(requests, serving, arm, &mut |_| ())?;
        Ok((outcome, requests.len() as u64))
    }

    fn offload(&self, serving: &Serving, host_bytes: u64) -> Result<Outcome, ReplayError> {
        let mut arm = Offload::new(self.blocks_of(host_bytes));
        self.serve(serving, &mut arm).map(|(outcome, _)| outcome)
    }

    fn swiftcache(
        &self,
        serving: &Serving,
        donors: usize,
        host_bytes: u64,
    ) -> Result<(Outcome, Lent), ReplayError> {
        let supply = self.lenders.supply(donors)?;
        let slab_slots = self.blocks_of(self.lenders.slab_bytes);
        let host = self.blocks_of(host_bytes);
        let tiers = &self.node.others;
        let mut arm = Planned::new(
            host,
            self.retention,
            supply,
            tiers,
            slab_slots,
            self.move_blocks,
        );
        let (outcome, _) = self.serve(serving, &mut arm)?;
        Ok((outcome, arm.lent))
    }

    /// Hit rate and time against the size of host memory.
    fn sweep(
        &self,
        serving: &Serving,
        measured: &Serving,
        next: &mut dyn FnMut(),
    ) -> Result<Vec<HostPoint>, ReplayError> {
        let mut points = Vec::new();
        for share in SWEEP {
            next();
            let base = match self.host_bytes {
                0 => SWEEP_BASE,
                asked => asked,
            };
            let host_bytes = (base as f64 * share) as u64;
            let (swiftcache, _) = self.swiftcache(serving, self.donors, host_bytes)?;
            next();
            let offload = self.offload(measured, host_bytes)?;
            points.push(HostPoint {
                host_bytes,
                swiftcache_hit_rate: hit_rate(&swiftcache),
                swiftcache_p99_ms: Ttft::of(&swiftcache.ttft_s).p99_ms,
                offload_hit_rate: hit_rate(&offload),
                offload_p99_ms: Ttft::of(&offload.ttft_s).p99_ms,
            });
        }
        Ok(points)
    }

    fn holds(&self, serving: &Serving, donor_bytes: u64, host_bytes: u64) -> Holds {
        Holds {
            pool_bytes: u64::from(serving.pool_blocks) * self.block_bytes(),
            donor_bytes,
            host_bytes,
        }
    }

    fn arm(&self, name: &str, what: &str, holds: Holds, outcome: &Outcome) -> PlanArm {
        let served = outcome.ttft_s.len() as f64;
        let per_second = |seconds: f64| match seconds > 0.0 {
            true => served / seconds,
            false => 0.0,
        };
        let blocks = outcome.blocks.max(1) as f64;
        let longest = holds.pool_bytes / self.model.bytes_per_token();
        let by_tier = outcome.hits.iter();
        let by_tier: BTreeMap<_, _> = by_tier
            .map(|(tier, hits)| (*tier, *hits as f64 / blocks))
            .collect();
        PlanArm {
            name: name.to_owned(),
            what: what.to_owned(),
            donors: 0,
            holds,
            ttft: Ttft::of(&outcome.ttft_s),
            ttft_curve_ms: curve(&outcome.ttft_s),
            hit_rate: hit_rate(outcome),
            hit_rate_by_tier: by_tier,
            utilisation: outcome.utilisation(),
            requests_per_second: per_second(outcome.span_s),
            most_requests_per_second: per_second(outcome.busy_s),
            longest_context_tokens: longest,
            longest_stitched_tokens: longest,
            lent_mean_bytes: 0,
            lent_least_bytes: 0,
            revocations: 0,
            lent: Vec::new(),
        }
    }

    fn add_donors(&self, arm: &mut PlanArm, donors: usize, lent: &Lent) {
        let block = self.block_bytes();
        arm.donors = donors as u64;
        arm.lent_mean_bytes = (lent.mean() * block as f64) as u64;
        arm.lent_least_bytes = lent.least.unwrap_or(0) * block;
        arm.longest_stitched_tokens += arm.lent_least_bytes / self.model.bytes_per_token();
        arm.revocations = lent.revocations;
        arm.lent = lent.points(block);
    }

    fn basis(&self) -> String {
        let engine = Engine::VLLM;
        let rules = match self.retention {
            Retention::Value => "the cache's and the donors' own rules",
            Retention::Age => {
                "the donors' own rules and of a cache that drops what was used longest ago"
            }
        };
        format!(
            "Modelled, nothing was run: compute is a roofline of {} ({:.0} % of peak FLOP/s, {:.0} % of peak HBM rate, {:.0} ms a request; {}), one GPU prefills first come first served. SwiftCache and the ideal offload load layer by layer at the links' rates; vLLM's offload loads before it computes, at {:.0} % of the rate, as measured. Hits are those of {rules}.",
            self.node.gpu.name,
            engine.compute_efficiency * 100.0,
            engine.memory_efficiency * 100.0,
            engine.request_s * 1e3,
            engine.name,
            OFFLOAD_SHARE_OF_RATE * 100.0,
        )
    }
}

fn hit_rate(outcome: &Outcome) -> f64 {
    outcome.hits.values().sum::<u64>() as f64 / outcome.blocks.max(1) as f64
}

#[cfg(test)]
pub(crate) mod tests;
