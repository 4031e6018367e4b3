//! The busy model's serving engine as a discrete-event model in trace time.
//!
//! * Requests are prefilled one at a time, first come, first served. A request starts when the GPU is free and
//!   its prompt and answer fit into the local pool. Until then, this request and all later requests wait.
//! * The time to first token is the time from a request's arrival until its prefill is over.
//! * Cached blocks found outside the local pool arrive layer by layer while earlier layers compute
//!   ([`pipelined_s`]), or before the prefill ([`Loading`]).
//! * Decoding goes on during a prefill. A prefill is cut into passes of [`PASS_TOKENS`] new tokens, and each pass
//!   also decodes one token of every sequence that is decoding when the prefill starts, at most [`MAX_DECODING`].
//!   So decoding slows a prefill, by a bounded amount. Between prefills, decoding has the GPU to itself.
//! * New blocks are written to donors and to the host tier after the prefill, in the other direction of full-duplex
//!   links. So they delay no load.

mod decoding;
mod stretch;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use swiftcache_proto::domain::{BlockHash, LinkKind};

use decoding::Decoding;
pub use stretch::{TARGET_UTILISATION, stretch_for};

use super::{
    ReplayError,
    pipeline::{LinkLoad, pipelined_s},
    prefix_cache::{Allocation, PrefixCache},
    roofline::Roofline,
    trace::Request,
};

/// New tokens in one pass of a prefill.
pub const PASS_TOKENS: u64 = 2048;
/// The most sequences that decode at once.
pub const MAX_DECODING: usize = 128;
/// Time to issue one layer's load, seconds: one gather launch and its event.
pub const ISSUE_S: f64 = 10e-6;

/// Where a block was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// The busy model's own pool.
    Local,
    /// A donor's HBM over NVLink.
    DonorNvlink,
    /// A donor's HBM over PCIe peer access.
    DonorPcie,
    /// A donor's HBM staged through host memory.
    DonorHost,
    /// The host tier.
    Host,
}

impl Tier {
    /// The tier of a donor that is reached over `link`. A lease on the busy device itself counts as local.
    pub fn of_donor(link: LinkKind) -> Self {
        match link {
            LinkKind::SameDevice => Self::Local,
            LinkKind::Nvlink => Self::DonorNvlink,
            LinkKind::Pcie => Self::DonorPcie,
            LinkKind::Host => Self::DonorHost,
        }
    }
}

/// The modelled rate of each tier's link, bytes/s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkRates {
    /// Peer copies over NVLink.
    pub nvlink: f64,
    /// Peer copies over PCIe.
    pub pcie: f64,
    /// Copies between the GPU and pinned host memory.
    pub host: f64,
}

impl LinkRates {
    fn of(&self, tier: Tier) -> Option<f64> {
        match tier {
            Tier::Local => None,
            Tier::DonorNvlink => Some(self.nvlink),
            Tier::DonorPcie => Some(self.pcie),
            // Staged through host memory: every byte crosses PCIe twice.
            Tier::DonorHost => Some(self.host / 2.0),
            Tier::Host => Some(self.host),
        }
    }
}

/// The engine's resources and settings.
#[derive(Clone, Copy, Debug)]
pub struct Serving {
    /// The model and its GPU.
    pub roofline: Roofline,
    /// The links.
    pub rates: LinkRates,
    /// The local pool, blocks.
    pub pool_blocks: u32,
    /// Tokens in a block.
    pub block_tokens: u64,
    /// Whether a prompt finds what earlier ones left in the local pool.
    pub prefix_caching: bool,
    /// How blocks come from outside the local pool.
    pub loading: Loading,
    /// Arrival times are multiplied by this.
    pub stretch: f64,
}

/// How blocks from outside the local pool come into it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loading {
    /// Layer by layer, while earlier layers compute.
    LayerByLayer,
    /// All of them before the prefill begins, at this share of the link's rate.
    Before {
        /// The share, 0 to 1.
        share_of_rate: f64,
    },
}

/// Blocks that one tier gave to a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Where they were.
    pub tier: Tier,
    /// How many they are.
    pub blocks: u64,
}

/// The part of the engine that differs between the arms: where it finds blocks that the local pool does not hold,
/// and whether it moves real bytes.
pub trait Arm {
    /// Moves everything that follows trace time, for example the neighbours, on to `now_s`.
    fn advance(&mut self, now_s: f64) -> Result<(), ReplayError>;

    /// Brings every block of the prompt into its slot. It checks the first `allocation.hits` blocks, fetches as many
    /// of the following blocks as it finds without a gap, and computes and stores the rest. Returns what it fetched
    /// from each tier, in the order of the prompt.
    fn prefill(
        &mut self,
        blocks: &[BlockHash],
        allocation: &Allocation,
    ) -> Result<Vec<Fetched>, ReplayError>;
}

/// The arm without another tier and without bytes: it computes again what is not in the local pool.
#[derive(Debug, Default)]
pub struct Recompute;

impl Arm for Recompute {
    fn advance(&mut self, _now_s: f64) -> Result<(), ReplayError> {
        Ok(())
    }

    fn prefill(
        &mut self,
        _blocks: &[BlockHash],
        _allocation: &Allocation,
    ) -> Result<Vec<Fetched>, ReplayError> {
        Ok(Vec::new())
    }
}

/// The results of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Time to first token of every served request, in order of arrival, seconds.
    pub ttft_s: Vec<f64>,
    /// Blocks found, by tier.
    pub hits: BTreeMap<Tier, u64>,
    /// Blocks of all served requests.
    pub blocks: u64,
    /// Requests that can never fit into the local pool.
    pub refused: u64,
    /// Time that the server was busy: prefilling, or waiting for room in the local pool, seconds.
    pub busy_s: f64,
    /// From the first arrival until the last first token, seconds.
    pub span_s: f64,
}

impl Outcome {
    /// Share of the span during which the server was busy, 0 to 1.
    pub fn utilisation(&self) -> f64 {
        if self.span_s > 0.0 {
            self.busy_s / self.span_s
        } else {
            0.0
        }
    }
}

/// Serves `requests` in order. After each, it calls `progress` with the number of requests that are done.
///
/// # Errors
/// When the arm's data path fails, above all on a wrong byte.
pub fn serve(
    requests: &[Request],
    serving: &Serving,
    arm: &mut dyn Arm,
    progress: &mut dyn FnMut(u64),
) -> Result<Outcome, ReplayError> {
    let roofline = &serving.roofline;
    let mut pool = PrefixCache::new(serving.pool_blocks);
    let mut decoding = Decoding::default();
    let mut outcome = Outcome::default();
    let mut free_s = 0.0f64;
    for (done, request) in (1..).zip(requests) {
        let arrival_s = request.arrival_s * serving.stretch;
        let answer = request.output_tokens.div_ceil(serving.block_tokens) as usize;
        if request.blocks.len() + answer > pool.capacity() {
            outcome.refused += 1;
            progress(done);
            continue;
        }
        let busy_from_s = arrival_s.max(free_s);
        decoding.run_until(busy_from_s, roofline, &mut pool);
        let allocation = loop {
            if decoding.sequences.len() < MAX_DECODING
                && let Some(allocation) = pool.allocate(&request.blocks, answer)
            {
                break allocation;
            }
            decoding.run_to_next(roofline, &mut pool);
        };
        let start_s = decoding.now_s;
        arm.advance(start_s)?;
        let fetched = arm.prefill(&request.blocks, &allocation)?;
        if serving.prefix_caching {
            for (slot, block) in allocation.slots.iter().zip(&request.blocks) {
                pool.publish(*slot, *block);
            }
        }
        outcome.blocks += request.blocks.len() as u64;
        *outcome.hits.entry(Tier::Local).or_default() += allocation.hits as u64;
        for part in &fetched {
            *outcome.hits.entry(part.tier).or_default() += part.blocks;
        }
        let found = allocation.hits as u64 + fetched.iter().map(|part| part.blocks).sum::<u64>();
        let prefill = prefill(serving, request, found, &fetched, &decoding);
        free_s = start_s + prefill.seconds;
        decoding.steps += prefill.passes;
        decoding.now_s = free_s;
        decoding.finish(&mut pool);
        decoding.start(request, allocation);
        decoding.finish(&mut pool);
        outcome
            .ttft_s
            .push(free_s - arrival_s + roofline.engine.request_s);
        outcome.busy_s += free_s - busy_from_s;
        progress(done);
    }
    let first_s = requests
        .first()
        .map_or(0.0, |first| first.arrival_s * serving.stretch);
    outcome.span_s = (free_s - first_s).max(0.0);
    Ok(outcome)
}

struct Prefill {
    seconds: f64,
    passes: f64,
}

/// The cost of a prefill. The last token of a prompt is always computed, because it predicts the first token of the
/// answer.
fn prefill(
    serving: &Serving,
    request: &Request,
    found: u64,
    fetched: &[Fetched],
    decoding: &Decoding,
) -> Prefill {
    let cached = (found * serving.block_tokens).min(request.input_tokens - 1);
    let new = request.input_tokens - cached;
    let passes = new.div_ceil(PASS_TOKENS) as f64;
    let model = &serving.roofline.model;
    let riding = decoding.sequences.len() as u64;
    let compute_s = serving.roofline.prefill_s(new, cached)
        + passes * serving.roofline.ride_along_s(riding, decoding.context());
    let compute_s = compute_s.max(passes * serving.roofline.engine.step_s);
    let mut by_tier: BTreeMap<Tier, u64> = BTreeMap::new();
    for part in fetched {
        *by_tier.entry(part.tier).or_default() += part.blocks;
    }
    let block_layer_bytes = (serving.block_tokens * model.layer_bytes_per_token()) as f64;
    let loads = by_tier.into_iter().filter_map(|(tier, count)| {
        let bytes_per_second = serving.rates.of(tier)?;
        Some(LinkLoad {
            layer_bytes: count as f64 * block_layer_bytes,
            bytes_per_second,
            issue_s: ISSUE_S,
        })
    });
    let loads: Vec<_> = loads.collect();
    let layers = model.layers as f64;
    let seconds = match serving.loading {
        Loading::LayerByLayer => pipelined_s(model.layers, compute_s / layers, &loads),
        Loading::Before { share_of_rate } => {
            let bytes_s = loads
                .iter()
                .map(|load| load.layer_bytes / load.bytes_per_second);
            compute_s + layers * bytes_s.sum::<f64>() / share_of_rate
        }
    };
    Prefill { seconds, passes }
}

#[cfg(test)]
mod tests;
