//! A slab belongs to every process that may still access it. A borrower that is stopped, does not listen or lies keeps
//! its slab, also across a restart of the broker, until it acknowledges or the kernel says that it is gone.

use std::{fs, os::unix::fs::FileExt, time::Duration};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use swiftcache_client::donor::{Donor, DonorConfig};
use swiftcache_proto::v1::{self, LeaseState};
use swiftcache_tests::{
    PATIENCE, census,
    crew::{BorrowerProcess, Job},
    engine::{self, BLOCK_BYTES, Engine, SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    wire::{Member, Wire},
};
use tonic::Code;

/// The namespace of the test engines.
const NAMESPACE: &str = "an engine under test";
const BORROWERS_DEVICE: &str = "SIM-0";
const DONORS_DEVICE: &str = "SIM-1";

fn node() -> Result<Node> {
    Node::start(&["--pin-ms", "100", "--drain-ms", "100"])
}

fn donor(node: &Node, slabs: u64) -> Result<Donor> {
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: Duration::from_millis(100),
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    ensure!(donor.grow(slabs * SLAB_BYTES)? == slabs * SLAB_BYTES);
    Ok(donor)
}

fn engine(node: &Node, slabs: u64) -> Result<Engine> {
    let config = engine::config(node.device(0), slabs);
    Engine::new(Some(node.session("engine")?), node.layer()?, config)
}

/// A lessee that the test plays and that ignores revocations, with its leases and their memory.
struct Deaf {
    member: Member,
    grants: Vec<v1::Grant>,
    memory: Vec<fs::File>,
}

impl Deaf {
    fn new(node: &Node, slabs: u64) -> Result<Self> {
        let member = Wire::new(&node.socket())?.member("deaf", "")?;
        let bytes = slabs * SLAB_BYTES;
        let leased = member.lease(NAMESPACE, BORROWERS_DEVICE, bytes, BLOCK_BYTES)?;
        let grants = leased.grants;
        ensure!(grants.len() as u64 == slabs);
        let memory = grants
            .iter()
            .map(|grant| member.open(grant))
            .collect::<Result<_>>()?;
        Ok(Self {
            member,
            grants,
            memory,
        })
    }

    /// Writes to all of its slabs, as if they had never been revoked.
    fn scribble(&self) -> Result<()> {
        for (grant, memory) in self.grants.iter().zip(&self.memory) {
            memory.write_all_at(&vec![0xd5; SLAB_BYTES as usize], grant.offset)?;
        }
        Ok(())
    }
}

fn sequence(conversation: u32) -> Vec<u32> {
    (0..16).map(|n| conversation * 1_000 + n).collect()
}

#[test]
fn a_stopped_borrower_keeps_its_slabs_across_a_broker_restart() -> Result<()> {
    for dies in [false, true] {
        let mut node = node()?;
        let operator = Operator::of(&node)?;
        let donor = donor(&node, 3)?;
        let mut job = Job::new("stopped", 1);
        job.slabs = 3;
        let mut stopped = BorrowerProcess::start(&node, 0, &job)?;
        stopped.run("reserve 3")?;
        stopped.tell("mix 1000000000")?;
        // Stop it in the middle of its work.
        stopped.advance(20)?;
        stopped.signal(Signal::STOP)?;
        donor.shrink(2 * SLAB_BYTES)?;
        let held = |account: &v1::Account| account.zombie_bytes == 2 * SLAB_BYTES;
        operator.eventually("two zombies", held)?;

        node.kill_broker()?;
        node.start_broker()?;
        operator.eventually("two zombies after the restart", held)?;
        // None of the three slabs can be leased, not even the third, which no donor wants back, because their lessee
        // cannot answer.
        let other = engine(&node, 3)?;
        eventually("the donor to be back", || {
            Ok(operator
                .sessions()?
                .iter()
                .filter(|session| session.attached)
                .count()
                == 2)
        })?;
        ensure!(
            other.borrower.reserve(3 * SLAB_BYTES) == 0,
            "a slab was lent twice"
        );
        let leases = operator.leases()?;
        ensure!(
            leases
                .iter()
                .all(|lease| lease.borrower_pid == stopped.pid()),
            "{leases:?}"
        );
        ensure!(donor.status().returned == 0);
        // Meanwhile, other slabs are lent.
        ensure!(donor.grow(SLAB_BYTES)? == SLAB_BYTES);
        other.reserve(1)?;
        ensure!(other.store(&sequence(90))?.stored == 16);

        if dies {
            stopped.kill()?;
        } else {
            stopped.signal(Signal::CONT)?;
            stopped.advance(50)?;
        }
        ensure!(donor.wait_returned(PATIENCE), "two slabs never came back");
        ensure!(operator.account()?.zombie_bytes == 0);
        ensure!(other.fetch(&sequence(90))?.served == 16);
    }
    Ok(())
}

/// A lessee that ignores revocations writes to its slab after a restart of the broker. Returns what another engine then
/// reads from its own blocks. With `lose_the_lease`, the ledger loses the lease before the restart.
fn scribble_after_restart(lose_the_lease: bool) -> Result<Result<engine::Fetched>> {
    let mut node = node()?;
    let _donor = donor(&node, 1)?;
    let deaf = Deaf::new(&node, 1)?;
    node.kill_broker()?;
    if lose_the_lease {
        let path = node.directory().join("ledger");
        let lines = fs::read_to_string(&path)?;
        let kept: Vec<_> = lines
            .lines()
            .filter(|line| !line.contains("\"record\":\"lease\""))
            .collect();
        ensure!(
            kept.len() + 1 == lines.lines().count(),
            "the ledger names no lease: {lines}"
        );
        fs::write(&path, kept.join("\n") + "\n")?;
    }
    node.start_broker()?;
    let other = engine(&node, 1)?;
    if lose_the_lease {
        other.reserve(1)?;
    } else {
        let operator = Operator::of(&node)?;
        eventually("everyone to be back", || {
            Ok(operator
                .sessions()?
                .iter()
                .filter(|session| session.attached)
                .count()
                == 2)
        })?;
        ensure!(other.borrower.reserve(SLAB_BYTES) == 0);
    }
    other.store(&sequence(1))?;
    deaf.scribble()?;
    Ok(other.fetch(&sequence(1)))
}

#[test]
fn the_ledger_keeps_a_writer_out_of_others_blocks() -> Result<()> {
    let fetched = scribble_after_restart(false)??;
    ensure!(fetched.served == 0, "it had no slab: {fetched:?}");
    // Its twin: without the lease in the ledger, the writer damages the other engine's blocks, and that is noticed.
    let error = scribble_after_restart(true)?
        .err()
        .context("nobody noticed")?;
    ensure!(error.to_string().contains("wrong bytes served"), "{error}");
    Ok(())
}

#[test]
fn one_who_never_acknowledges_holds_back_its_own_slab_and_no_other() -> Result<()> {
    let node = node()?;
    let operator = Operator::of(&node)?;
    let donor = donor(&node, 4)?;
    let deaf = Deaf::new(&node, 1)?;
    let _stream = deaf.member.attach()?;
    let engine = engine(&node, 3)?;
    engine.reserve(3)?;
    ensure!(donor.shrink(4 * SLAB_BYTES)? == 4 * SLAB_BYTES);
    eventually("three slabs", || Ok(donor.status().returned == 3))?;
    operator.eventually("one zombie and nothing else", |account| {
        account.offered_bytes == SLAB_BYTES && account.zombie_bytes == SLAB_BYTES
    })?;
    let leases = operator.leases()?;
    ensure!(leases[0].state() == LeaseState::Zombie);
    ensure!(
        leases[0].waiting_for_pids == [std::process::id()],
        "{leases:?}"
    );
    ensure!(
        operator
            .events()?
            .iter()
            .any(|event| event.kind == "zombie")
    );
    // It goes on writing to the slab, as it may, because it has not acknowledged.
    deaf.scribble()?;
    deaf.member.leave()?;
    ensure!(donor.wait_returned(PATIENCE));
    ensure!(operator.account()?.offered_bytes == 0);
    Ok(())
}

#[test]
fn only_the_right_word_from_the_right_session_frees_a_slab() -> Result<()> {
    let node = node()?;
    let operator = Operator::of(&node)?;
    let donor = donor(&node, 1)?;
    let deaf = Deaf::new(&node, 1)?;
    let mut stream = deaf.member.attach()?;
    let stranger = deaf.member.wire.member("stranger", "")?;
    let strangers_stream = stranger.attach()?;
    donor.shrink(SLAB_BYTES)?;
    let revoke = stream.revocation()?;
    let (lease, generation) = (revoke.lease_id, revoke.generation);
    operator.eventually("a zombie", |account| account.zombie_bytes == SLAB_BYTES)?;
    let acknowledgements = || {
        Ok::<_, anyhow::Error>(
            operator
                .node()?
                .counters
                .unwrap_or_default()
                .acknowledgements,
        )
    };
    let before = acknowledgements()?;
    for (lease, generation) in [
        (lease, generation - 1),
        (lease, generation + 1),
        (lease + 1, generation),
        (0, 0),
    ] {
        stream.acknowledge(lease, generation)?;
        strangers_stream.acknowledge(lease, generation)?;
    }
    strangers_stream.acknowledge(lease, generation)?;
    // The broker reads a stream in order. When it has handled this message, it has handled those before it.
    let pin = v1::session_request::Message::Unpin(v1::Unpin::default());
    stream.say(pin.clone())?;
    let _ = strangers_stream.say(pin);
    let refused = stranger.publish(lease, generation, &[[1; 16]]).err();
    ensure!(refused.context("published into another's lease")?.code() == Code::PermissionDenied);
    ensure!(
        operator.account()?.zombie_bytes == SLAB_BYTES,
        "a slab was freed by a lie"
    );
    ensure!(acknowledgements()? == before);
    ensure!(donor.status().returned == 0);

    stream.acknowledge(lease, generation)?;
    ensure!(donor.wait_returned(PATIENCE));
    // A process that lies about having let go can only harm its own uid. At least it can no longer use the lease by
    // RPCs.
    deaf.scribble()?;
    let refused = deaf.member.publish(lease, generation, &[[1; 16]]).err();
    ensure!(refused.context("published into a lease it gave up")?.code() == Code::NotFound);
    ensure!(
        deaf.member.open(&deaf.grants[0]).is_err(),
        "its token was good twice"
    );
    Ok(())
}

/// The test plays a donor that overwrites its memory: with `early` while it is lent, otherwise when it is returned.
/// Returns the complaint of the borrower.
fn overwrite(early: bool) -> Result<Option<String>> {
    let node = Node::start(&["--pin-ms", "100", "--drain-ms", "5000"])?;
    let donor = Wire::new(&node.socket())?.member("donor", "")?;
    let mut stream = donor.attach()?;
    let mut borrower = BorrowerProcess::start(&node, 0, &Job::new("borrower", 5))?;
    for round in 0..24 {
        let ids: Vec<[u8; 16]> = (0..4)
            .map(|n| {
                let mut id = [n; 16];
                id[0] = round;
                id
            })
            .collect();
        let memory = ids
            .iter()
            .map(|id| donor.offer(*id, DONORS_DEVICE, 1, SLAB_BYTES))
            .collect::<Result<Vec<_>>>()?;
        let told = borrower
            .run("reserve 4")
            .and_then(|_| borrower.run("sweep-store"));
        let told = told.and_then(|_| borrower.tell("mix 1000000000"));
        if let (Err(error), None) = (told, borrower.complaint()) {
            return Err(error);
        }
        if early {
            for memory in &memory {
                memory.write_all_at(&vec![0xd0; SLAB_BYTES as usize], 0)?;
            }
            eventually("the borrower to notice", || {
                Ok(borrower.complaint().is_some())
            })?;
            return Ok(borrower.complaint());
        }
        borrower.advance(5)?;
        donor.withdraw(&ids, 5_000)?;
        for _ in &ids {
            let region = stream.returned()?;
            let n = ids
                .iter()
                .position(|id| id[..] == region[..])
                .context("whose region?")?;
            let inode = census::inode(&memory[n])?;
            // This is the promise: no process can access the returned memory, so its bytes are the donor's own.
            ensure!(
                !census::mapped(borrower.pid())?.contains(&inode),
                "still mapped"
            );
            memory[n].write_all_at(&vec![0xd0; SLAB_BYTES as usize], 0)?;
        }
    }
    let report = borrower.run("mix 50")?;
    ensure!(report.operations == 50);
    borrower.finish()?;
    Ok(None)
}

#[test]
fn a_returned_region_is_the_donors_own() -> Result<()> {
    ensure!(overwrite(false)?.is_none());
    let complaint = overwrite(true)?.context("nobody noticed")?;
    ensure!(complaint.contains("wrong bytes served"), "{complaint}");
    Ok(())
}

#[test]
fn a_donor_that_dies_leaves_its_borrower_a_sound_mapping() -> Result<()> {
    let node = node()?;
    let operator = Operator::of(&node)?;
    let mut borrower = BorrowerProcess::start(&node, 0, &Job::new("borrower", 6))?;
    for _ in 0..4 {
        let mut donor = swiftcache_tests::crew::donor_process(&node, 1, 4)?;
        borrower.run("reserve 4")?;
        borrower.tell("mix 1000000000")?;
        borrower.advance(10)?;
        donor.kill()?;
        // The borrower goes on reading and writing until its leases are revoked. No signal ends it.
        borrower.advance(10)?;
        operator.eventually("nothing to be on offer", |account| {
            account.offered_bytes == 0
        })?;
        ensure!(operator.leases()?.is_empty());
    }
    borrower.run("mix 20")?;
    ensure!(census::mapped(borrower.pid())?.is_empty());
    borrower.finish()?;
    Ok(())
}
