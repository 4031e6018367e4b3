//! What the broker is told of the blocks on a disk, and what it was not told.
//!
//! The broker takes a number of blocks of all disks of the node together. When it takes no more, what it was told before stays, and the
//! disk goes on with that. The others wait here until there is room. Nobody can ask the disk for them meanwhile.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::{domain::BlockHash, v1};
use tonic::{Code, Status};
use tracing::{debug, warn};

use super::store::DiskStore;
use crate::{Error, Result, session::DiskCall};

/// Hashes in one message: two lists of them fit.
const TOLD: usize = 32_768;
/// How long nothing is told after the broker has refused or has not answered: twice as long each time.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MOST: Duration = Duration::from_secs(30);

/// What telling needs of the disk's agent.
pub(super) trait Agent {
    /// The connection to the broker that there is, or the next one.
    fn epoch(&self) -> u64;
    /// What is to be said of the disk itself now.
    fn state(&self) -> v1::DiskState;
    /// Tells the broker, and waits for its answer.
    fn say(&self, call: DiskCall) -> Result<()>;
    /// The time.
    fn now(&self) -> Instant;
}

/// Tells the broker what is on a disk.
#[derive(Debug)]
pub(super) struct Telling {
    /// The disk's name.
    name: String,
    /// One call with news at a time, so that they arrive in order.
    told: Mutex<Told>,
    problem: Mutex<Option<String>>,
}

/// What the broker was told.
#[derive(Debug, Default)]
struct Told {
    /// The connection by which it was told all that it takes.
    epoch: Option<u64>,
    state: v1::DiskState,
    untold: Untold,
    /// What the broker said when it took no more blocks.
    limit: String,
    /// When the broker is asked again whether it takes more. Another disk may have left it room.
    asks: Option<Instant>,
    failed: Option<Failed>,
}

/// The broker did not take what it was told.
#[derive(Clone, Copy, Debug)]
struct Failed {
    /// The connection, where the broker refused. On another one it is told at once.
    refused: Option<u64>,
    pause: Duration,
    until: Instant,
}

impl Telling {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            told: Mutex::default(),
            problem: Mutex::default(),
        }
    }

    /// Why the broker does not know all that is on the disk, for people. An accepted telling ends it.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    /// Tells the broker what is new: all of it on a new connection. False when it does not know, or is left alone for a while.
    pub(super) fn tell(&self, store: &DiskStore, agent: &dyn Agent) -> bool {
        let mut told = self.told.lock();
        let epoch = agent.epoch();
        let counts = |failed: &Failed| failed.refused.is_none_or(|refused| refused == epoch);
        let failed = told.failed.filter(counts);
        if failed.is_some_and(|failed| agent.now() < failed.until) {
            return false;
        }
        let mut teller = Teller {
            name: &self.name,
            told: &mut told,
            store,
            agent,
        };
        let said = match teller.told.epoch == Some(epoch) {
            true => teller.tell_news(),
            false => teller.tell_all(),
        };
        let said = said.and_then(|()| {
            self.set_problem(teller.told.full());
            teller.tell_state()
        });
        match said {
            Ok(()) => {
                told.epoch = Some(epoch);
                told.failed = None;
                true
            }
            Err(error) => {
                debug!(%error, "the broker does not know what is on the disk");
                told.epoch = None;
                let refused = match &error {
                    Error::Refused { status, .. } => Some(refusal(status)),
                    // The session says what is wrong.
                    _ => None,
                };
                told.failed = match error {
                    // Nothing was sent: there may be a connection at any time.
                    Error::Disconnected { .. } => failed,
                    _ => {
                        let longer = |failed: Failed| (2 * failed.pause).min(PAUSE_MOST);
                        let pause = failed.map_or(PAUSE, longer);
                        Some(Failed {
                            refused: refused.is_some().then_some(epoch),
                            pause,
                            until: agent.now() + pause,
                        })
                    }
                };
                self.set_problem(refused);
                false
            }
        }
    }

    fn set_problem(&self, now: Option<String>) {
        let mut problem = self.problem.lock();
        if let Some(now) = now.as_ref().filter(|now| problem.as_ref() != Some(*now)) {
            warn!(
                problem = now,
                "the broker does not take what is on the disk"
            );
        }
        *problem = now;
    }
}

/// A refusal, for people.
fn refusal(status: &Status) -> String {
    match status.code() {
        Code::Unimplemented => "the broker is too old to know disks: upgrade it".to_owned(),
        _ => status.message().to_owned(),
    }
}

impl Told {
    /// Why there are blocks that the broker was not told of, for people.
    fn full(&self) -> Option<String> {
        let limit = &self.limit;
        (!self.untold.is_empty()).then(|| {
            format!("the broker takes no more blocks, and some that are on the disk are not found: raise its max_blocks ({limit})")
        })
    }
}

/// One telling.
struct Teller<'a> {
    name: &'a str,
    told: &'a mut Told,
    store: &'a DiskStore,
    agent: &'a dyn Agent,
}

impl Teller<'_> {
    fn call(&self) -> DiskCall {
        DiskCall {
            name: self.name.to_owned(),
            ..DiskCall::default()
        }
    }

    fn tell_all(&mut self) -> Result<()> {
        let state = self.agent.state();
        let first = DiskCall {
            anew: true,
            state: Some(state.clone()),
            ..self.call()
        };
        self.agent.say(first)?;
        self.told.state = state;
        self.told.untold = Untold::default();
        for (namespace, hashes) in self.store.all() {
            // What was used last first. Within a message in the order of use: a block is of use behind those that it follows.
            for part in hashes.rchunks(TOLD) {
                self.offer(&namespace, part, Untold::add_last)?;
            }
        }
        Ok(())
    }

    fn tell_news(&mut self) -> Result<()> {
        let news = self.store.news();
        // First what makes room.
        let mut room = 0;
        for (namespace, news) in &news {
            for part in news.dropped.chunks(TOLD) {
                self.tell_blocks(namespace, &[], part)?;
            }
            for hash in &news.dropped {
                room += usize::from(!self.told.untold.remove(namespace, hash));
            }
        }
        for (namespace, news) in &news {
            for part in news.stored.chunks(TOLD) {
                self.offer(namespace, part, Untold::add_first)?;
            }
        }
        self.fill(room, Some(room))?;
        if self.told.asks.is_some_and(|at| self.agent.now() >= at) {
            self.ask_later();
            self.fill(1, None)?;
        }
        Ok(())
    }

    fn ask_later(&mut self) {
        self.told.asks = Some(self.agent.now() + PAUSE_MOST);
    }

    /// Tells of blocks, or adds them to those that wait while the broker takes no more.
    fn offer(
        &mut self,
        namespace: &Arc<str>,
        hashes: &[BlockHash],
        add: fn(&mut Untold, &Arc<str>, &[BlockHash]),
    ) -> Result<()> {
        let full = !self.told.untold.is_empty();
        if !full && self.tell_stored(namespace, hashes)? {
            return Ok(());
        }
        add(&mut self.told.untold, namespace, hashes);
        if full {
            return Ok(());
        }
        // There may be room for a part of them.
        self.ask_later();
        let (step, most) = halves(hashes.len() - 1);
        self.fill(step, most)
    }

    /// Tells of blocks that wait, where there is room for `most` of them, if anybody knows: of `step` at first, and of twice as many
    /// each time. Once something is refused, each step is half of what there may be room for, so that few calls find the last place.
    fn fill(&mut self, mut step: usize, mut most: Option<usize>) -> Result<()> {
        while step > 0
            && let Some((namespace, hashes)) = self.told.untold.next(step.min(TOLD))
        {
            let count = hashes.len();
            let taken = self.tell_stored(&namespace, &hashes)?;
            if taken {
                for hash in &hashes {
                    self.told.untold.remove(&namespace, hash);
                }
            }
            (step, most) = match (taken, most) {
                (true, None) => (2 * step.min(TOLD), None),
                (true, Some(most)) => halves(most - count),
                (false, _) => halves(count - 1),
            };
        }
        Ok(())
    }

    /// False when the broker takes no more blocks.
    fn tell_stored(&mut self, namespace: &str, hashes: &[BlockHash]) -> Result<bool> {
        match self.tell_blocks(namespace, hashes, &[]) {
            Ok(()) => Ok(true),
            Err(Error::Refused { status, .. }) if status.code() == Code::ResourceExhausted => {
                self.told.limit = status.message().to_owned();
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn tell_blocks(
        &self,
        namespace: &str,
        stored: &[BlockHash],
        dropped: &[BlockHash],
    ) -> Result<()> {
        let block_bytes = match self.store.layers(namespace) {
            Some(layers) => layers.iter().sum(),
            // All of it is gone: so say the next news of what was stored. The size of its blocks matters to nobody.
            None if dropped.is_empty() => return Ok(()),
            None => 1,
        };
        self.agent.say(DiskCall {
            namespace: namespace.to_owned(),
            block_bytes,
            stored: stored.to_vec(),
            dropped: dropped.to_vec(),
            ..self.call()
        })
    }

    fn tell_state(&mut self) -> Result<()> {
        let state = self.agent.state();
        if state != self.told.state {
            self.agent.say(DiskCall {
                state: Some(state.clone()),
                ..self.call()
            })?;
            self.told.state = state;
        }
        Ok(())
    }
}

/// The next step where there is room for `most`.
fn halves(most: usize) -> (usize, Option<usize>) {
    (most.div_ceil(2), Some(most))
}

/// Blocks that the broker was not told of, in the order in which it is to be told.
#[derive(Debug, Default)]
struct Untold {
    by_namespace: BTreeMap<Arc<str>, Queue>,
    /// The first place in use, and the one behind the last.
    places: Range<i64>,
}

#[derive(Debug, Default)]
struct Queue {
    order: BTreeMap<i64, BlockHash>,
    places: HashMap<BlockHash, i64>,
}

impl Untold {
    fn is_empty(&self) -> bool {
        self.by_namespace.is_empty()
    }

    /// Adds blocks before all others.
    fn add_first(&mut self, namespace: &Arc<str>, hashes: &[BlockHash]) {
        self.places.start -= hashes.len() as i64;
        self.add(namespace, hashes, self.places.start);
    }

    /// Adds blocks behind all others.
    fn add_last(&mut self, namespace: &Arc<str>, hashes: &[BlockHash]) {
        let place = self.places.end;
        self.places.end += hashes.len() as i64;
        self.add(namespace, hashes, place);
    }

    fn add(&mut self, namespace: &Arc<str>, hashes: &[BlockHash], place: i64) {
        let queue = self.by_namespace.entry(Arc::clone(namespace)).or_default();
        for (hash, place) in hashes.iter().zip(place..) {
            queue.order.insert(place, *hash);
            if let Some(before) = queue.places.insert(*hash, place) {
                queue.order.remove(&before);
            }
        }
    }

    /// False when it is not here.
    fn remove(&mut self, namespace: &str, hash: &BlockHash) -> bool {
        let Some(queue) = self.by_namespace.get_mut(namespace) else {
            return false;
        };
        let Some(place) = queue.places.remove(hash) else {
            return false;
        };
        queue.order.remove(&place);
        if queue.order.is_empty() {
            self.by_namespace.remove(namespace);
        }
        true
    }

    /// The next blocks, up to so many, of one namespace.
    fn next(&self, most: usize) -> Option<(Arc<str>, Vec<BlockHash>)> {
        let first = |queue: &Queue| queue.order.keys().next().copied();
        let queues = self.by_namespace.iter();
        let (namespace, queue) = queues.min_by_key(|(_, queue)| first(queue))?;
        let hashes = queue.order.values().take(most).copied();
        Some((Arc::clone(namespace), hashes.collect()))
    }
}
