//! A plain program that runs the conformance suite, and that is also the second process of the suite's checks.

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use swiftcache_broker::probe::{self, ProbeChoice};
use swiftcache_client::device::{self, Choice};
use swiftcache_gpu_tests::{
    bench::{self, Report, Scale},
    capture, collision,
    conformance::{CHECKS, Check, PEER_CHECKS},
    full_stack, links,
    operation::{self, Operation},
    peer, stitched,
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
        /// Run only the checks whose names contain this.
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Measures copies, importing memory and the layer pipeline, and compares them with plain copies on the same GPU.
    Bench {
        /// Also writes the figures to this file, as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Moves only a few bytes, to test that everything runs. The figures then mean nothing.
        #[arg(long)]
        small: bool,
        /// Run only the parts whose names contain this, for example peers.
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Measures copies between two GPUs by every method and number of kernel blocks.
    Tune {
        /// Also writes the figures to this file, as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Moves only a few bytes.
        #[arg(long)]
        small: bool,
    },
    /// Compares the links that CUDA reports with those of the broker. Fails when they differ.
    Links {
        /// nvml, or simulated with a topology.
        #[arg(long, default_value = "nvml")]
        probe: ProbeChoice,
        /// A topology file.
        #[arg(long)]
        topology: Option<String>,
    },
    /// Runs a broker, `swiftcache donate` and a borrower, which must lie beside this program, and checks every byte.
    FullStack {
        /// A topology file that names these GPUs, in place of NVML.
        #[arg(long)]
        topology: Option<PathBuf>,
        /// Each process enumerates its own GPU only. Handles are descriptors then.
        #[arg(long)]
        apart: bool,
    },
    /// Captures a CUDA graph while a borrower in this process leases, stores, loads and gives back, and launches it.
    GraphCapture {
        /// A topology file that names these GPUs, in place of NVML.
        #[arg(long)]
        topology: Option<PathBuf>,
    },
    /// Lays an engine's pool out over the first device and slabs of the last, takes them back, and checks every byte.
    Stitched {
        /// A topology file that names these GPUs, in place of NVML.
        #[arg(long)]
        topology: Option<PathBuf>,
        /// Moves only a few bytes, to test that everything runs.
        #[arg(long)]
        small: bool,
    },
    /// Compares copies of the host backend with memcpy.
    BenchHost,
    /// Shares memory with a process that has the same PID. Run it as PID 1 of a PID namespace.
    PidCollision,
    /// Opens a backend, and prints its name.
    Open {
        /// auto, host or cuda.
        choice: Choice,
    },
    /// Does one operation on a GPU, and prints its error, if it fails.
    Do {
        /// The operation.
        operation: Operation,
    },
    /// Is the second process of a check: serves requests from a socket on standard input.
    Peer {
        /// The backend to open, as JSON.
        #[arg(value_parser = |text: &str| serde_json::from_str::<Backend>(text))]
        backend: Backend,
    },
}

/// Prints an error without a backtrace, because a refusal of the driver is about the machine, not about this program.
fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        // If nobody reads this, the exit status still tells of the failure.
        let _ = writeln!(std::io::stderr(), "Error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let program = std::env::current_exe()?;
    match Arguments::parse().command {
        Command::Conformance { only } => conformance(&Subject::cuda(program)?, &only),
        Command::Bench { json, small, only } => {
            let subject = Subject::cuda(program)?;
            let report = bench::run(&subject, scale(small), &only, &mut note)?;
            tell(&report, json)
        }
        Command::Tune { json, small } => {
            let report = bench::tune(&Subject::cuda(program)?, scale(small), &mut note)?;
            tell(&report, json)
        }
        Command::Links { probe, topology } => {
            let subject = Subject::cuda(program)?;
            let probe = probe::open(probe, topology.as_deref())?;
            let comparison = links::compare(&*subject.layer, &*probe)?;
            say(&comparison.lines.join("\n"))?;
            Ok(match comparison.disagreements {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            })
        }
        Command::FullStack { topology, apart } => {
            let subject = Subject::cuda(program)?;
            full_stack::run(&*subject.layer, topology, apart, &mut tell_line)
                .map(|()| ExitCode::SUCCESS)
        }
        Command::GraphCapture { topology } => {
            let subject = Subject::cuda(program)?;
            capture::run(&subject.layer, topology, &mut tell_line).map(|()| ExitCode::SUCCESS)
        }
        Command::Stitched { topology, small } => {
            let subject = Subject::cuda(program)?;
            let scale = match small {
                true => stitched::Scale::SMALL,
                false => stitched::Scale::FULL,
            };
            stitched::run(&subject.layer, topology, scale, &mut tell_line)
                .map(|()| ExitCode::SUCCESS)
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

fn scale(small: bool) -> Scale {
    if small { Scale::SMALL } else { Scale::FULL }
}

/// Prints a line of progress.
fn note(line: &str) {
    // If nobody reads this, the figures still go to standard output.
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn tell(report: &Report, json: Option<PathBuf>) -> Result<ExitCode> {
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_vec_pretty(report)?)?;
    }
    say(&report.table())?;
    Ok(match report.failures.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn conformance(subject: &Subject, only: &str) -> Result<ExitCode> {
    let chosen = |checks: &'static [Check]| {
        let chosen = checks.iter().filter(|(name, _)| name.contains(only));
        chosen.collect::<Vec<_>>()
    };
    let (mut checks, peers) = (chosen(CHECKS), chosen(PEER_CHECKS));
    ensure!(
        !checks.is_empty() || !peers.is_empty(),
        "no check has a name that contains {only:?}"
    );
    let mut code = ExitCode::SUCCESS;
    if !peers.is_empty() {
        match subject.neighbour() {
            // These run before the checks that break a device.
            Ok(_) => drop(checks.splice(0..0, peers)),
            Err(problem) => match problem.excused() {
                Ok(excuse) => drop(say(&format!("none    {excuse}"))?),
                Err(error) => {
                    code = ExitCode::FAILURE;
                    say(&format!("FAILED  peers: {error:#}"))?;
                }
            },
        }
    }
    for (name, check) in checks {
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

/// Prints a line of the results.
fn tell_line(line: &str) {
    // If nobody reads this, the exit status still tells of a failure.
    let _ = say(line);
}

fn say(line: &str) -> Result<ExitCode> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(ExitCode::SUCCESS)
}
