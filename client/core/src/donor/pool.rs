//! Parts of an engine's pool that a worker lends: from the asking to the return.
//!
//! The engine puts a loan out of use at once, in every layer. The loan waits here until the broker is there, is lent on a
//! thread of its own, since zeroing takes a while, and is back when the last of its ranges is.

use std::{
    any::Any,
    fmt, io,
    sync::{Arc, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::{DeviceUuid, RegionId};
use tracing::warn;

use super::{
    DonorStatus, Lender,
    loans::{GIVE_BACK_MARGIN, Loans, Moment},
};
use crate::{
    Error, Result,
    device::{DeviceLayer, Memory, Ticket},
    session::Session,
};

/// A range of an engine's pool that the engine does not use, as whoever knows raw memory sees it. It is shown to people as
/// so many bytes at an address.
pub trait PoolRange: Clone + fmt::Debug + fmt::Display + Send + Sync + 'static {
    /// Whether any byte is in both.
    fn overlaps(&self, other: &Self) -> bool;

    /// Makes it memory that other processes can be given, once `after` is over: the engine's last work that touches it.
    /// `back` is dropped when the range is the engine's own again.
    ///
    /// # Errors
    /// When it cannot be exported, and says why.
    fn lend(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        after: Option<&Ticket>,
        back: Box<dyn Any + Send + Sync>,
    ) -> Result<Memory>;
}

/// Why a loan is refused. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum NotLent {
    /// A loan of that number is not over.
    #[error("loan {0} is not back yet")]
    Number(u64),
    /// A range is lent already, or twice in this loan.
    #[error("{range} are lent already, in part or whole")]
    Lent {
        /// Which one.
        index: usize,
        /// Where it is.
        range: String,
    },
    /// The thread that lends could not be started.
    #[error("no thread to lend on: {0}")]
    Thread(io::Error),
}

/// Lends parts of an engine's pool through the broker, as soon as it is there.
#[derive(Debug)]
pub struct PoolLender<R> {
    began: Instant,
    state: Mutex<State<R>>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct State<R> {
    /// Where there is a broker to lend through, once it has been there.
    ground: Option<Ground>,
    /// Opened for the first loan: most engines lend nothing.
    lender: Option<Arc<Lender>>,
    loans: Loans<Part<R>>,
    /// Loans that are over and that the engine has not been told of.
    returned: Vec<u64>,
    /// Why the last loan could not be lent.
    problem: String,
    closed: bool,
}

#[derive(Clone)]
struct Ground {
    session: Session,
    layer: Arc<dyn DeviceLayer>,
    device: DeviceUuid,
    drain: Duration,
}

impl fmt::Debug for Ground {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.device, self.layer.name())
    }
}

/// This worker's part of a loan.
#[derive(Debug)]
struct Part<R> {
    ranges: Vec<R>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// For the broker. What the engine still does there is over after that.
    Waiting(Option<Ticket>),
    /// The thread is at it.
    Starting,
    Lent {
        regions: Vec<RegionId>,
        /// Alive as long as any of it is lent.
        out: Weak<()>,
    },
}

impl<R: PoolRange> State<R> {
    /// Checks that neither the number nor any byte is lent already, or twice in this loan.
    fn check_new(&self, number: u64, ranges: &[R]) -> std::result::Result<(), NotLent> {
        if self.returned.contains(&number) || self.loans.iter().any(|(known, _)| known == number) {
            return Err(NotLent::Number(number));
        }
        for (index, range) in ranges.iter().enumerate() {
            let lent = self.loans.iter().flat_map(|(_, part)| &part.ranges);
            if lent
                .chain(&ranges[..index])
                .any(|other| range.overlaps(other))
            {
                let range = range.to_string();
                return Err(NotLent::Lent { index, range });
            }
        }
        Ok(())
    }

    /// The first loan that waits, which is starting from now on.
    fn take_waiting(&mut self) -> Option<(u64, Option<Ticket>, Vec<R>)> {
        let waits = |part: &Part<R>| matches!(part.stage, Stage::Waiting(_));
        let (number, part) = self.loans.iter_mut().find(|(_, part)| waits(part))?;
        match std::mem::replace(&mut part.stage, Stage::Starting) {
            Stage::Waiting(after) => Some((number, after, part.ranges.clone())),
            Stage::Starting | Stage::Lent { .. } => None,
        }
    }

    /// A loan is over.
    fn is_back(&mut self, number: u64, now: Moment) {
        if self.loans.came_back(number, 1, now).is_some() {
            self.returned.push(number);
        }
    }
}

impl<R: PoolRange> Default for PoolLender<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: PoolRange> PoolLender<R> {
    /// One that has lent nothing, and knows no broker as yet.
    pub fn new() -> Self {
        let state = State {
            ground: None,
            lender: None,
            loans: Loans::new(1),
            returned: Vec::new(),
            problem: String::new(),
            closed: false,
        };
        Self {
            began: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            thread: Mutex::default(),
        }
    }

    fn now(&self) -> Moment {
        self.began.elapsed()
    }

    /// The broker is there: everything that waits is lent, and what is lent from now on. Borrowers have `drain` to move
    /// blocks away when they are asked to let go; zero for the broker's default.
    pub fn open(
        &self,
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        device: DeviceUuid,
        drain: Duration,
    ) {
        let mut state = self.state.lock();
        if !state.closed {
            state.ground = Some(Ground {
                session,
                layer,
                device,
                drain,
            });
        }
        self.changed.notify_all();
    }

    /// Has a loan lent when the broker is there and `after` is reached, or at once.
    ///
    /// # Errors
    /// When the loan is refused.
    pub fn lend(
        self: &Arc<Self>,
        number: u64,
        ranges: Vec<R>,
        after: Option<Ticket>,
    ) -> std::result::Result<(), NotLent> {
        let mut thread = self.thread.lock();
        if thread.is_none() && !self.state.lock().closed {
            let its = Arc::clone(self);
            let started = thread::Builder::new()
                .name("swiftcache-lend".to_owned())
                .spawn(move || its.work())
                .map_err(NotLent::Thread)?;
            *thread = Some(started);
        }
        let mut state = self.state.lock();
        state.check_new(number, &ranges)?;
        let stage = Stage::Waiting(after);
        state.loans.insert(number, Part { ranges, stage });
        if state.closed {
            state.is_back(number, self.now());
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Asks for loans back. Returns at once.
    pub fn take_back(&self, numbers: &[u64]) {
        let now = self.now();
        let mut state = self.state.lock();
        let mut asked = Vec::new();
        for number in numbers {
            state.loans.ask_back(*number, now);
            match state.loans.get_mut(*number).map(|part| &part.stage) {
                Some(Stage::Waiting(_)) => state.is_back(*number, now),
                Some(Stage::Lent { regions, .. }) => asked.extend(regions.iter().copied()),
                // The thread that starts it sees that it has been asked back.
                Some(Stage::Starting) | None => {}
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
    pub fn take_returned(&self) -> Vec<u64> {
        let now = self.now();
        let mut state = self.state.lock();
        let gone = |part: &Part<R>| matches!(&part.stage, Stage::Lent { out, .. } if out.strong_count() == 0);
        let back: Vec<u64> = (state.loans.iter())
            .filter(|(_, part)| gone(part))
            .map(|(number, _)| number)
            .collect();
        for number in back {
            state.is_back(number, now);
        }
        std::mem::take(&mut state.returned)
    }

    /// Why the last loan that could not be lent was not.
    pub fn problem(&self) -> String {
        self.state.lock().problem.clone()
    }

    /// What is lent now, and how giving back went.
    pub fn status(&self) -> DonorStatus {
        let lender = self.state.lock().lender.clone();
        lender.map_or_else(DonorStatus::default, |lender| lender.status())
    }

    /// Asks for everything back and waits for it as long as healthy borrowers may take. What has not come then is never
    /// said to be back.
    pub fn close(&self) {
        let now = self.now();
        {
            let mut state = self.state.lock();
            state.closed = true;
            state.ground = None;
            let waits = |part: &Part<R>| matches!(part.stage, Stage::Waiting(_));
            let waiting: Vec<u64> = (state.loans.iter())
                .filter(|(_, part)| waits(part))
                .map(|(number, _)| number)
                .collect();
            for number in waiting {
                state.is_back(number, now);
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
        if !lender.close(GIVE_BACK_MARGIN) {
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
            let Some((ground, (number, after, ranges))) = next else {
                self.changed.wait(&mut state);
                continue;
            };
            drop(state);
            let (stage, failure) = match self.lender(&ground) {
                Ok(lender) => start(&lender, &ground, after.as_ref(), &ranges),
                Err(error) => (nothing_lent(), Some(error)),
            };
            let failed = failure.is_some();
            state = self.state.lock();
            if let Some(error) = failure {
                warn!(%error, "the engine's pool cannot be lent");
                state.problem = error.to_string();
            }
            if let Some(part) = state.loans.get_mut(number) {
                part.stage = stage;
            }
            if failed || state.loans.is_asked_back(number) {
                drop(state);
                self.take_back(&[number]);
                state = self.state.lock();
            }
        }
    }

    /// Only the thread opens one.
    fn lender(&self, ground: &Ground) -> Result<Arc<Lender>> {
        if let Some(lender) = &self.state.lock().lender {
            return Ok(Arc::clone(lender));
        }
        let (session, layer) = (ground.session.clone(), Arc::clone(&ground.layer));
        let lender = Lender::open(session, layer, ground.device.clone(), ground.drain)?;
        let lender = Arc::new(lender);
        self.state.lock().lender = Some(Arc::clone(&lender));
        Ok(lender)
    }
}

/// A part of which everything is back.
fn nothing_lent() -> Stage {
    Stage::Lent {
        regions: Vec::new(),
        out: Weak::new(),
    }
}

/// Lends every range of a loan, up to the first that fails, and says why that did.
fn start<R: PoolRange>(
    lender: &Lender,
    ground: &Ground,
    after: Option<&Ticket>,
    ranges: &[R],
) -> (Stage, Option<Error>) {
    let token = Arc::new(());
    let mut regions = Vec::with_capacity(ranges.len());
    let mut lend_all = || -> Result<()> {
        for range in ranges {
            let back = Box::new(Arc::clone(&token));
            let lent = range.lend(&*ground.layer, &ground.device, after, back)?;
            regions.push(lender.lend(lent)?);
        }
        Ok(())
    };
    let failure = lend_all().err();
    let out = Arc::downgrade(&token);
    (Stage::Lent { regions, out }, failure)
}
