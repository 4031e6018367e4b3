//! `swiftcache tether`: runs a program that the kernel kills when its parent is gone. A replay starts its children like
//! this, so that it leaves no broker or donor behind, not even after a crash or a SIGKILL.

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
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| {
        CliError::Failed(format!("cannot tie this process to its parent: {error}"))
    })?;
    // The parent may have exited before the signal was set.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(args.parent) {
        return Err(CliError::Failed("the parent is already gone".to_owned()));
    }
    let (program, rest) = (&args.program[0], &args.program[1..]);
    // The setting survives exec. exec returns only when it fails.
    let error = Command::new(program).args(rest).exec();
    Err(CliError::Failed(format!(
        "cannot run {}: {error}",
        program.display()
    )))
}
