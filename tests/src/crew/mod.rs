//! A node with its donors and borrowers. All of them are processes that a test can kill and stop.

mod processes;

use std::{collections::BTreeSet, fs};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

pub use processes::{
    BorrowerProcess, Job, Report, disk_agent, disk_command, donor, donor_process, host_donor,
};

use crate::{
    census::Census,
    engine::{SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    programs::Program,
};

/// Slabs that each donor offers.
pub const SLABS: u64 = 4;
/// The command that keeps a borrower busy until its next command.
pub const FOREVER: &str = "mix 1000000000";

/// A process that a test can kill or stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// The broker.
    Broker,
    /// One of the two donors.
    Donor(usize),
    /// One of the two borrowers.
    Borrower(usize),
}

/// Every party, so that a test can draw one at random.
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

/// What the processes hold, and which files there are, while nobody borrows.
#[derive(Debug)]
struct Idle {
    broker: Census,
    donor: Census,
    files: BTreeSet<String>,
}

impl Crew {
    /// Starts a crew whose borrowers are at work.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub fn start(seed: u64) -> Result<Self> {
        let node = Node::start(&["--pin-ms", "100", "--drain-ms", "200"])?;
        let donors = (0..2)
            .map(|n| donor_process(&node, 1 + n, SLABS))
            .collect::<Result<Vec<_>>>()?;
        let operator = Operator::of(&node)?;
        // The first borrower also causes allocations that stay, for example buffers and the operator's connection. So
        // it must be gone before the idle state is recorded.
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

    /// Kills a party and starts another in its place. A killed broker is away while each borrower does `away`
    /// operations.
    ///
    /// # Errors
    /// When a borrower complains, or a process cannot be started.
    pub fn replace(&mut self, party: Party, away: u64) -> Result<()> {
        match party {
            Party::Broker => {
                self.node.kill_broker()?;
                // The borrowers go on without waiting for the broker.
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

    /// Waits until every borrower has done this many more operations. It does not wait for the party that is `stopped`.
    ///
    /// # Errors
    /// When a borrower complains, or does not go on.
    pub fn advance(&self, operations: u64, stopped: Option<Party>) -> Result<()> {
        for (n, borrower) in self.borrowers.iter().enumerate() {
            if stopped != Some(Party::Borrower(n)) {
                borrower.advance(operations)?;
            }
        }
        Ok(())
    }

    /// Waits until the broker has the four sessions of the donors and borrowers, and each has its stream. No party may be stopped.
    ///
    /// # Errors
    /// When it has not, with those that it has.
    pub fn all_attached(&mut self) -> Result<()> {
        let mut sessions = Vec::new();
        let attached = eventually("everyone to be attached", || {
            sessions = self.operator.sessions()?;
            Ok(sessions.len() == 4 && sessions.iter().all(|session| session.attached))
        });
        let ended = (self.donors.iter_mut().map(Program::has_ended)).collect::<Result<Vec<_>>>()?;
        attached.with_context(|| format!("sessions: {sessions:?}; donors that ended: {ended:?}"))
    }

    /// Checks that everything works as it did at the start, that donors get everything back in the end, and that
    /// nothing is left behind.
    ///
    /// # Errors
    /// When one of these does not hold.
    pub fn finish(mut self) -> Result<()> {
        for borrower in &mut self.borrowers {
            borrower.run("pause")?;
        }
        self.all_attached()?;
        let operator = self.operator.clone();
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

    /// Waits until the idle crew holds no more in the kernel than at the start, and has no more files.
    ///
    /// # Errors
    /// When it still does after [`PATIENCE`](crate::PATIENCE).
    pub fn nothing_left_behind(&self) -> Result<()> {
        let mut left = Vec::new();
        let clean = eventually("all to be let go", || {
            left = self.left_behind()?;
            Ok(left.is_empty())
        });
        clean.with_context(|| format!("left behind: {}", left.join(", ")))
    }

    /// What the crew holds beyond the idle state of the start, for people.
    ///
    /// # Errors
    /// When a process is gone.
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

/// The names of the files in the directory of the state and the sockets.
fn files(node: &Node) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(node.directory())? {
        names.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}
