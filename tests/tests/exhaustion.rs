//! Processes run out of memory, HBM or descriptors. Such a process refuses requests or dies, and no other notices.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use swiftcache_client::donor::{Donor, DonorConfig};
use swiftcache_proto::convert::MAX_NAME_BYTES;
use swiftcache_tests::{
    census::resident_bytes,
    crew::{BorrowerProcess, Job, donor_process},
    engine::{SLAB_BYTES, eventually},
    node::{Node, Setup},
    operator::Operator,
    programs::{Program, program},
    seed::Course,
};

/// Slots of a slab.
const SLOTS: u64 = 64 << 10;
/// The smallest block that the broker takes, bytes.
const BLOCK: u64 = 64;
/// Bytes of a slab.
const SLAB: u64 = SLOTS * BLOCK;

/// How much more memory than before a broker has at least while answers are unread, bytes.
const BURST: u64 = 8 << 20;

fn pid_of(pid: u32) -> Result<Pid> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.context("no pid")
}

fn limit(pid: u32, resource: Resource, current: Option<u64>) -> Result<Rlimit> {
    let limit = Rlimit {
        current,
        maximum: None,
    };
    // The hard limit stays as it is.
    let before = rustix::process::getrlimit(resource);
    let limit = Rlimit {
        maximum: before.maximum,
        ..limit
    };
    Ok(prlimit(Some(pid_of(pid)?), resource, limit)?)
}

/// Address space of a process, bytes.
fn address_space(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kib = line.context("no VmSize")?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? << 10)
}

#[test]
fn a_broker_out_of_memory_refuses_or_dies_and_forgets_no_lease() -> Result<()> {
    const SLABS: u64 = 64;
    let mut node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    let donor = wire.member("donor", "")?;
    donor.offer([1; 16], "SIM-1", SLABS, SLAB)?;
    let lessee = wire.member("lessee", "")?;
    let grants = lessee.lease("model", "SIM-0", SLABS * SLAB, BLOCK)?.grants;
    ensure!(grants.len() as u64 == SLABS);
    let pid = node.broker()?.pid();
    limit(pid, Resource::As, Some(address_space(pid)? + (8 << 20)))?;
    // Four million blocks have no room in eight megabytes.
    let refused = grants.iter().find_map(|grant| {
        let hash = |slot: u64| {
            let mut hash = [0; 16];
            hash[..8].copy_from_slice(&grant.lease_id.to_le_bytes());
            hash[8..].copy_from_slice(&slot.to_le_bytes());
            hash
        };
        let hashes: Vec<_> = (0..SLOTS).map(hash).collect();
        lessee
            .publish(grant.lease_id, grant.generation, &hashes)
            .err()
    });
    let refused = refused.context("four million blocks found room in 8 MiB")?;
    // The broker may be dead or alive. The next one has enough memory.
    node.kill_broker()?;
    node.start_broker()?;
    eventually("the next broker", || Ok(operator.node().is_ok()))?;
    let held: Vec<_> = grants.iter().map(|grant| grant.lease_id).collect();
    ensure!(
        lessee.resume(&held)?.is_empty(),
        "a lease was forgotten: {refused}"
    );
    ensure!(operator.settled()?.leased_bytes == SLABS * SLAB);
    Ok(())
}

#[test]
fn memory_is_handed_back_after_a_burst() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    // So that a list of events is as long as it gets.
    for _ in 0..500 {
        wire.member(&"n".repeat(MAX_NAME_BYTES), "")?.leave()?;
    }
    let pid = node.broker()?.pid();
    let before = resident_bytes(pid)?;
    let grown = || -> Result<u64> { Ok(resident_bytes(pid)?.saturating_sub(before)) };
    let mut readers = Vec::new();
    for _ in 0..6 {
        let mut command = Command::new(program("swiftcache-bench")?);
        command.args(["--flood", "unread", "--socket"]);
        readers.push(Program::start(command.arg(node.socket()))?);
    }
    // The twin: while answers are unread, the broker has them.
    eventually("answers that nobody reads", || Ok(grown()? > BURST))?;
    for reader in &mut readers {
        ensure!(!reader.has_ended()?, "a reader has ended");
        reader.kill()?;
    }
    let mut left = 0;
    eventually("the memory to be handed back", || {
        left = grown()?;
        Ok(left < BURST / 2)
    })
    .with_context(|| format!("{left} bytes are left of a burst"))?;
    operator.settled()?;
    Ok(())
}

#[test]
fn a_donor_takes_no_more_hbm_than_there_is() -> Result<()> {
    const BIG: u64 = 256 << 20;
    let node = Node::start(&[])?;
    node.neighbour_uses(1, BIG)?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: BIG,
        drain: std::time::Duration::ZERO,
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    ensure!(donor.grow(8 * BIG)? == 3 * BIG, "{:?}", donor.status());
    ensure!(donor.grow(BIG).is_err());
    let operator = Operator::of(&node)?;
    ensure!(operator.settled()?.offered_bytes == 3 * BIG);
    // The refused growth has left nothing half done.
    ensure!(donor.shrink(BIG)? == BIG);
    eventually("it to be back", || Ok(donor.status().returned == 1))?;
    ensure!(donor.grow(BIG)? == BIG);
    Ok(())
}

#[test]
fn a_donor_out_of_descriptors_offers_what_it_could_take() -> Result<()> {
    let node = Node::start(&[])?;
    let path = program("swiftcache-test-donor")?;
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -n 32; exec \"$0\" \"$@\""])
        .arg(path)
        .arg("--socket")
        .arg(node.socket())
        .arg("--topology")
        .arg(node.topology_file())
        .args(["--device", "SIM-1", "--slabs", "100"])
        .args(["--slab-bytes", &SLAB_BYTES.to_string()]);
    let (mut donor, said) = Program::start_ready(&mut command)?;
    let offered: u64 =
        (said.split(' ').nth(1).and_then(|bytes| bytes.parse().ok())).context(said.clone())?;
    ensure!(
        (4 * SLAB_BYTES..100 * SLAB_BYTES).contains(&offered),
        "{said}"
    );
    let operator = Operator::of(&node)?;
    ensure!(operator.settled()?.offered_bytes == offered);
    let mut borrower = BorrowerProcess::start(&node, 0, &Job::new("borrower", 1))?;
    borrower.run("reserve 4")?;
    borrower.run("sweep-store")?;
    ensure!(borrower.run("sweep-fetch")?.served > 0);
    borrower.finish()?;
    donor.finish()?;
    operator.eventually("nothing to be on offer", |account| {
        account.offered_bytes == 0
    })
}

#[test]
fn a_borrower_out_of_descriptors_works_without_new_slabs() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let mut borrower = BorrowerProcess::start(&node, 0, &Job::new("borrower", 2))?;
    borrower.run("mix 10")?;
    // It may open no more descriptors than it has, so it cannot receive the memory of a grant.
    let open = fs::read_dir(format!("/proc/{}/fd", borrower.pid()))?.count() as u64;
    let before = limit(borrower.pid(), Resource::Nofile, Some(open))?;
    let donor = donor_process(&node, 1, 4)?;
    let worked = borrower.run("mix 60")?;
    ensure!(worked.operations == 60);
    limit(borrower.pid(), Resource::Nofile, before.current)?;
    borrower.run("reserve 4")?;
    borrower.run("sweep-store")?;
    ensure!(borrower.run("sweep-fetch")?.served > 0);
    borrower.finish()?;
    operator.eventually("every slab to be free", |account| {
        account.free_bytes == 4 * SLAB_BYTES
    })?;
    drop(donor);
    Ok(())
}

#[test]
fn garbage_to_the_metrics_socket_is_shrugged_off() -> Result<()> {
    let mut course = Course::new("garbage to metrics", 60);
    let directory = tempfile::tempdir()?;
    let options = ["--metrics-listen", "127.0.0.1:0"];
    let node = Node::start_with(Setup {
        options: options.map(str::to_owned).into(),
        log: "info".to_owned(),
        log_file: Some(directory.path().join("log")),
        ..Setup::default()
    })?;
    let address = node.metrics_address()?;
    while course.goes_on() {
        let mut bytes = if course.rng.random_bool(0.5) {
            b"GET /metrics HTTP/1.1\r\n".to_vec()
        } else {
            Vec::new()
        };
        let length = course.rng.random_range(0..4_000);
        bytes.extend((0..length).map(|_| course.rng.random::<u8>()));
        let mut stream = TcpStream::connect(&address)?;
        stream.set_read_timeout(Some(std::time::Duration::from_millis(20)))?;
        // The broker may hang up in the middle.
        let _ = stream.write_all(&bytes);
        let _ = stream.read(&mut [0; 64]);
    }
    // The broker may not have noticed yet that all these connections are closed. Until then it has no room for another.
    let mut answer = Ok(String::new());
    eventually("the metrics", || {
        answer = node.metrics();
        Ok(answer
            .as_ref()
            .is_ok_and(|text| text.starts_with("HTTP/1.1 200") && text.contains("swiftcache_")))
    })
    .with_context(|| format!("{answer:?}"))?;
    Operator::of(&node)?.settled()?;
    Ok(())
}
