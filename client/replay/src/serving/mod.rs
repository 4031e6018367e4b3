//! The busy model's serving engine as a discrete-event model in trace time.
//!
//! * Requests are prefilled one at a time, first come, first served. A request starts when the GPU is free and
//!   its prompt and answer fit into the local pool; until then it and everything behind it wait.
//! * Time to first token: from arrival until its prefill is over.
//! * Cached blocks found outside the local pool arrive layer by layer while earlier layers compute
//!   ([`pipelined_s`]), in every arm alike.
//! * Decoding goes on meanwhile: a prefill is cut into passes of [`PASS_TOKENS`] new tokens, and each pass
//!   carries one token of every sequence that decodes when the prefill starts, at most [`MAX_DECODING`]. That
//!   is the interference, and its bound. Between prefills, decoding has the GPU to itself.
//! * New blocks are written to donors and to the host tier in the other direction of full-duplex links, after
//!   the prefill: they delay no load.

mod decoding;
mod stretch;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use swiftcache_proto::domain::{BlockHash, LinkKind};

use decoding::Decoding;
pub use stretch::stretch_for;

use super::{
    ReplayError,
    pipeline::{LinkLoad, pipelined_s},
    prefix_cache::{PrefixCache, Seating},
    roofline::Roofline,
    trace::{BLOCK_TOKENS, Request},
};

/// New tokens in one pass of a prefill.
pub const PASS_TOKENS: u64 = 2048;
/// The most sequences that decode at once.
pub const MAX_DECODING: usize = 128;
/// What issuing one layer's load costs: a gather launch and its event, seconds.
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
    /// The tier of a donor behind such a link. A lease on the busy device itself counts as local.
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
    /// Between the GPU and pinned host memory.
    pub host: f64,
}

impl LinkRates {
    fn of(&self, tier: Tier) -> Option<f64> {
        match tier {
            Tier::Local => None,
            Tier::DonorNvlink => Some(self.nvlink),
            Tier::DonorPcie => Some(self.pcie),
            // Staged: every byte crosses PCIe twice, down from the donor and up again.
            Tier::DonorHost => Some(self.host / 2.0),
            Tier::Host => Some(self.host),
        }
    }
}

/// What the engine serves with.
#[derive(Clone, Copy, Debug)]
pub struct Serving {
    /// The model and its GPU.
    pub roofline: Roofline,
    /// The links.
    pub rates: LinkRates,
    /// The local pool, blocks.
    pub pool_blocks: u32,
    /// Arrival times are multiplied by this.
    pub stretch: f64,
}

/// What differs between the arms: where the blocks are that the local pool does not hold, and whether there
/// are real bytes behind them.
pub trait Arm {
    /// Trace time is now `now_s`: neighbours and whoever else lives in it move on.
    fn advance(&mut self, now_s: f64) -> Result<(), ReplayError>;

    /// Brings every block of the prompt into its slot: checks the first `seating.hits`, fetches the longest
    /// run of what follows, computes and stores the rest. Says how many blocks came from where, in order.
    fn prefill(
        &mut self,
        blocks: &[BlockHash],
        seating: &Seating,
    ) -> Result<Vec<(Tier, u64)>, ReplayError>;
}

/// The arm without another tier and without bytes: what is not in the local pool is computed again.
#[derive(Debug, Default)]
pub struct Recompute;

impl Arm for Recompute {
    fn advance(&mut self, _now_s: f64) -> Result<(), ReplayError> {
        Ok(())
    }

    fn prefill(
        &mut self,
        _blocks: &[BlockHash],
        _seating: &Seating,
    ) -> Result<Vec<(Tier, u64)>, ReplayError> {
        Ok(Vec::new())
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Time to first token of every served request, in order of arrival, seconds.
    pub ttft_s: Vec<f64>,
    /// Blocks found, by tier.
    pub hits: BTreeMap<Tier, u64>,
    /// Blocks asked for by served requests.
    pub blocks: u64,
    /// Requests that can never fit into the local pool.
    pub refused: u64,
    /// Time that the server was taken: prefilling, or waiting for room in the local pool, seconds.
    pub busy_s: f64,
    /// From the first arrival until the last first token, seconds.
    pub span_s: f64,
}

impl Outcome {
    /// Share of the span during which the server was taken. Beyond 1 no queue would ever end.
    pub fn utilisation(&self) -> f64 {
        if self.span_s > 0.0 {
            self.busy_s / self.span_s
        } else {
            0.0
        }
    }
}

/// Serves `requests` in order. `progress` hears how many are done.
///
/// # Errors
/// Whatever the arm's data path fails with; a wrong byte above all.
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
        let answer = request.output_tokens.div_ceil(BLOCK_TOKENS) as usize;
        if request.blocks.len() + answer > pool.capacity() {
            outcome.refused += 1;
            progress(done);
            continue;
        }
        let taken_s = arrival_s.max(free_s);
        decoding.run_until(taken_s, roofline, &mut pool);
        let seating = loop {
            if decoding.sequences.len() < MAX_DECODING
                && let Some(seating) = pool.seat(&request.blocks, answer)
            {
                break seating;
            }
            decoding.run_to_next(roofline, &mut pool);
        };
        let start_s = decoding.now_s;
        arm.advance(start_s)?;
        let fetched = arm.prefill(&request.blocks, &seating)?;
        for (slot, block) in seating.slots.iter().zip(&request.blocks) {
            pool.publish(*slot, *block);
        }
        outcome.blocks += request.blocks.len() as u64;
        *outcome.hits.entry(Tier::Local).or_default() += seating.hits as u64;
        for (tier, count) in &fetched {
            *outcome.hits.entry(*tier).or_default() += count;
        }
        let found = seating.hits as u64 + fetched.iter().map(|(_, count)| count).sum::<u64>();
        let prefill = prefill(serving, request, found, &fetched, &decoding);
        free_s = start_s + prefill.seconds;
        decoding.steps += prefill.passes;
        decoding.now_s = free_s;
        decoding.finish(&mut pool);
        decoding.start(request, seating);
        decoding.finish(&mut pool);
        outcome.ttft_s.push(free_s - arrival_s);
        outcome.busy_s += free_s - taken_s;
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

/// The last token is always computed: somebody must predict the next.
fn prefill(
    serving: &Serving,
    request: &Request,
    found: u64,
    fetched: &[(Tier, u64)],
    decoding: &Decoding,
) -> Prefill {
    let cached = (found * BLOCK_TOKENS).min(request.input_tokens - 1);
    let new = request.input_tokens - cached;
    let passes = new.div_ceil(PASS_TOKENS) as f64;
    let model = &serving.roofline.model;
    let riding = decoding.sequences.len() as u64;
    let compute_s = serving.roofline.prefill_s(new, cached)
        + passes * serving.roofline.ride_along_s(riding, decoding.context());
    let mut by_tier: BTreeMap<Tier, u64> = BTreeMap::new();
    for (tier, count) in fetched {
        *by_tier.entry(*tier).or_default() += count;
    }
    let block_layer_bytes = (BLOCK_TOKENS * model.layer_bytes_per_token()) as f64;
    let loads = by_tier.into_iter().filter_map(|(tier, count)| {
        let bytes_per_second = serving.rates.of(tier)?;
        Some(LinkLoad {
            layer_bytes: count as f64 * block_layer_bytes,
            bytes_per_second,
            issue_s: ISSUE_S,
        })
    });
    let loads: Vec<_> = loads.collect();
    Prefill {
        seconds: pipelined_s(model.layers, compute_s / model.layers as f64, &loads),
        passes,
    }
}

#[cfg(test)]
mod tests;
