//! The `swiftcache` command.
//!
//! Exit status: 0 done; 1 failed, above all because of wrong bytes; 2 the command line, or a file that it names, is
//! wrong; 3 the broker cannot be reached; 130 interrupted.

mod admin;
mod args;
mod backend;
mod chosen;
mod demo;
mod doctor;
mod donate;
mod follow;
mod generate;
mod hold;
mod manual;
mod operate;
mod output;
mod plan;
mod progress;
mod replay;
mod report;
mod status;
mod tether;
mod top;
mod trace;
mod watch;

use std::{
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::{CommandFactory, Parser, Subcommand};

use swiftcache_replay::ReplayError;

const EXIT_CODES: &str = "Exit status: 0 done; 1 failed, above all because of wrong bytes; \
    2 the command line, or a file that it names, is wrong; 3 the broker cannot be reached; 130 interrupted.";

/// Shares idle HBM between the models of one GPU server.
#[derive(Debug, Parser)]
#[command(name = "swiftcache", version, max_term_width = 110, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Status(status::StatusArgs),
    Top(top::TopArgs),
    Doctor(doctor::DoctorArgs),
    Donate(donate::DonateArgs),
    Hold(hold::HoldArgs),
    Drain(operate::DrainArgs),
    Undrain(operate::UndrainArgs),
    Evict(operate::EvictArgs),
    Forget(operate::ForgetArgs),
    Quota(operate::QuotaArgs),
    Preview(operate::PreviewArgs),
    Events(operate::EventsArgs),
    Watch(follow::WatchArgs),
    Plan(plan::PlanArgs),
    Replay(replay::ReplayArgs),
    Demo(demo::DemoArgs),
    Generate(generate::GenerateArgs),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
    #[command(hide = true)]
    Tether(tether::TetherArgs),
}

/// The status of a command that a signal ended.
const INTERRUPTED: u8 = 130;

/// How a user names another broker than the one that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    /// By `--socket` or its variable.
    Socket,
    /// By `--socket`, which has no variable in `replay`.
    SocketFlag,
    /// By `--address`.
    Address,
}

impl Naming {
    /// The end of the question whether the broker runs, and what to do.
    fn advice(self) -> &'static str {
        match self {
            Self::Socket => "? Use --socket or SWIFTCACHE_SOCKET for another socket",
            Self::SocketFlag => "? Use --socket for another socket",
            Self::Address => ", with this listen_tcp? Use --address for another address",
        }
    }
}

/// Why the command exits with a status other than 0.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// Status 1.
    #[error("{0}")]
    Failed(String),
    /// Status 2.
    #[error("{0}")]
    Usage(String),
    /// Status 3.
    #[error("no broker at {place}: {problem}; is swiftcache-broker running{}", naming.advice())]
    NoBroker {
        place: String,
        problem: String,
        naming: Naming,
    },
    /// Status 130.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    /// Nobody answers at a socket that the user named by `--socket` or its variable, as most commands have it.
    fn no_broker_at(socket: &Path, problem: String) -> Self {
        Self::NoBroker {
            place: socket.display().to_string(),
            problem,
            naming: Naming::Socket,
        }
    }

    /// The same error where another broker is named in this way.
    fn with_naming(self, naming: Naming) -> Self {
        match self {
            Self::NoBroker { place, problem, .. } => Self::NoBroker {
                place,
                problem,
                naming,
            },
            other => other,
        }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::NoBroker { .. } => 3,
            Self::Interrupted => INTERRUPTED,
        }
    }
}

impl From<ReplayError> for CliError {
    fn from(error: ReplayError) -> Self {
        match error {
            ReplayError::Trace(_) | ReplayError::Topology(_) | ReplayError::Flag { .. } => {
                Self::Usage(error.to_string())
            }
            ReplayError::Client(error) => error.into(),
            ReplayError::Interrupted => Self::Interrupted,
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl From<swiftcache_client::Error> for CliError {
    fn from(error: swiftcache_client::Error) -> Self {
        match error {
            swiftcache_client::Error::Disconnected { socket, problem } => {
                Self::no_broker_at(&socket, problem)
            }
            swiftcache_client::Error::Config { .. } => Self::Usage(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log();
    let result = match cli.command {
        Command::Status(args) => status::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Donate(args) => donate::run(&args),
        Command::Hold(args) => hold::run(&args),
        Command::Drain(args) => operate::drain(&args),
        Command::Undrain(args) => operate::undrain(&args),
        Command::Evict(args) => operate::evict(&args),
        Command::Forget(args) => operate::forget(&args),
        Command::Quota(args) => operate::quota(&args),
        Command::Preview(args) => operate::preview(&args),
        Command::Events(args) => operate::events(&args),
        Command::Watch(args) => follow::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Completions(args) => manual::complete(&args, Cli::command()),
        Command::Man(args) => manual::man(&args, Cli::command()),
        Command::Tether(args) => tether::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("swiftcache: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Writes logs to standard error, filtered by `RUST_LOG`.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        // HTTP/2 warns of each call that is given up, and that is no news to a user.
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,h2=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // If a line cannot be written, for example because the disk is full, an error message about that would panic.
        .log_internal_errors(false)
        .with_target(false)
        .init();
}

/// A flag that SIGINT and SIGTERM set. A second signal ends the process at once.
fn interrupt() -> Result<Arc<AtomicBool>, CliError> {
    let flag = Arc::new(AtomicBool::new(false));
    let heard = Arc::clone(&flag);
    on_signal(move || {
        if heard.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
    })?;
    Ok(flag)
}

/// Has the first SIGINT or SIGTERM end the process, whatever it waits for.
fn end_on_signal() -> Result<(), CliError> {
    on_signal(|| std::process::exit(INTERRUPTED.into()))
}

/// Calls `heard` at each SIGINT and SIGTERM, on a thread of its own.
fn on_signal(heard: impl Fn() + Send + 'static) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::Failed(format!("cannot catch signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let entered = runtime.enter();
    let mut signals = {
        use tokio::signal::unix::{SignalKind, signal};
        [
            signal(SignalKind::interrupt()).map_err(failed)?,
            signal(SignalKind::terminate()).map_err(failed)?,
        ]
    };
    drop(entered);
    let listen = move || {
        runtime.block_on(async {
            let [interrupt, terminate] = &mut signals;
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                heard();
            }
        });
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(listen).map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_failure_has_its_status() {
        let flag = ReplayError::Flag {
            flag: "--scale",
            problem: "is 0".to_owned(),
        };
        assert_eq!(CliError::from(flag).exit_code(), 2);
        assert_eq!(CliError::from(ReplayError::Interrupted).exit_code(), 130);
        let absent = swiftcache_client::Error::Disconnected {
            socket: "/nowhere".into(),
            problem: "none".to_owned(),
        };
        let absent = CliError::from(ReplayError::Client(absent));
        assert_eq!(absent.exit_code(), 3);
        assert!(absent.to_string().contains("/nowhere"));
        let variable = "SWIFTCACHE_SOCKET";
        assert!(absent.to_string().contains(variable), "{absent}");
        let of_replay = absent.with_naming(Naming::SocketFlag);
        assert_eq!(of_replay.exit_code(), 3);
        let said = of_replay.to_string();
        assert!(
            said.contains("--socket") && !said.contains(variable),
            "{said}"
        );
        let wrong = ReplayError::WrongBytes {
            block: swiftcache_proto::domain::BlockHash([1; 16]),
            layer: 3,
            place: "loaded",
            offset: 0,
            expected: 1,
            found: 2,
        };
        assert_eq!(CliError::from(wrong).exit_code(), 1);
    }
}
