//! Every party is killed, in turn and at random, while the others work: no wrong byte, no failed request, no lost
//! byte of HBM, and nothing left behind.

use std::{fs, os::unix::fs::FileExt, path::PathBuf};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use swiftcache_tests::{
    census::Census,
    crew::{BorrowerProcess, Job, donor_process},
    engine::{SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    programs::Program,
    seed::Course,
};

/// Slabs that each donor offers.
const SLABS: u64 = 4;
/// Keeps a borrower busy until it is told otherwise.
const FOREVER: &str = "mix 1000000000";

/// A node with two donors and two borrowers of one namespace, all processes of their own.
struct Crew {
    node: Node,
    donors: Vec<Program>,
    borrowers: Vec<BorrowerProcess>,
    seed: u64,
}

impl Crew {
    fn start(seed: u64) -> Result<Self> {
        let node = Node::start(&["--pin-ms", "100", "--drain-ms", "200"])?;
        let donors = (0..2)
            .map(|n| donor_process(&node, 1 + n, SLABS))
            .collect::<Result<_>>()?;
        let mut crew = Self {
            node,
            donors,
            borrowers: Vec::new(),
            seed,
        };
        for n in 0..2 {
            let borrower = crew.borrower(n)?;
            crew.borrowers.push(borrower);
        }
        Ok(crew)
    }

    fn borrower(&mut self, n: usize) -> Result<BorrowerProcess> {
        self.seed += 1;
        let job = Job::new(&format!("borrower-{n}"), self.seed);
        let mut borrower = BorrowerProcess::start(&self.node, 0, &job)?;
        borrower.tell(FOREVER)?;
        Ok(borrower)
    }

    fn replace_donor(&mut self, n: usize) -> Result<()> {
        self.donors[n].kill()?;
        self.donors[n] = donor_process(&self.node, 1 + n, SLABS)?;
        Ok(())
    }

    fn replace_borrower(&mut self, n: usize) -> Result<()> {
        let fresh = self.borrower(n)?;
        std::mem::replace(&mut self.borrowers[n], fresh).kill()?;
        Ok(())
    }

    fn replace_broker(&mut self, away: u64) -> Result<()> {
        self.node.kill_broker()?;
        // Nobody waits for it.
        self.advance(away)?;
        self.node.start_broker()
    }

    /// Waits until every borrower has got on.
    fn advance(&self, operations: u64) -> Result<()> {
        for borrower in &self.borrowers {
            borrower.advance(operations)?;
        }
        Ok(())
    }

    /// All works as on the first day, and everything comes back in the end.
    fn finish(mut self) -> Result<()> {
        let operator = Operator::of(&self.node)?;
        for borrower in &mut self.borrowers {
            borrower.run("pause")?;
        }
        eventually("everyone to be attached", || {
            let sessions = operator.sessions()?;
            Ok(sessions.len() == 4 && sessions.iter().all(|session| session.attached))
        })?;
        operator.eventually("both donors' bytes", |account| {
            account.offered_bytes == 2 * SLABS * SLAB_BYTES
                && account.zombie_bytes + account.draining_bytes == 0
        })?;
        operator.settled()?;
        for borrower in &mut self.borrowers {
            let swept = borrower.run("sweep-store")?;
            ensure!(swept.operations == 12, "{swept:?}");
            let swept = borrower.run("sweep-fetch")?;
            ensure!(swept.served > 0, "{swept:?}");
        }
        for borrower in std::mem::take(&mut self.borrowers) {
            borrower.finish()?;
        }
        operator.eventually("every slab to be free", |account| {
            account.free_bytes == 2 * SLABS * SLAB_BYTES
                && account.offered_bytes == account.free_bytes
        })?;
        for donor in &mut self.donors {
            donor.finish()?;
        }
        operator.eventually("nothing to be on offer", |account| {
            account.offered_bytes == 0
        })?;
        ensure!(operator.sessions()?.is_empty() && operator.leases()?.is_empty());
        Ok(())
    }
}

#[test]
fn each_party_is_killed_in_turn_and_nobody_else_notices() -> Result<()> {
    let mut course = Course::new("killed in turn", 3);
    let mut crew = Crew::start(course.seed)?;
    while course.goes_on() {
        for n in 0..2 {
            crew.advance(30)?;
            crew.replace_borrower(n)?;
            crew.advance(30)?;
            crew.replace_donor(n)?;
            crew.advance(30)?;
            crew.replace_broker(20)?;
        }
    }
    crew.finish()
}

#[test]
fn parties_are_killed_at_random_and_no_byte_is_wrong() -> Result<()> {
    let mut course = Course::new("killed at random", 100);
    let mut crew = Crew::start(course.seed)?;
    while course.goes_on() {
        crew.advance(course.rng.random_range(1..40))?;
        match course.rng.random_range(0..5) {
            n @ (0 | 1) => crew.replace_borrower(n)?,
            n @ (2 | 3) => crew.replace_donor(n - 2)?,
            _ => crew.replace_broker(course.rng.random_range(0..20))?,
        }
    }
    crew.finish()
}

/// The other proof that the two tests above can fail.
#[test]
fn a_bit_flipped_in_a_donors_memory_is_caught() -> Result<()> {
    let mut crew = Crew::start(7)?;
    crew.advance(50)?;
    // Not through the program: as a broken machine would.
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
        // It may have caught it already.
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
    // The first visit also brings what stays: buffers, the operator's connection.
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
        Ok(after == before)
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
    // The first one also brings the streams to that device, which stay.
    outlive(&mut borrower)?;
    let before = Census::of(borrower.pid())?;
    ensure!(before.mapped.is_empty(), "{before:?}");
    for _ in 0..3 {
        outlive(&mut borrower)?;
    }
    let mut after = before.clone();
    eventually("mappings to go", || {
        after = Census::of(borrower.pid())?;
        Ok(after == before)
    })
    .with_context(|| format!("{before:?} {after:?}"))?;
    borrower.finish()?;
    Ok(())
}

#[test]
fn after_a_broker_restart_hits_come_back_without_a_store() -> Result<()> {
    let mut crew = Crew::start(3)?;
    let operator = Operator::of(&crew.node)?;
    crew.advance(60)?;
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
    ensure!(leases(&operator)? == before, "leases did not survive");
    crew.finish()
}
