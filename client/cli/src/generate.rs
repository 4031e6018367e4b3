//! `swiftcache generate`.

use std::{fs::File, io, path::PathBuf};

use clap::{Args, Subcommand};

use super::{CliError, output};
use swiftcache_replay::chat::{Chat, Neighbours, write_chat, write_neighbours};

/// Generate a workload: the same seed gives the same file on every machine
#[derive(Args, Debug)]
pub(super) struct GenerateArgs {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, Subcommand)]
enum Kind {
    /// A multi-turn chat service, in the Mooncake trace format
    ///
    /// Conversations begin as a Poisson process and open with one of six shared system prompts. Each turn (6 on
    /// average) appends to the turns before, think times are log-normal, and some conversations have a long document.
    Chat {
        #[command(flatten)]
        common: Common,
        /// Conversations that begin per second
        #[arg(long, default_value_t = 0.5, value_parser = rate)]
        rate: f64,
        /// Share of the conversations that bring a document of 8,000 to 32,000 tokens
        #[arg(long, default_value_t = 0.25, value_parser = share)]
        documents: f64,
    },
    /// The load of a donor's own model, as CSV: timestamp,input,output
    ///
    /// Calm and busy phases alternate (90 s and 60 s on average), with ten times the requests in busy phases.
    Neighbours {
        #[command(flatten)]
        common: Common,
        /// Requests per second in calm phases
        #[arg(long, default_value_t = 0.5, value_parser = rate)]
        rate: f64,
    },
}

#[derive(Args, Debug)]
struct Common {
    /// The seed of the random numbers
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Length of the workload, for example 20min
    #[arg(long, default_value = "20min", value_parser = humantime::parse_duration)]
    duration: std::time::Duration,
    /// Write to this file instead of standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    let number = number.filter(|rate: &f64| *rate > 0.0 && *rate <= 1e4);
    number.ok_or_else(|| format!("{text:?} is not a rate; takes more than 0, at most 10000"))
}

fn share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    let number = number.filter(|share: &f64| (0.0..=1.0).contains(share));
    number.ok_or_else(|| format!("{text:?} is not a share; takes 0 to 1"))
}

pub(super) fn run(args: &GenerateArgs) -> Result<(), CliError> {
    let mut text = Vec::new();
    let (common, written) = match &args.kind {
        Kind::Chat {
            common,
            rate,
            documents,
        } => {
            let chat = Chat {
                seed: common.seed,
                rate: *rate,
                duration_s: common.duration.as_secs_f64(),
                documents: *documents,
            };
            (common, write_chat(&chat, &mut text))
        }
        Kind::Neighbours { common, rate } => {
            let load = Neighbours {
                seed: common.seed,
                duration_s: common.duration.as_secs_f64(),
                calm_rate: *rate,
            };
            (common, write_neighbours(&load, &mut text))
        }
    };
    let failed = |error: io::Error| CliError::Failed(format!("cannot write: {error}"));
    let count = written.map_err(failed)?;
    match &common.output {
        None => output::print(&String::from_utf8_lossy(&text)).map(|_| ()),
        Some(path) => {
            let write = || io::Write::write_all(&mut File::create(path)?, &text);
            write().map_err(|error| {
                CliError::Failed(format!("--output: {}: {error}", path.display()))
            })?;
            output::complain(&format!("{count} requests in {}", path.display()));
            Ok(())
        }
    }
}
