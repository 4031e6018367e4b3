//! Every party is killed, in turn and at random, while the others work. There is no wrong byte, no failed request, no
//! lost byte of HBM, and nothing is left behind.

use std::{
    fs,
    os::unix::{fs::FileExt, net::UnixStream},
    path::PathBuf,
};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rustix::process::Signal;
use swiftcache_tests::{
    census::{self, Census},
    crew::{BorrowerProcess, Crew, FOREVER, Job, PARTIES, Party, SLABS, donor_process},
    engine::{SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    seed::Course,
};

#[test]
fn each_party_is_killed_in_turn_and_nobody_else_notices() -> Result<()> {
    let mut course = Course::new("killed in turn", 3);
    let mut crew = Crew::start(course.seed)?;
    while course.goes_on() {
        for n in 0..2 {
            for party in [Party::Borrower(n), Party::Donor(n), Party::Broker] {
                crew.advance(30, None)?;
                crew.replace(party, 20)?;
            }
        }
    }
    crew.finish()
}

#[test]
fn parties_are_killed_and_stopped_at_random_and_no_byte_is_wrong() -> Result<()> {
    let mut course = Course::new("killed and stopped at random", 100);
    let mut crew = Crew::start(course.seed)?;
    while course.goes_on() {
        crew.advance(course.rng.random_range(1..40), None)?;
        let party = PARTIES[course.rng.random_range(0..PARTIES.len())];
        let away = course.rng.random_range(0..10);
        // A stopped party stops in the middle of its work, and learns late what happened meanwhile.
        let stopped = course.rng.random_bool(0.4);
        if stopped {
            crew.signal(party, Signal::STOP)?;
            crew.advance(away, Some(party))?;
        }
        if !stopped || course.rng.random_bool(0.3) {
            crew.replace(party, away)?;
        } else {
            crew.signal(party, Signal::CONT)?;
        }
        // Now and then, because the next kill would hide who has not come back.
        if course.rng.random_bool(0.1) {
            crew.all_attached()?;
        }
    }
    crew.finish()
}

/// The twin: the tests above would find what they leave behind.
#[test]
fn what_is_left_behind_is_found() -> Result<()> {
    let mut crew = Crew::start(11)?;
    for borrower in std::mem::take(&mut crew.borrowers) {
        borrower.kill()?;
    }
    crew.nothing_left_behind()?;
    let leaks: Vec<UnixStream> = (0..3)
        .map(|_| UnixStream::connect(crew.node.socket()))
        .collect::<Result<_, _>>()?;
    eventually("the broker to accept them", || {
        Ok(crew
            .left_behind()?
            .iter()
            .any(|left| left.contains("socket")))
    })?;
    drop(leaks);
    crew.nothing_left_behind()?;
    fs::write(crew.node.directory().join("ledger.new.4711"), "")?;
    eventually("the file to be all there is", || {
        Ok(crew.left_behind()? == ["file ledger.new.4711"])
    })
}

/// Stops a borrower during a restart of the broker. Returns whether another borrower then maps a slab that the stopped
/// one still has mapped. The two have different tenants, so neither ever reads the other's blocks.
fn mapped_twice_after_a_restart(strip_the_ledger: bool) -> Result<bool> {
    let mut node = Node::start(&["--pin-ms", "100", "--drain-ms", "200"])?;
    let _donor = donor_process(&node, 1, SLABS)?;
    let mut stopped = BorrowerProcess::start(&node, 0, &Job::new("stopped", 1))?;
    stopped.run("reserve 4")?;
    stopped.tell(FOREVER)?;
    stopped.advance(20)?;
    stopped.signal(Signal::STOP)?;
    node.kill_broker()?;
    if strip_the_ledger {
        let path = node.directory().join("ledger");
        let lines = fs::read_to_string(&path)?;
        let kept = lines
            .lines()
            .filter(|line| !line.contains("\"record\":\"lease\""));
        fs::write(
            &path,
            kept.map(|line| format!("{line}\n")).collect::<String>(),
        )?;
    }
    node.start_broker()?;
    let mut other = Job::new("other", 2);
    // The slabs were another tenant's, so they are zeroed before this one gets them, if it gets them at all.
    other.tenant = "other".to_owned();
    let mut other = BorrowerProcess::start(&node, 0, &other)?;
    other.tell(if strip_the_ledger {
        "reserve 4"
    } else {
        "mix 200"
    })?;
    let both = |operations| -> Result<bool> {
        eventually("the other borrower", || {
            let report = other.report()?;
            Ok(report.done > 0 || report.operations >= operations)
        })?;
        let mapped = census::mapped(stopped.pid())?;
        Ok(!mapped.is_disjoint(&census::mapped(other.pid())?))
    };
    both(100)
}

#[test]
fn a_stopped_borrowers_slabs_are_mapped_by_nobody_else_after_a_restart() -> Result<()> {
    ensure!(!mapped_twice_after_a_restart(false)?);
    // Its twin: without the leases in the ledger.
    ensure!(mapped_twice_after_a_restart(true)?);
    Ok(())
}

/// The other twin of the two first tests: a wrong byte would be noticed.
#[test]
fn a_bit_flipped_in_a_donors_memory_is_caught() -> Result<()> {
    let mut crew = Crew::start(7)?;
    crew.advance(50, None)?;
    // Writes from outside the program, like a defect of the machine.
    let donor = crew.donors[0].pid();
    for entry in fs::read_dir(format!("/proc/{donor}/fd"))? {
        let path: PathBuf = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:") {
            let memory = fs::File::options().write(true).open(path)?;
            memory.write_all_at(&vec![0xee; SLAB_BYTES as usize], 0)?;
        }
    }
    for borrower in &mut crew.borrowers {
        // This may fail, because the borrower may already have found a wrong byte and exited.
        let _ = borrower.tell("sweep-fetch");
    }
    eventually("the wrong bytes to be caught", || {
        let mut complaints = crew.borrowers.iter().filter_map(BorrowerProcess::complaint);
        Ok(complaints.any(|text| text.contains("wrong bytes served")))
    })?;
    Ok(())
}

#[test]
fn survivors_keep_nothing_of_the_dead() -> Result<()> {
    let node = Node::start(&["--pin-ms", "100", "--drain-ms", "200"])?;
    let operator = Operator::of(&node)?;
    let donor = donor_process(&node, 1, SLABS)?;
    let all_free = || {
        operator.eventually("every slab to be free", |account| {
            account.free_bytes == SLABS * SLAB_BYTES && account.offered_bytes == account.free_bytes
        })
    };
    let visit = |seed: u64| -> Result<()> {
        let mut borrower = BorrowerProcess::start(&node, 0, &Job::new("visitor", seed))?;
        borrower.run("reserve 4")?;
        borrower.tell(FOREVER)?;
        borrower.advance(20)?;
        borrower.kill()?;
        all_free()
    };
    // The first borrower also causes allocations that stay, for example buffers and the operator's connection.
    visit(0)?;
    let census =
        || Ok::<_, anyhow::Error>([Census::of(node.broker()?.pid())?, Census::of(donor.pid())?]);
    let before = census()?;
    for seed in 1..6 {
        visit(seed)?;
    }
    let mut after = census()?;
    eventually("all to be let go", || {
        after = census()?;
        let mut beyond = after
            .iter()
            .zip(&before)
            .map(|(now, then)| now.beyond(then));
        Ok(beyond.all(|more| more.is_empty()))
    })
    .with_context(|| format!("{before:?} {after:?}"))?;
    ensure!(
        before[0].count("/memfd:swiftcache-hbm (deleted)") as u64 >= 1,
        "{before:?}"
    );

    // The same for a borrower whose donors die.
    drop(donor);
    operator.eventually("the donor to be gone", |account| account.offered_bytes == 0)?;
    let mut borrower = BorrowerProcess::start(&node, 0, &Job::new("survivor", 9))?;
    let outlive = |borrower: &mut BorrowerProcess| -> Result<()> {
        let mut donor = donor_process(&node, 2, SLABS)?;
        borrower.run("reserve 4")?;
        borrower.run("mix 30")?;
        ensure!(!Census::of(borrower.pid())?.mapped.is_empty());
        donor.kill()?;
        operator.eventually("the donor to be gone", |account| account.offered_bytes == 0)?;
        borrower.run("mix 30").map(drop)
    };
    // The first donor also causes the streams to its device, which stay.
    outlive(&mut borrower)?;
    let before = Census::of(borrower.pid())?;
    ensure!(before.mapped.is_empty(), "{before:?}");
    for _ in 0..3 {
        outlive(&mut borrower)?;
    }
    let mut after = before.clone();
    eventually("mappings to go", || {
        after = Census::of(borrower.pid())?;
        Ok(after.beyond(&before).is_empty())
    })
    .with_context(|| format!("{before:?} {after:?}"))?;
    borrower.finish()?;
    Ok(())
}

#[test]
fn after_a_broker_restart_hits_come_back_without_a_store() -> Result<()> {
    let mut crew = Crew::start(3)?;
    let operator = Operator::of(&crew.node)?;
    crew.advance(60, None)?;
    for borrower in &mut crew.borrowers {
        borrower.run("pause")?;
    }
    let leases = |operator: &Operator| -> Result<Vec<(u64, String, u32)>> {
        let leases = operator.leases()?.into_iter();
        let mut leases: Vec<_> = leases
            .map(|lease| (lease.lease_id, lease.region_id, lease.slab))
            .collect();
        leases.sort();
        Ok(leases)
    };
    let before = leases(&operator)?;
    ensure!(!before.is_empty());
    let expected = crew.borrowers[0].run("sweep-fetch")?.served;
    ensure!(expected > 0);
    crew.node.kill_broker()?;
    crew.node.start_broker()?;
    let mut served = 0;
    eventually("as many hits as before", || {
        served = crew.borrowers[0].run("sweep-fetch")?.served;
        Ok(served >= expected)
    })
    .with_context(|| format!("{served} of {expected}"))?;
    // A keeper may have leased more meanwhile.
    let after = leases(&operator)?;
    let survived = before.iter().all(|lease| after.contains(lease));
    ensure!(survived, "leases did not survive: {before:?} {after:?}");
    // Close this connection, which the crew does not know of.
    drop(operator);
    crew.finish()
}
