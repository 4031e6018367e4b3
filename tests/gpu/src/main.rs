//! Runs the conformance suite as a plain program, and plays the second process of its checks.

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use swiftcache_client::device::{self, Choice};
use swiftcache_gpu_tests::{
    bench::{self, Scale},
    collision,
    conformance::CHECKS,
    operation::{self, Operation},
    peer,
    subject::{Backend, Subject, simulated},
};

#[derive(Parser)]
#[command(about, version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the conformance suite on the GPUs of this machine.
    Conformance {
        /// Only the checks whose name contains this.
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Measures copies, openings and the layer pipeline, beside plain copies on the same GPU.
    Bench {
        /// Also writes the figures to this file, as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Moves a few bytes only, to see that everything runs: the figures mean nothing.
        #[arg(long)]
        small: bool,
    },
    /// Measures the host backend's copies beside memcpy.
    BenchHost,
    /// Shares memory with a process of the same PID value: run it as PID 1 of a PID namespace.
    PidCollision,
    /// Opens a backend, and says which one it was.
    Open {
        /// auto, host or cuda.
        choice: Choice,
    },
    /// Does one thing on a GPU, and prints what went wrong with it.
    Do {
        /// What to do.
        operation: Operation,
    },
    /// Plays the second process of a check: serves requests from a socket on standard input.
    Peer {
        /// The backend to open, as JSON.
        #[arg(value_parser = |text: &str| serde_json::from_str::<Backend>(text))]
        backend: Backend,
    },
}

/// Says what went wrong, and no stack: a refusal of the driver is news about the machine, not about this program.
fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        // Nobody may be reading; the exit status says it all the same.
        let _ = writeln!(std::io::stderr(), "Error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let program = std::env::current_exe()?;
    match Arguments::parse().command {
        Command::Conformance { only } => conformance(&Subject::cuda(program)?, &only),
        Command::Bench { json, small } => {
            let scale = if small { Scale::SMALL } else { Scale::FULL };
            let mut progress = |part: &str| {
                // Nobody may be reading; the figures go to standard output all the same.
                let _ = writeln!(std::io::stderr(), "measuring: {part}");
            };
            let report = bench::run(&Subject::cuda(program)?, scale, &mut progress)?;
            if let Some(path) = json {
                std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
            }
            say(&report.table())
        }
        Command::BenchHost => {
            let usage_dir = std::env::temp_dir().join("swiftcache-gpu-check");
            say(&bench::table(&bench::host::run(usage_dir, 15)?).to_string())
        }
        Command::PidCollision => collision::run(program).and_then(|outcome| say(&outcome)),
        Command::Open { choice } => {
            let host = || {
                let usage_dir = std::env::temp_dir().join("swiftcache-gpu-check");
                simulated(usage_dir)
            };
            let layer = device::open(choice, host)?;
            say(layer.name())
        }
        Command::Do { operation } => operation::run(operation, program).map(|()| ExitCode::SUCCESS),
        Command::Peer { backend } => peer::serve(&backend).map(|()| ExitCode::SUCCESS),
    }
}

fn conformance(subject: &Subject, only: &str) -> Result<ExitCode> {
    let chosen = || CHECKS.iter().filter(|(name, _)| name.contains(only));
    ensure!(
        chosen().next().is_some(),
        "no check's name contains {only:?}"
    );
    let mut code = ExitCode::SUCCESS;
    for (name, check) in chosen() {
        match check(subject) {
            Ok(()) => say(&format!("ok      {name}"))?,
            Err(error) => {
                code = ExitCode::FAILURE;
                say(&format!("FAILED  {name}: {error:#}"))?
            }
        };
    }
    Ok(code)
}

fn say(line: &str) -> Result<ExitCode> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(ExitCode::SUCCESS)
}
