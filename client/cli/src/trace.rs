//! The flags that say which trace, for `plan` and `replay`.

use std::path::PathBuf;

use clap::Args;

use super::CliError;
use swiftcache_replay::{
    ReplayError,
    trace::{self, Format, Options, Trace},
};

/// The trace.
#[derive(Args, Debug)]
pub(super) struct TraceArgs {
    /// The busy model's requests, plain or gzip: Mooncake, Qwen-Bailian, agents' conversations, message logs, Azure, BurstGPT,
    /// ServeGen; docs/replay.md describes each
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// The trace's format: mooncake, bailian, conversations, messages, agent-texts, azure, burstgpt, servegen [default: found
    /// from its first row]
    #[arg(long, value_name = "NAME")]
    format: Option<Format>,
    /// Tokens in a block of the trace [default: 512; bailian 16; conversations and texts 64]
    #[arg(long, value_name = "N")]
    block_tokens: Option<u64>,
    /// Requests a second where the trace has no time stamps, and conversations a second [default: 1]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    rate: Option<f64>,
    /// Only the first N rows
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Bytes of text in a token, where the trace has the texts and no tokenizer is given [default: 4]
    #[arg(long, value_name = "BYTES", value_parser = bytes_per_token)]
    bytes_per_token: Option<f64>,
    /// The model's tokenizer.json, where the trace has the texts: counts their tokens
    #[arg(long, value_name = "FILE", conflicts_with = "bytes_per_token")]
    tokenizer: Option<PathBuf>,
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    let number = number.filter(|rate: &f64| *rate > 1e-6 && *rate <= 1e6);
    number
        .ok_or_else(|| format!("{text:?} is not a rate; takes more than 0.000001, at most 1000000"))
}

fn bytes_per_token(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    let number = number.filter(|bytes: &f64| (0.25..=64.0).contains(bytes));
    number.ok_or_else(|| format!("{text:?} is no size of a token; takes 0.25 to 64 bytes"))
}

impl TraceArgs {
    /// Reads it.
    pub(super) fn load(&self) -> Result<Trace, CliError> {
        let options = Options {
            format: self.format,
            block_tokens: self.block_tokens,
            rate: self.rate,
            first: self.requests,
            bytes_per_token: self.bytes_per_token,
            tokenizer: self.tokenizer.clone(),
        };
        let trace = trace::load(&self.trace, &options);
        Ok(trace.map_err(ReplayError::from)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_within_the_bounds_that_its_refusal_names() {
        for (text, number) in [("2e-6", 2e-6), ("1", 1.0), ("1000000", 1e6)] {
            assert_eq!(rate(text), Ok(number));
        }
        for text in ["1e-7", "0.000001", "0", "-1", "1000001", "nan", "fast"] {
            let said = rate(text).unwrap_err();
            for part in [text, "more than 0.000001", "at most 1000000"] {
                assert!(said.contains(part), "{said}");
            }
        }
    }
}
