//! A node and everybody on it, all processes of their own, which a test kills and stops as it likes.

mod processes;

use std::{collections::BTreeSet, fs};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

pub use processes::{BorrowerProcess, Job, Report, donor_process};

use crate::{
    census::Census,
    engine::{SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    programs::Program,
};

/// Slabs that each donor offers.
pub const SLABS: u64 = 4;
/// Keeps a borrower busy until it is told otherwise.
pub const FOREVER: &str = "mix 1000000000";

/// Somebody who can be killed or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// The broker.
    Broker,
    /// One of the two donors.
    Donor(usize),
    /// One of the two borrowers.
    Borrower(usize),
}

/// Every party, for drawing one.
pub const PARTIES: [Party; 5] = [
    Party::Broker,
    Party::Donor(0),
    Party::Donor(1),
    Party::Borrower(0),
    Party::Borrower(1),
];

/// A node with two donors and two borrowers of one namespace.
#[derive(Debug)]
pub struct Crew {
    /// The node.
    pub node: Node,
    /// The donors' processes.
    pub donors: Vec<Program>,
    /// The borrowers' processes.
    pub borrowers: Vec<BorrowerProcess>,
    operator: Operator,
    seed: u64,
    idle: Idle,
}

/// What is there while nobody borrows.
#[derive(Debug)]
struct Idle {
    broker: Census,
    donor: Census,
    files: BTreeSet<String>,
}

impl Crew {
    /// A crew at work.
    ///
    /// # Errors
    /// When somebody cannot be started.
    pub fn start(seed: u64) -> Result<Self> {
        let node = Node::start(&["--pin-ms", "100", "--drain-ms", "200"])?;
        let donors = (0..2)
            .map(|n| donor_process(&node, 1 + n, SLABS))
            .collect::<Result<Vec<_>>>()?;
        let operator = Operator::of(&node)?;
        // The first visit also brings what stays: buffers, the operator's connection.
        let mut visitor = BorrowerProcess::start(&node, 0, &Job::new("visitor", seed))?;
        visitor.run("reserve 4")?;
        visitor.run("mix 20")?;
        visitor.finish()?;
        all_free(&operator)?;
        let idle = Idle {
            broker: Census::of(node.broker()?.pid())?,
            donor: Census::of(donors[0].pid())?,
            files: files(&node)?,
        };
        let mut crew = Self {
            node,
            donors,
            borrowers: Vec::new(),
            operator,
            seed,
            idle,
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

    /// Kills one and starts another in its place; the broker is away for a few operations.
    ///
    /// # Errors
    /// When a borrower complains, or nobody can be started.
    pub fn replace(&mut self, party: Party, away: u64) -> Result<()> {
        match party {
            Party::Broker => {
                self.node.kill_broker()?;
                // Nobody waits for it.
                self.advance(away, None)?;
                self.node.start_broker()
            }
            Party::Donor(n) => {
                self.donors[n].kill()?;
                self.donors[n] = donor_process(&self.node, 1 + n, SLABS)?;
                Ok(())
            }
            Party::Borrower(n) => {
                let fresh = self.borrower(n)?;
                std::mem::replace(&mut self.borrowers[n], fresh).kill()?;
                Ok(())
            }
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, party: Party, signal: Signal) -> Result<()> {
        match party {
            Party::Broker => self.node.broker()?.signal(signal),
            Party::Donor(n) => self.donors[n].signal(signal),
            Party::Borrower(n) => self.borrowers[n].signal(signal),
        }
    }

    /// Waits until every borrower but one that is stopped has got on.
    ///
    /// # Errors
    /// When one complains, or does not.
    pub fn advance(&self, operations: u64, stopped: Option<Party>) -> Result<()> {
        for (n, borrower) in self.borrowers.iter().enumerate() {
            if stopped != Some(Party::Borrower(n)) {
                borrower.advance(operations)?;
            }
        }
        Ok(())
    }

    /// All works as on the first day, everything comes back in the end, and nothing is left behind.
    ///
    /// # Errors
    /// When that is not so.
    pub fn finish(mut self) -> Result<()> {
        for borrower in &mut self.borrowers {
            borrower.run("pause")?;
        }
        let operator = self.operator.clone();
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
        all_free(&operator)?;
        self.nothing_left_behind()?;
        for donor in &mut self.donors {
            donor.finish()?;
        }
        operator.eventually("nothing to be on offer", |account| {
            account.offered_bytes == 0
        })?;
        ensure!(operator.sessions()?.is_empty() && operator.leases()?.is_empty());
        Ok(())
    }

    /// The idle crew holds no more of the kernel's than it did on the first day, and no file more.
    ///
    /// # Errors
    /// When it does.
    pub fn nothing_left_behind(&self) -> Result<()> {
        let mut left = Vec::new();
        let clean = eventually("all to be let go", || {
            left = self.left_behind()?;
            Ok(left.is_empty())
        });
        clean.with_context(|| format!("left behind: {}", left.join(", ")))
    }

    /// What there is beyond the first day's, for people.
    ///
    /// # Errors
    /// When somebody is gone.
    pub fn left_behind(&self) -> Result<Vec<String>> {
        let idle = &self.idle;
        let mut left = Census::of(self.node.broker()?.pid())?.beyond(&idle.broker);
        for donor in &self.donors {
            left.extend(Census::of(donor.pid())?.beyond(&idle.donor));
        }
        let files = files(&self.node)?;
        left.extend((files.difference(&idle.files)).map(|file| format!("file {file}")));
        Ok(left)
    }
}

fn all_free(operator: &Operator) -> Result<()> {
    operator.eventually("every slab to be free", |account| {
        account.free_bytes == 2 * SLABS * SLAB_BYTES && account.offered_bytes == account.free_bytes
    })
}

/// What lies in the directory of the state and the sockets.
fn files(node: &Node) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(node.directory())? {
        names.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}
