//! Borrower and donor processes that a test drives and can kill.

use std::{
    fs,
    io::BufRead,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use swiftcache_client::donor::{Donor, DonorConfig};
use swiftcache_proto::domain::DeviceUuid;

use crate::{
    PATIENCE,
    engine::{self, SLAB_BYTES, eventually},
    node::{Node, Sight},
    operator::Operator,
    programs::{Program, program},
};

/// A donor of this process that offers `slabs` slabs of a device.
///
/// # Errors
/// When the broker does not accept its offer.
pub fn donor(node: &Node, device: usize, slabs: u64) -> Result<Donor> {
    let config = DonorConfig {
        device: node.device(device),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    ensure!(donor.grow(slabs * SLAB_BYTES)? == slabs * SLAB_BYTES);
    Ok(donor)
}

/// Starts a process that offers `slabs` slabs of a device.
///
/// # Errors
/// When it cannot be started, or the broker does not accept its offer.
pub fn donor_process(node: &Node, device: usize, slabs: u64) -> Result<Program> {
    let mut command = Command::new(program("swiftcache-test-donor")?);
    command
        .envs(node.environment())
        .arg("--socket")
        .arg(node.socket())
        .arg("--topology")
        .arg(node.topology_file())
        .args(["--device", node.device(device).as_str()])
        .args(["--slab-bytes", &SLAB_BYTES.to_string()])
        .args(["--slabs", &slabs.to_string()]);
    Ok(Program::start_ready(&mut command)?.0)
}

/// Starts `swiftcache donate` with `slabs` slabs of host memory and these arguments, and waits until they are on offer beside what is.
///
/// # Errors
/// When it cannot be started, or ends.
pub fn host_donor(node: &Node, slabs: u64, more: &[&str]) -> Result<Program> {
    let offered = || Ok::<_, anyhow::Error>(Operator::of(node)?.account()?.offered_bytes);
    let before = offered()?;
    let mut command = Command::new(program("swiftcache")?);
    command
        .args(["donate", "--device", DeviceUuid::of_host(0).as_str()])
        .args(["--bytes", &(slabs * SLAB_BYTES).to_string()])
        .args(["--slab", &SLAB_BYTES.to_string(), "--socket"])
        .arg(node.socket())
        .args(more);
    let mut donor = Program::start(&mut command)?;
    eventually("host memory on offer", || {
        ensure!(!donor.has_ended()?, "swiftcache donate ended early");
        Ok(offered()? == before + slabs * SLAB_BYTES)
    })?;
    Ok(donor)
}

/// `swiftcache donate` with up to `bytes` bytes of a disk, in `dir`, and four slabs of memory for what comes back.
///
/// # Errors
/// When the program is not there.
pub fn disk_command(node: &Node, dir: &Path, bytes: u64) -> Result<Command> {
    let mut command = Command::new(program("swiftcache")?);
    command
        .args(["donate", "--device", "DISK-0", "--path"])
        .arg(dir)
        .arg("--socket")
        .arg(node.socket())
        .args(["--bytes", &bytes.to_string()])
        .args(["--memory", &(4 * SLAB_BYTES).to_string()]);
    Ok(command)
}

/// Starts a disk's agent, and waits until the broker knows the disk.
///
/// # Errors
/// When it cannot be started, or ends.
pub fn disk_agent(node: &Node, mut command: Command) -> Result<Program> {
    let mut agent = Program::start_ready(&mut command)?.0;
    let operator = Operator::of(node)?;
    eventually("the broker to know the disk", || {
        ensure!(!agent.has_ended()?, "the disk's agent ended");
        let state = operator.disk()?.and_then(|disk| disk.state);
        Ok(state.is_some_and(|state| state.bytes > 0))
    })?;
    Ok(agent)
}

/// The task of a borrower process.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its name.
    pub name: String,
    /// Its tenant's label.
    pub tenant: String,
    /// Its namespace: blocks of one namespace are interchangeable.
    pub namespace: String,
    /// The most slabs it leases.
    pub slabs: u64,
    /// Blocks of its host tier.
    pub host_blocks: u64,
    /// Sequences it stores and fetches.
    pub conversations: u32,
    /// The seed of its random operations.
    pub seed: u64,
    /// Its log filter.
    pub log: String,
    /// The file that it logs to. None: the test's own standard error.
    pub log_file: Option<PathBuf>,
}

impl Job {
    /// A job with a few slabs, more sequences than fit into them, and a small host tier.
    #[must_use]
    pub fn new(name: &str, seed: u64) -> Self {
        Self {
            name: name.to_owned(),
            tenant: String::new(),
            namespace: engine::NAMESPACE.to_owned(),
            slabs: 4,
            host_blocks: 16,
            conversations: 12,
            seed,
            log: "error".to_owned(),
            log_file: None,
        }
    }
}

/// A borrower process's report about its work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Operations done.
    pub operations: u64,
    /// Blocks written to donors or the host tier.
    pub stored: u64,
    /// Blocks that lookups found.
    pub found: u64,
    /// How many of them were loaded. All their bytes were right.
    pub served: u64,
    /// Commands done.
    pub done: u64,
}

impl Report {
    /// Reads a line from the process.
    ///
    /// # Errors
    /// When it is not a report. Then the line is a complaint.
    pub fn read(line: &str) -> Result<Self> {
        let numbers: Vec<u64> = (line.strip_prefix("report "))
            .with_context(|| line.to_owned())?
            .split(' ')
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [operations, stored, found, served, done] = numbers[..] else {
            bail!("not a report: {line}");
        };
        Ok(Self {
            operations,
            stored,
            found,
            served,
            done,
        })
    }

    /// The line of this report.
    #[must_use]
    pub fn line(&self) -> String {
        let Self {
            operations,
            stored,
            found,
            served,
            done,
        } = self;
        format!("report {operations} {stored} {found} {served} {done}")
    }
}

#[derive(Debug, Default)]
struct Heard {
    report: Report,
    complaint: Option<String>,
    ended: bool,
}

/// A borrower process. It stores and fetches at random, and checks every byte.
#[derive(Debug)]
pub struct BorrowerProcess {
    program: Program,
    heard: Arc<(std::sync::Mutex<Heard>, std::sync::Condvar)>,
    said: u64,
}

impl BorrowerProcess {
    /// Starts a borrower on a device of the node.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(node: &Node, device: usize, job: &Job) -> Result<Self> {
        Self::start_seeing(node, device, job, &Sight::All)
    }

    /// Starts a borrower that enumerates these GPUs.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_seeing(node: &Node, device: usize, job: &Job, sight: &Sight) -> Result<Self> {
        let mut command = Command::new(program("swiftcache-test-borrower")?);
        command
            .envs(node.environment())
            .envs(sight.environment())
            .env("RUST_LOG", &job.log)
            .arg("--socket")
            .arg(node.socket())
            .args(["--device", node.device(device).as_str()])
            .args(["--name", &job.name])
            .args(["--tenant", &job.tenant])
            .args(["--namespace", &job.namespace])
            .args(["--slabs", &job.slabs.to_string()])
            .args(["--host-blocks", &job.host_blocks.to_string()])
            .args(["--conversations", &job.conversations.to_string()])
            .args(["--seed", &job.seed.to_string()]);
        node.name_topology(&mut command);
        if let Some(file) = &job.log_file {
            command.stderr(fs::File::options().create(true).append(true).open(file)?);
        }
        let (program, lines) = Program::start_talking(&mut command)?;
        let heard = Arc::new((std::sync::Mutex::default(), std::sync::Condvar::new()));
        let hears = Arc::clone(&heard);
        thread::spawn(move || listen(lines, &hears));
        Ok(Self {
            program,
            heard,
            said: 0,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// Gives it a command: `mix N`, `store N`, `fetch N`, `sweep-store`, `sweep-fetch`, `reserve SLABS` or `pause`. It
    /// stops the command that it is working on.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        self.said += 1;
        let said = self.program.say(command);
        said.map_err(|error| match self.complaint() {
            Some(complaint) => error.context(complaint),
            None => error,
        })
    }

    /// Gives it a command and waits until it is done. Returns what it did for this command.
    ///
    /// # Errors
    /// When it complains, ends, or does not go on.
    pub fn run(&mut self, command: &str) -> Result<Report> {
        // Its present work must not count.
        self.tell("pause")?;
        let said = self.said;
        let before = self.wait("to pause", |report| report.done >= said)?;
        self.tell(command)?;
        let said = self.said;
        let after = self.wait(command, |report| report.done >= said)?;
        Ok(Report {
            operations: after.operations - before.operations,
            stored: after.stored - before.stored,
            found: after.found - before.found,
            served: after.served - before.served,
            done: after.done,
        })
    }

    /// Waits until it has done `more` more operations.
    ///
    /// # Errors
    /// When it complains, ends, or does not go on.
    pub fn advance(&self, more: u64) -> Result<Report> {
        let target = self.report()?.operations + more;
        self.wait("operations", |report| report.operations >= target)
    }

    /// Its last report.
    ///
    /// # Errors
    /// When it complains or has ended.
    pub fn report(&self) -> Result<Report> {
        self.wait("nothing", |_| true)
    }

    /// Its complaint, if it has one.
    pub fn complaint(&self) -> Option<String> {
        let heard = self
            .heard
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        heard.complaint.clone()
    }

    fn wait(&self, what: &str, holds: impl Fn(&Report) -> bool) -> Result<Report> {
        let deadline = Instant::now() + PATIENCE;
        let (lock, changed) = &*self.heard;
        let mut heard = lock
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        loop {
            if let Some(complaint) = &heard.complaint {
                bail!("process {}: {complaint}", self.pid());
            }
            if holds(&heard.report) {
                return Ok(heard.report.clone());
            }
            ensure!(!heard.ended, "process {} ended by itself", self.pid());
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "waited in vain for {what}: {:?}",
                heard.report
            );
            heard = changed
                .wait_timeout(heard, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.program.signal(signal)
    }

    /// Sends SIGKILL, after checking that nothing went wrong before.
    ///
    /// # Errors
    /// When it complained before.
    pub fn kill(mut self) -> Result<Report> {
        let report = self.report()?;
        self.program.kill()?;
        Ok(report)
    }

    /// Closes its input, so that it exits in good order, and waits for that.
    ///
    /// # Errors
    /// When it complains.
    pub fn finish(mut self) -> Result<Report> {
        let ended = self.program.finish();
        let heard = self
            .heard
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(complaint) = &heard.complaint {
            bail!("{complaint}");
        }
        ended.map(|()| heard.report.clone())
    }
}

fn listen(lines: impl BufRead, heard: &(std::sync::Mutex<Heard>, std::sync::Condvar)) {
    let (lock, changed) = heard;
    for line in lines.lines() {
        let read = line
            .map_err(anyhow::Error::from)
            .and_then(|line| Report::read(&line));
        let mut heard = lock
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match read {
            Ok(report) => heard.report = report,
            Err(error) => heard.complaint = Some(error.to_string()),
        }
        changed.notify_all();
    }
    lock.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .ended = true;
    changed.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_a_complaint_is_not_one() {
        let report = Report {
            operations: 1,
            stored: 2,
            found: 3,
            served: 4,
            done: 5,
        };
        assert_eq!(Report::read(&report.line()).unwrap(), report);
        let complaint = Report::read("wrong bytes").unwrap_err();
        assert_eq!(complaint.to_string(), "wrong bytes");
    }
}
