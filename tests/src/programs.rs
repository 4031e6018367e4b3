//! Where the real programs are, and how a test runs them: never one longer than the test.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// The path of a program of this workspace, built in the same profile as the running test.
///
/// # Errors
/// When it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let test = env::current_exe().context("where is this test?")?;
    // target/<profile>/deps/<test>, or target/<profile>/<program>.
    for folder in test.ancestors().skip(1).take(2) {
        let candidate = folder.join(name);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "{name} is not built beside {}: run `make test`, or `cargo build --workspace --bins` first",
        test.display()
    )
}

/// A running program. Killed when dropped.
#[derive(Debug)]
pub struct Program {
    child: Child,
    /// Closed when the program is dropped, which well-behaved ones take as the end.
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

    /// Starts a program and waits until it prints a line, which says that it is ready. Returns the line.
    ///
    /// # Errors
    /// When it ends without a line.
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

    /// Starts a program that is spoken to by lines: returns what it prints.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_talking(command: &mut Command) -> Result<(Self, BufReader<ChildStdout>)> {
        let mut program = Self::start(command.stdout(Stdio::piped()))?;
        let stdout = program.child.stdout.take().context("no standard output")?;
        Ok((program, BufReader::new(stdout)))
    }

    /// Says a line to it.
    ///
    /// # Errors
    /// When it is gone.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its input is closed")?;
        Ok(writeln!(stdin, "{line}")?)
    }

    /// Closes its input, and waits until it has ended by itself.
    ///
    /// # Errors
    /// When it ends with another status than 0.
    pub fn finish(&mut self) -> Result<()> {
        self.stdin = None;
        let status = self.child.wait()?;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }

    /// Whether it has ended, by itself or not.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGKILL, and waits until the kernel has taken the process apart.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        // One that is gone already is as good as killed.
        let _ = self.child.kill();
        self.child.wait()?;
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(pid.context("no such pid")?, signal)?)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!(%error, "a program was left behind");
        }
    }
}
