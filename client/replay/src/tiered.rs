//! The arms with real bytes. Blocks that the local pool does not hold come from donors and the host tier through a
//! [`Borrower`], and every byte of them is checked.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use swiftcache_proto::domain::BlockHash;

use super::{
    ReplayError,
    lent::Lent,
    neighbours::NeighbourUse,
    pool::Pool,
    prefix_cache::Allocation,
    serving::{Arm, Fetched, Tier},
};
use swiftcache_client::cache::{Borrower, Hit, Medium};

/// The longest single sleep. An interruption is noticed at most this late.
const NAP: Duration = Duration::from_millis(20);
/// Trace time between two updates of the neighbours' HBM use, seconds.
const NEIGHBOUR_STEP_S: f64 = 0.25;

/// Set to stop the replay, for example by a signal handler.
pub type Interrupt = Arc<AtomicBool>;

/// Neighbours whose load follows trace time. Trace time runs at most `pace` times as fast as the wall clock, because
/// real donors need real time to follow.
#[derive(Debug)]
pub struct Neighbourhood {
    uses: NeighbourUse,
    pace: f64,
    started: Option<(Instant, f64)>,
    next_s: f64,
}

impl Neighbourhood {
    /// `pace` is the most trace seconds per second of wall clock.
    pub fn new(uses: NeighbourUse, pace: f64) -> Self {
        Self {
            uses,
            pace,
            started: None,
            next_s: 0.0,
        }
    }

    fn advance(&mut self, now_s: f64, interrupt: &AtomicBool) -> Result<(), ReplayError> {
        let (started, zero_s) = *self.started.get_or_insert((Instant::now(), now_s));
        if self.next_s < zero_s {
            self.next_s = zero_s;
        }
        while self.next_s <= now_s {
            let due = Duration::from_secs_f64((self.next_s - zero_s) / self.pace);
            while let Some(left) = due.checked_sub(started.elapsed())
                && !left.is_zero()
            {
                stop_if(interrupt)?;
                std::thread::sleep(left.min(NAP));
            }
            self.uses.set(self.next_s)?;
            self.next_s += NEIGHBOUR_STEP_S;
        }
        Ok(())
    }
}

fn stop_if(interrupt: &AtomicBool) -> Result<(), ReplayError> {
    if interrupt.load(Ordering::Relaxed) {
        return Err(ReplayError::Interrupted);
    }
    Ok(())
}

/// What the data path of an arm did. Bytes and blocks are those that really moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes checked after a load from a donor or the host tier.
    pub verified_loaded_bytes: u64,
    /// Bytes checked where they lay in the local pool.
    pub verified_local_bytes: u64,
    /// Blocks that a lookup found and a load could not deliver. They were computed again.
    pub failed_blocks: u64,
    /// Blocks written back.
    pub stored_blocks: u64,
    /// Blocks for which no tier had room.
    pub unplaced_blocks: u64,
    /// The most that was leased at one time, bytes.
    pub leased_peak_bytes: u64,
}

/// An arm with real bytes.
pub struct Tiered {
    borrower: Arc<Borrower>,
    pool: Pool,
    neighbourhood: Option<Neighbourhood>,
    interrupt: Interrupt,
    /// What its data path did so far.
    pub moved: Moved,
    pub(crate) lent: Lent,
    revocations: u64,
}

impl Tiered {
    /// An arm that computes into `pool` and stores what it computed through `borrower`.
    pub fn new(
        borrower: Arc<Borrower>,
        pool: Pool,
        neighbourhood: Option<Neighbourhood>,
        interrupt: Interrupt,
    ) -> Self {
        Self {
            borrower,
            pool,
            neighbourhood,
            interrupt,
            moved: Moved::default(),
            lent: Lent::default(),
            revocations: 0,
        }
    }

    /// Loads what `hit` found into the slots of the leading `blocks`, and checks what arrived. Blocks after the first
    /// failed block do not count, because their prefix is not complete. Returns how many blocks count.
    fn load(&mut self, hit: &Hit, blocks: &[(BlockHash, u32)]) -> Result<usize, ReplayError> {
        let blocks = &blocks[..hit.blocks() as usize];
        let slots: Vec<u32> = blocks.iter().map(|(_, slot)| *slot).collect();
        let loaded = self.borrower.load(hit, &slots, self.pool.kv()).finish();
        self.moved.failed_blocks += loaded.failed.len() as u64;
        let mut arrived = blocks.to_vec();
        for index in loaded.failed.iter().rev() {
            arrived.remove(*index as usize);
        }
        self.moved.verified_loaded_bytes += self.pool.verify(&arrived, "loaded")?;
        Ok(loaded
            .failed
            .first()
            .map_or(blocks.len(), |first| *first as usize))
    }
}

/// The first `good` blocks of a hit, by the tier that they came from.
fn by_tier(hit: &Hit, good: usize) -> Vec<Fetched> {
    let mut left = good as u64;
    let runs = hit.runs().iter().map(|run| {
        let tier = match run.medium {
            Medium::Hbm => Tier::of_donor(run.link),
            Medium::Host => Tier::Host,
        };
        let count = left.min(u64::from(run.blocks));
        left -= count;
        Fetched {
            tier,
            blocks: count,
        }
    });
    runs.filter(|part| part.blocks > 0).collect()
}

impl Arm for Tiered {
    fn advance(&mut self, now_s: f64) -> Result<(), ReplayError> {
        stop_if(&self.interrupt)?;
        let stats = self.borrower.stats();
        let leased = stats.leased_bytes;
        self.moved.leased_peak_bytes = self.moved.leased_peak_bytes.max(leased);
        let block_bytes = self.borrower.config().layout.block_bytes();
        self.lent.revoke(stats.revocations - self.revocations);
        self.revocations = stats.revocations;
        self.lent.note(now_s, leased / block_bytes);
        match &mut self.neighbourhood {
            Some(neighbourhood) => neighbourhood.advance(now_s, &self.interrupt),
            None => Ok(()),
        }
    }

    fn prefill(
        &mut self,
        blocks: &[BlockHash],
        allocation: &Allocation,
    ) -> Result<Vec<Fetched>, ReplayError> {
        let slots = allocation.slots.iter().copied();
        let placed: Vec<(BlockHash, u32)> = blocks.iter().copied().zip(slots).collect();
        let (local, missing) = placed.split_at(allocation.hits);
        self.moved.verified_local_bytes += self.pool.verify(local, "local pool")?;
        // A replay counts what is there, and not how soon it was mapped.
        let patience = self.borrower.config().lookup_limit;
        let hit = (self.borrower).lookup_within(&blocks[allocation.hits..], patience);
        let good = self.load(&hit, missing)?;
        self.pool.compute(&missing[good..])?;
        // Store the whole prompt, not only its new blocks. Blocks that a revocation took are stored again while the
        // local pool still has them. For a block that is still stored, the call only marks it as used.
        let stored = self
            .borrower
            .store(&placed, self.pool.kv(), &|_| None)
            .finish();
        self.moved.stored_blocks += u64::from(stored.stored);
        self.moved.unplaced_blocks += u64::from(stored.unplaced);
        Ok(by_tier(&hit, good))
    }
}
