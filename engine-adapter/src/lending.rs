//! Parts of the engine's pool that it lends: from the asking to the return.
//!
//! A loan is what the engine puts out of use at once, in every layer. It waits here until the broker is there, is lent on a
//! thread of its own (zeroing takes a while), and is back when the last of its ranges is.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use swiftcache_client::{
    Error,
    device::{Ticket, foreign},
    donor::{DonorStatus, Lender},
};
use swiftcache_proto::domain::RegionId;
use tracing::warn;

use crate::{
    failure::{Failure, Result},
    pool::Pool,
    worker::Place,
};

/// How long a closing engine waits for what is lent beyond the time that borrowers have to move away.
const CLOSE_MARGIN: Duration = Duration::from_secs(1);

/// A range of the pool: address and bytes.
pub(crate) type Range = (u64, u64);

/// What a worker's engine lends.
#[derive(Debug, Default)]
pub(crate) struct Lending {
    state: Mutex<State>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    /// With which to lend, once the broker has been there.
    open: Option<(Arc<Lender>, Arc<Place>)>,
    drain: Duration,
    loans: BTreeMap<u64, Loan>,
    /// The ranges of each.
    out: BTreeMap<u64, Vec<Range>>,
    /// Why the last loan could not be lent.
    problem: String,
    closed: bool,
}

#[derive(Debug)]
enum Loan {
    Waiting(Wanted),
    /// The thread is at it; asked back meanwhile or not.
    Starting {
        asked_back: bool,
    },
    Lent {
        regions: Vec<RegionId>,
        /// Alive as long as any of it is lent.
        out: Weak<()>,
    },
    Back,
}

#[derive(Debug)]
struct Wanted {
    pool: Arc<Pool>,
    ranges: Vec<Range>,
    /// The engine's work that may still touch them.
    after: Option<Ticket>,
}

impl Loan {
    fn is_back(&self) -> bool {
        match self {
            Self::Waiting(_) | Self::Starting { .. } => false,
            Self::Lent { out, .. } => out.strong_count() == 0,
            Self::Back => true,
        }
    }
}

impl State {
    /// Checks that neither the number nor any byte is lent already, or twice in this loan.
    fn check_new(&self, number: u64, ranges: &[Range]) -> Result<()> {
        if self.out.contains_key(&number) {
            let problem = format!("is {number}, which is not back yet");
            return Err(Failure::argument("loan", problem));
        }
        for (at, (address, bytes)) in ranges.iter().enumerate() {
            let mut others = (self.out.values().flatten()).chain(&ranges[..at]);
            if others.any(|(first, size)| address < &(first + size) && first < &(address + bytes)) {
                let problem =
                    format!("{bytes} bytes at {address:#x} are lent already, in part or whole");
                return Err(Failure::argument(format!("ranges[{at}]"), problem));
            }
        }
        Ok(())
    }
}

impl Lending {
    /// Has a loan lent when the broker is there, or at once.
    pub(crate) fn lend(
        self: &Arc<Self>,
        number: u64,
        pool: Arc<Pool>,
        ranges: Vec<Range>,
        after: Option<Ticket>,
    ) -> Result<()> {
        pool.check_ranges(&ranges)?;
        let mut thread = self.thread.lock();
        if thread.is_none() && !self.state.lock().closed {
            let its = Arc::clone(self);
            let started = thread::Builder::new()
                .name("swiftcache-lend".to_owned())
                .spawn(move || its.work())
                .map_err(Error::Thread)?;
            *thread = Some(started);
        }
        let mut state = self.state.lock();
        state.check_new(number, &ranges)?;
        state.out.insert(number, ranges.clone());
        let loan = match state.closed {
            true => Loan::Back,
            false => Loan::Waiting(Wanted {
                pool,
                ranges,
                after,
            }),
        };
        state.loans.insert(number, loan);
        self.changed.notify_all();
        Ok(())
    }

    /// Asks for loans back. Returns at once.
    pub(crate) fn take_back(&self, numbers: &[u64]) {
        let mut state = self.state.lock();
        let mut asked = Vec::new();
        for number in numbers {
            match state.loans.get_mut(number) {
                Some(waiting @ Loan::Waiting(_)) => *waiting = Loan::Back,
                Some(Loan::Starting { asked_back }) => *asked_back = true,
                Some(Loan::Lent { regions, .. }) => asked.extend(regions.iter().copied()),
                Some(Loan::Back) | None => {}
            }
        }
        let lender = state.open.as_ref().map(|(lender, _)| Arc::clone(lender));
        drop(state);
        if let Some(lender) = lender {
            lender.take_back(&asked);
        }
        self.changed.notify_all();
    }

    /// Loans that have come back since this was last asked, asked for or not.
    pub(crate) fn take_returned(&self) -> Vec<u64> {
        let mut state = self.state.lock();
        let returned: Vec<u64> = (state.loans.iter())
            .filter(|(_, loan)| loan.is_back())
            .map(|(number, _)| *number)
            .collect();
        for number in &returned {
            state.loans.remove(number);
            state.out.remove(number);
        }
        returned
    }

    pub(crate) fn problem(&self) -> String {
        self.state.lock().problem.clone()
    }

    /// What is lent now, and how giving back went.
    pub(crate) fn status(&self) -> DonorStatus {
        let open = &self.state.lock().open;
        (open.as_ref()).map_or_else(DonorStatus::default, |(lender, _)| lender.status())
    }

    /// The broker is there: everything that waits is lent.
    pub(crate) fn open(&self, lender: Lender, place: Arc<Place>, drain: Duration) {
        let mut state = self.state.lock();
        if !state.closed {
            state.open = Some((Arc::new(lender), place));
            state.drain = drain;
        }
        self.changed.notify_all();
    }

    /// Asks for everything back and waits for it as long as healthy borrowers may take. What has not come then stays
    /// unreturned for good: it is let go of because the engine is about to.
    pub(crate) fn close(&self) {
        let open = {
            let mut state = self.state.lock();
            state.closed = true;
            for loan in state.loans.values_mut() {
                if let Loan::Waiting(_) = loan {
                    *loan = Loan::Back;
                }
            }
            state.open.take()
        };
        self.changed.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        let Some((lender, _)) = open else {
            return;
        };
        let limit = self.state.lock().drain + CLOSE_MARGIN;
        let began = Instant::now();
        if !lender.take_all_back(limit) {
            let waited_ms = began.elapsed().as_millis();
            warn!(
                waited_ms,
                "part of the pool is let go of while it is still lent"
            );
            // Before the lender goes, which ends them all.
            let mut state = self.state.lock();
            state.loans.retain(|_, loan| loan.is_back());
        }
    }

    fn work(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let waiting = (state.loans.iter())
                .find(|(_, loan)| matches!(loan, Loan::Waiting(_)))
                .map(|(number, _)| *number);
            let (Some(number), Some((lender, place))) = (waiting, state.open.clone()) else {
                self.changed.wait(&mut state);
                continue;
            };
            let starting = Loan::Starting { asked_back: false };
            let Some(Loan::Waiting(wanted)) = state.loans.insert(number, starting) else {
                continue;
            };
            drop(state);
            let lent = start(&lender, &place, &wanted);
            // So that closing finds nobody else's.
            drop((lender, place));
            state = self.state.lock();
            let asked_back = matches!(
                state.loans.get(&number),
                Some(Loan::Starting { asked_back: true })
            );
            let (loan, failure) = lent;
            let failed = failure.is_some();
            if let Some(error) = failure {
                warn!(%error, "the engine's pool cannot be lent");
                state.problem = error.to_string();
            }
            state.loans.insert(number, loan);
            if asked_back || failed {
                drop(state);
                self.take_back(&[number]);
                state = self.state.lock();
            }
        }
    }
}

/// Lends every range of a loan, up to the first that fails, and says why that did.
fn start(lender: &Lender, place: &Place, wanted: &Wanted) -> (Loan, Option<Error>) {
    let token = Arc::new(());
    let mut regions = Vec::with_capacity(wanted.ranges.len());
    let mut lend_all = || -> std::result::Result<(), Error> {
        if let Some(after) = &wanted.after {
            after.wait()?;
        }
        let (layer, device) = (&*place.layer, &place.device);
        for range in &wanted.ranges {
            let pool = wanted.pool.adopt_range(layer, device, *range)?;
            let back = Box::new(Arc::clone(&token));
            let lent = foreign::lend_pool(layer, &pool, 0, range.1, back)?;
            regions.push(lender.lend(lent)?);
        }
        Ok(())
    };
    let failure = lend_all().err();
    let out = Arc::downgrade(&token);
    (Loan::Lent { regions, out }, failure)
}
