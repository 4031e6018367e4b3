//! The full stack on CUDA devices: a broker, `swiftcache donate` and a borrower, in three processes. Blocks go to the
//! donor's HBM and come back, every byte is checked, and the donor gets all of its memory back.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use swiftcache_proto::domain::HandleKind;

use crate::{
    PATIENCE,
    crew::{BorrowerProcess, Job},
    engine::{SLAB_BYTES, eventually},
    node::{Node, Setup, Sight},
    programs::{Program, program},
};

/// Slabs of the donor. They have room for every block of the job.
pub const SLABS: u64 = 20;
/// Random operations: stores and fetches.
const MIXED: u64 = 200;

/// The result of a run.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Blocks written to the donor.
    pub stored: u64,
    /// Blocks read back from the donor. All their bytes were right.
    pub served: u64,
    /// Time from asking the donor to exit until it had exited with all of its memory.
    pub gave_back: Duration,
}

/// The devices of the two processes, by their numbers in the node.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// The donor's device.
    pub donor: usize,
    /// The borrower's device.
    pub borrower: usize,
    /// Each process enumerates its own device and no other.
    pub apart: bool,
}

impl Places {
    /// What a process on `device` enumerates.
    fn sight(&self, node: &Node, device: usize) -> Sight {
        match self.apart {
            true => Sight::of(&node.device(device)),
            false => Sight::All,
        }
    }
}

/// Runs the full stack once. `handle` is the name of the handle kind in `swiftcache donate --handle`.
///
/// # Errors
/// When a process does not start, a block is lost, a byte is wrong, or the donor does not get everything back.
pub fn run(setup: Setup, places: Places, handle: &str) -> Result<Outcome> {
    let node = Node::start_with(setup)?;
    let sight = places.sight(&node, places.donor);
    let mut donor = donate_seeing(&node, places.donor, Some(handle), &sight)?;
    offered(&node, &mut donor)?;
    let job = Job {
        slabs: SLABS,
        host_blocks: 0,
        ..Job::new("borrower", 1)
    };
    let sight = places.sight(&node, places.borrower);
    let mut borrower = BorrowerProcess::start_seeing(&node, places.borrower, &job, &sight)?;
    borrower.run(&format!("reserve {SLABS}"))?;
    let stored = borrower.run("sweep-store")?.stored;
    let fetched = borrower.run("sweep-fetch")?;
    ensure!(stored > 0, "nothing was stored");
    ensure!(
        fetched.found == stored && fetched.served == stored,
        "{stored} blocks were stored, {fetched:?}"
    );
    borrower.run(&format!("mix {MIXED}"))?;
    // The donor is asked to exit while the borrower has all slabs mapped. It exits when the borrower has unmapped them.
    let asked = Instant::now();
    donor.signal(Signal::TERM)?;
    donor.finish().context("the donor")?;
    let gave_back = asked.elapsed();
    let left = borrower.run("sweep-fetch")?;
    ensure!(left.served == 0, "{left:?} of memory that was given back");
    borrower.finish()?;
    Ok(Outcome {
        stored,
        served: fetched.served,
        gave_back,
    })
}

/// The name of a handle kind in `swiftcache donate --handle`, if it has this kind.
pub fn handle_name(kind: HandleKind) -> Option<&'static str> {
    match kind {
        HandleKind::CudaIpc => Some("cuda-ipc"),
        HandleKind::PosixFd => Some("posix-fd"),
        HandleKind::Fabric => None,
    }
}

/// Waits until the broker knows everything that a donor of [`donate`] offers.
///
/// # Errors
/// When the donor ends early, or its offer does not come.
pub fn offered(node: &Node, donor: &mut Program) -> Result<()> {
    eventually("the donor's offer", || {
        ensure!(!donor.has_ended()?, "swiftcache donate ended early");
        let status = Command::new(program("swiftcache")?)
            .args(["status", "--json", "--socket"])
            .arg(node.socket())
            .output()?;
        let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
        Ok(status["total"]["offered"].as_u64() >= Some(SLABS * SLAB_BYTES))
    })
}

/// Starts `swiftcache donate` with [`SLABS`] slabs of a device and the handle kind that it calls `handle`.
///
/// # Errors
/// When it cannot be started.
pub fn donate(node: &Node, device: usize, handle: &str) -> Result<Program> {
    donate_seeing(node, device, Some(handle), &Sight::All)
}

/// As [`donate`], in a process that enumerates these GPUs, and by the default kind of handle where none is named.
///
/// # Errors
/// When it cannot be started.
pub fn donate_seeing(
    node: &Node,
    device: usize,
    handle: Option<&str>,
    sight: &Sight,
) -> Result<Program> {
    let mut command = Command::new(program("swiftcache")?);
    command
        .envs(node.environment())
        .envs(sight.environment())
        .args(["donate", "--device", node.device(device).as_str()])
        .args(["--bytes", &(SLABS * SLAB_BYTES).to_string()])
        .args(["--slab", &SLAB_BYTES.to_string()])
        .args(["--leave-within", &format!("{}s", PATIENCE.as_secs())])
        .args(["--drain", "2s", "--socket"])
        .arg(node.socket());
    if let Some(handle) = handle {
        command.args(["--handle", handle]);
    }
    Program::start(&mut command)
}
