//! Finds and runs the real programs. No program runs longer than its test.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

/// The path of a program of this workspace, built in the same profile as the running test.
///
/// # Errors
/// When it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let test = env::current_exe().context("where is this test?")?;
    // This test is target/<profile>/deps/<test>; the program is target/<profile>/<program>.
    for folder in test.ancestors().skip(1).take(2) {
        let candidate = folder.join(name);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "{name} is not built beside {}: run `make test`, or `cargo build --workspace --all-targets` first",
        test.display()
    )
}

/// `swiftcache` as a user runs it in a directory, where it also keeps its temporary files.
///
/// # Errors
/// When it has not been built.
pub fn swiftcache_in(directory: &Path, args: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("swiftcache")?);
    command
        .args(args)
        .current_dir(directory)
        .env("TMPDIR", directory)
        .env("XDG_RUNTIME_DIR", directory)
        .env_remove("SWIFTCACHE_SOCKET");
    Ok(command)
}

/// A running program. Drop kills it.
#[derive(Debug)]
pub struct Program {
    child: Child,
    /// The program's input. A well-behaved program exits when it is closed.
    stdin: Option<ChildStdin>,
}

impl Program {
    /// Starts a program.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let stdin = child.stdin.take();
        Ok(Self { child, stdin })
    }

    /// Starts a program, and waits until it prints a line to say that it is ready. Returns the line.
    ///
    /// # Errors
    /// When the program ends without a line.
    pub fn start_ready(command: &mut Command) -> Result<(Self, String)> {
        let mut program = Self::start(command.stdout(Stdio::piped()))?;
        let stdout = program.child.stdout.take().context("no standard output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.is_empty() {
            bail!("{command:?} ended before it was ready");
        }
        Ok((program, line.trim_end().to_owned()))
    }

    /// Starts a program that reads and prints lines. Returns its output too.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_talking(command: &mut Command) -> Result<(Self, BufReader<ChildStdout>)> {
        let mut program = Self::start(command.stdout(Stdio::piped()))?;
        let stdout = program.child.stdout.take().context("no standard output")?;
        Ok((program, BufReader::new(stdout)))
    }

    /// Writes a line to the program's input.
    ///
    /// # Errors
    /// When the program is gone.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its input is closed")?;
        Ok(writeln!(stdin, "{line}")?)
    }

    /// Closes the program's input, and waits until the program has exited.
    ///
    /// # Errors
    /// When its exit status is not 0.
    pub fn finish(&mut self) -> Result<()> {
        self.stdin = None;
        let status = self.child.wait()?;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }

    /// Whether the program has ended, in whatever way.
    ///
    /// # Errors
    /// When the operating system does not say.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGKILL, and waits until the process is gone.
    ///
    /// # Errors
    /// When waiting fails.
    pub fn kill(&mut self) -> Result<()> {
        // This only fails when the process is already gone.
        let _ = self.child.kill();
        self.child.wait()?;
        Ok(())
    }

    /// Sends a signal. When it returns from SIGSTOP, all threads have stopped: until then, on a busy machine, they go on.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("no such pid")?;
        kill_process(pid, signal)?;
        if signal == Signal::STOP {
            waitid(
                WaitId::Pid(pid),
                WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT,
            )?;
        }
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!(%error, "a program was left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_stopped_has_stopped() -> Result<()> {
        let busy = Program::start(Command::new("sh").args(["-c", "while :; do :; done"]))?;
        for _ in 0..100 {
            busy.signal(Signal::STOP)?;
            let stat = fs::read_to_string(format!("/proc/{}/stat", busy.pid()))?;
            let state = stat.rsplit_once(") ").context("no state")?.1;
            ensure!(state.starts_with('T'), "{stat}");
            // It is no different for one that has stopped already.
            busy.signal(Signal::STOP)?;
            busy.signal(Signal::CONT)?;
        }
        Ok(())
    }
}
