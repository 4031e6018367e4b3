//! A broker, `swiftcache donate` and a borrower, each a process of its own, on CUDA devices: blocks go to a donor's HBM
//! and come back, every byte is checked, and the donor gets all of it back.

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
    node::{Node, Setup},
    programs::{Program, program},
};

/// Slabs of the donor: room for every block of the job.
pub const SLABS: u64 = 20;
/// Operations at random, stores and fetches.
const MIXED: u64 = 200;

/// What went through a full stack.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Blocks written to the donor.
    pub stored: u64,
    /// Blocks read back from it, every byte right.
    pub served: u64,
    /// From asking the donor to leave until it was gone, everything its own again.
    pub gave_back: Duration,
}

/// Runs one: `devices` are the numbers of the donor's and of the borrower's, `handle` is how `swiftcache donate` calls
/// the kind of handle.
///
/// # Errors
/// When a process does not come up, a block is lost, a byte is wrong, or the donor does not get everything back.
pub fn run(setup: Setup, devices: (usize, usize), handle: &str) -> Result<Outcome> {
    let node = Node::start_with(setup)?;
    let mut donor = donate(&node, devices.0, handle)?;
    offered(&node, &mut donor)?;
    let job = Job {
        slabs: SLABS,
        host_blocks: 0,
        ..Job::new("borrower", 1)
    };
    let mut borrower = BorrowerProcess::start(&node, devices.1, &job)?;
    borrower.run(&format!("reserve {SLABS}"))?;
    let stored = borrower.run("sweep-store")?.stored;
    let fetched = borrower.run("sweep-fetch")?;
    ensure!(stored > 0, "nothing was stored");
    ensure!(
        fetched.found == stored && fetched.served == stored,
        "{stored} blocks were stored, {fetched:?}"
    );
    borrower.run(&format!("mix {MIXED}"))?;
    // The donor leaves while the borrower has everything mapped, and is told when that is over.
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

/// How `swiftcache donate` calls a kind of handle, if it offers it.
pub fn handle_name(kind: HandleKind) -> Option<&'static str> {
    match kind {
        HandleKind::CudaIpc => Some("cuda-ipc"),
        HandleKind::PosixFd => Some("posix-fd"),
        HandleKind::Fabric => None,
    }
}

/// Waits until the broker knows all that a donor of [`donate`] offers.
///
/// # Errors
/// When the donor ends early, or nothing comes.
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

/// Starts `swiftcache donate` with [`SLABS`] slabs of a device, by the kind of handle that it calls `handle`.
///
/// # Errors
/// When it cannot be started.
pub fn donate(node: &Node, device: usize, handle: &str) -> Result<Program> {
    let mut command = Command::new(program("swiftcache")?);
    command
        .envs(node.environment())
        .args(["donate", "--device", node.device(device).as_str()])
        .args(["--bytes", &(SLABS * SLAB_BYTES).to_string()])
        .args(["--slab", &SLAB_BYTES.to_string()])
        .args(["--leave-within", &format!("{}s", PATIENCE.as_secs())])
        .args(["--handle", handle, "--drain", "2s", "--socket"])
        .arg(node.socket());
    Program::start(&mut command)
}
