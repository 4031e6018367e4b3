//! Sequences that decode while other requests prefill.

use super::{Allocation, PrefixCache, Request, Roofline};

/// Sequences that decode in lockstep: each step gives one token to each sequence.
#[derive(Debug, Default)]
pub(super) struct Decoding {
    /// Ordered by the step after which a sequence is over.
    pub(super) sequences: Vec<Sequence>,
    pub(super) steps: f64,
    pub(super) now_s: f64,
}

#[derive(Debug)]
pub(super) struct Sequence {
    over_at: f64,
    /// The average context over the sequence's life, tokens: its prompt and half its answer.
    context: f64,
    allocation: Allocation,
}

impl Decoding {
    pub(super) fn context(&self) -> f64 {
        self.sequences.iter().map(|sequence| sequence.context).sum()
    }

    pub(super) fn start(&mut self, request: &Request, allocation: Allocation) {
        let over_at = self.steps + request.output_tokens as f64;
        let at = self
            .sequences
            .partition_point(|other| other.over_at <= over_at);
        let context = request.input_tokens as f64 + request.output_tokens as f64 / 2.0;
        self.sequences.insert(
            at,
            Sequence {
                over_at,
                context,
                allocation,
            },
        );
    }

    fn step_s(&self, roofline: &Roofline) -> f64 {
        roofline.decode_step_s(self.sequences.len() as u64, self.context())
    }

    /// Releases the slots of sequences whose answer is complete.
    pub(super) fn finish(&mut self, pool: &mut PrefixCache) {
        // The tolerance is for rounding, which must not keep a finished sequence.
        let over = |sequence: &Sequence| sequence.over_at <= self.steps + 1e-6;
        let count = self
            .sequences
            .iter()
            .take_while(|sequence| over(sequence))
            .count();
        for sequence in self.sequences.drain(..count) {
            pool.release(&sequence.allocation);
        }
    }

    /// Decodes until `until_s`. No prefill runs meanwhile.
    pub(super) fn run_until(&mut self, until_s: f64, roofline: &Roofline, pool: &mut PrefixCache) {
        while let Some(next_s) = self.next_finish_s(roofline)
            && next_s <= until_s
        {
            self.run_to_next(roofline, pool);
        }
        if !self.sequences.is_empty() && until_s > self.now_s {
            self.steps += (until_s - self.now_s) / self.step_s(roofline);
        }
        self.now_s = self.now_s.max(until_s);
    }

    fn next_finish_s(&self, roofline: &Roofline) -> Option<f64> {
        let first = self.sequences.first()?;
        Some(self.now_s + (first.over_at - self.steps).max(0.0) * self.step_s(roofline))
    }

    /// Decodes until the next sequence is over. No prefill runs meanwhile.
    pub(super) fn run_to_next(&mut self, roofline: &Roofline, pool: &mut PrefixCache) {
        if let Some(next_s) = self.next_finish_s(roofline) {
            self.steps = self.steps.max(self.sequences[0].over_at);
            self.now_s = next_s;
            self.finish(pool);
        }
    }
}
