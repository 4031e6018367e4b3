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
    device::Ticket,
    donor::{DonorStatus, Lender},
    session::Session,
};
use swiftcache_proto::domain::RegionId;
use tracing::warn;

use crate::{
    failure::{Failure, Result},
    pool::Pool,
    promised::UnusedRange,
    worker::Place,
};

/// How long a closing engine waits for what is lent beyond the time that borrowers have to move away.
const CLOSE_MARGIN: Duration = Duration::from_secs(1);

/// What a worker's engine lends.
#[derive(Debug, Default)]
pub(crate) struct Lending {
    state: Mutex<State>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    /// Where there is a broker to lend through, once it has been there.
    ground: Option<Ground>,
    /// Opened for the first loan: most engines lend nothing.
    lender: Option<Arc<Lender>>,
    loans: BTreeMap<u64, Loan>,
    /// Why the last loan could not be lent.
    problem: String,
    closed: bool,
}

#[derive(Clone, Debug)]
struct Ground {
    session: Session,
    place: Arc<Place>,
    drain: Duration,
}

#[derive(Debug)]
struct Loan {
    ranges: Vec<UnusedRange>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
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
    /// The engine's work that may still touch it.
    after: Option<Ticket>,
}

impl Loan {
    fn is_back(&self) -> bool {
        match &self.stage {
            Stage::Waiting(_) | Stage::Starting { .. } => false,
            Stage::Lent { out, .. } => out.strong_count() == 0,
            Stage::Back => true,
        }
    }
}

impl State {
    /// Checks that neither the number nor any byte is lent already, or twice in this loan.
    fn check_new(&self, number: u64, ranges: &[UnusedRange]) -> Result<()> {
        if self.loans.contains_key(&number) {
            let problem = format!("is {number}, which is not back yet");
            return Err(Failure::argument("loan", problem));
        }
        for (at, range) in ranges.iter().enumerate() {
            let lent = self.loans.values().flat_map(|loan| &loan.ranges);
            let mut others = lent.chain(&ranges[..at]);
            if others.any(|other| other.overlaps(range)) {
                let problem = format!("{range} are lent already, in part or whole");
                return Err(Failure::argument(format!("ranges[{at}]"), problem));
            }
        }
        Ok(())
    }

    /// The first loan that waits, which is starting from now on.
    fn take_waiting(&mut self) -> Option<(u64, Wanted, Vec<UnusedRange>)> {
        let waits = |loan: &Loan| matches!(loan.stage, Stage::Waiting(_));
        let (number, loan) = self.loans.iter_mut().find(|(_, loan)| waits(loan))?;
        let starting = Stage::Starting { asked_back: false };
        match std::mem::replace(&mut loan.stage, starting) {
            Stage::Waiting(wanted) => Some((*number, wanted, loan.ranges.clone())),
            _ => None,
        }
    }
}

impl Lending {
    /// Has a loan lent when the broker is there, or at once.
    pub(crate) fn lend(
        self: &Arc<Self>,
        number: u64,
        pool: Arc<Pool>,
        ranges: Vec<UnusedRange>,
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
        let stage = match state.closed {
            true => Stage::Back,
            false => Stage::Waiting(Wanted { pool, after }),
        };
        state.loans.insert(number, Loan { ranges, stage });
        self.changed.notify_all();
        Ok(())
    }

    /// Asks for loans back. Returns at once.
    pub(crate) fn take_back(&self, numbers: &[u64]) {
        let mut state = self.state.lock();
        let mut asked = Vec::new();
        for number in numbers {
            match state.loans.get_mut(number).map(|loan| &mut loan.stage) {
                Some(waiting @ Stage::Waiting(_)) => *waiting = Stage::Back,
                Some(Stage::Starting { asked_back }) => *asked_back = true,
                Some(Stage::Lent { regions, .. }) => asked.extend(regions.iter().copied()),
                Some(Stage::Back) | None => {}
            }
        }
        let lender = state.lender.clone();
        drop(state);
        if let Some(lender) = lender {
            lender.take_back(&asked);
        }
        self.changed.notify_all();
    }

    /// Loans that have come back since this was last asked, asked for or not.
    pub(crate) fn take_returned(&self) -> Vec<u64> {
        let loans = &mut self.state.lock().loans;
        let returned = loans.extract_if(.., |_, loan| loan.is_back());
        returned.map(|(number, _)| number).collect()
    }

    pub(crate) fn problem(&self) -> String {
        self.state.lock().problem.clone()
    }

    /// What is lent now, and how giving back went.
    pub(crate) fn status(&self) -> DonorStatus {
        let lender = self.state.lock().lender.clone();
        lender.map_or_else(DonorStatus::default, |lender| lender.status())
    }

    /// The broker is there: everything that waits is lent.
    pub(crate) fn open(&self, session: Session, place: Arc<Place>, drain: Duration) {
        let mut state = self.state.lock();
        if !state.closed {
            state.ground = Some(Ground {
                session,
                place,
                drain,
            });
        }
        self.changed.notify_all();
    }

    /// Asks for everything back and waits for it as long as healthy borrowers may take. What has not come then is never
    /// said to be back.
    pub(crate) fn close(&self) {
        {
            let mut state = self.state.lock();
            state.closed = true;
            state.ground = None;
            for loan in state.loans.values_mut() {
                if let Stage::Waiting(_) = loan.stage {
                    loan.stage = Stage::Back;
                }
            }
        }
        self.changed.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        let lender = self.state.lock().lender.take();
        let Some(lender) = lender else { return };
        let began = Instant::now();
        if !lender.close(CLOSE_MARGIN) {
            let waited_ms = began.elapsed().as_millis();
            warn!(
                waited_ms,
                "part of the pool is still lent, and stays as it is until this process ends"
            );
        }
    }

    fn work(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let ground = state.ground.clone();
            let next = ground.and_then(|ground| Some((ground, state.take_waiting()?)));
            let Some((ground, (number, wanted, ranges))) = next else {
                self.changed.wait(&mut state);
                continue;
            };
            drop(state);
            let (stage, failure) = match self.lender(&ground) {
                Ok(lender) => start(&lender, &ground.place, &wanted, &ranges),
                Err(error) => (Stage::Back, Some(error)),
            };
            let failed = failure.is_some();
            state = self.state.lock();
            if let Some(error) = failure {
                warn!(%error, "the engine's pool cannot be lent");
                state.problem = error.to_string();
            }
            let mut asked_back = false;
            if let Some(loan) = state.loans.get_mut(&number) {
                let before = std::mem::replace(&mut loan.stage, stage);
                asked_back = matches!(before, Stage::Starting { asked_back: true });
            }
            if asked_back || failed {
                drop(state);
                self.take_back(&[number]);
                state = self.state.lock();
            }
        }
    }

    /// Only the thread opens one.
    fn lender(&self, ground: &Ground) -> std::result::Result<Arc<Lender>, Error> {
        if let Some(lender) = &self.state.lock().lender {
            return Ok(Arc::clone(lender));
        }
        let (session, place) = (ground.session.clone(), &ground.place);
        let layer = Arc::clone(&place.layer);
        let lender = Lender::open(session, layer, place.device.clone(), ground.drain)?;
        let lender = Arc::new(lender);
        self.state.lock().lender = Some(Arc::clone(&lender));
        Ok(lender)
    }
}

/// Lends every range of a loan, up to the first that fails, and says why that did.
fn start(
    lender: &Lender,
    place: &Place,
    wanted: &Wanted,
    ranges: &[UnusedRange],
) -> (Stage, Option<Error>) {
    let token = Arc::new(());
    let mut regions = Vec::with_capacity(ranges.len());
    let mut lend_all = || -> std::result::Result<(), Error> {
        for range in ranges {
            let back = Box::new(Arc::clone(&token));
            let after = wanted.after.as_ref();
            // Each is in the pool, since the loan was accepted.
            if let Some(lent) = range.lend(wanted.pool.memories(), place, after, back)? {
                regions.push(lender.lend(lent)?);
            }
        }
        Ok(())
    };
    let failure = lend_all().err();
    let out = Arc::downgrade(&token);
    (Stage::Lent { regions, out }, failure)
}
