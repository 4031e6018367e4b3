//! `swiftcache tether`: runs a program that the kernel ends when its parent is gone. For the children of a
//! replay: neither a crash nor a SIGKILL leaves a broker or a donor behind.

use std::{ffi::OsString, os::unix::process::CommandExt, process::Command};

use clap::Args;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use super::CliError;

/// Run a program that ends when this process's parent does
#[derive(Args, Debug)]
pub(super) struct TetherArgs {
    /// The parent's process id
    parent: i32,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    program: Vec<OsString>,
}

pub(super) fn run(args: &TetherArgs) -> Result<(), CliError> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| CliError::Failed(format!("cannot tie this process: {error}")))?;
    // The parent may have gone before the signal was asked for.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(args.parent) {
        return Err(CliError::Failed("the parent is gone already".to_owned()));
    }
    let (program, rest) = (&args.program[0], &args.program[1..]);
    // The signal outlives exec, which returns only when it fails.
    let error = Command::new(program).args(rest).exec();
    Err(CliError::Failed(format!(
        "cannot run {}: {error}",
        program.display()
    )))
}
