//! Loads: from slabs into the engine's pool, layer by layer.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use swiftcache_proto::domain::LinkKind;
use tracing::warn;

use super::{
    BytesByLink, Hit, PagedKv,
    core::{Core, Leftover},
    hit::{HitBlock, HitBlocks},
};
use crate::{
    device::Ticket,
    leases::Flight,
    transfer::{Direction, LayerTickets, LoadOrder, Plan, Queueing, issue_load},
};

/// Copies on their way from slabs into the engine's pool.
///
/// Dropping a load leaves its copies running: the engine's blocks must not be used for anything else until they are
/// over. [`finish`](Self::finish) has the last word on which blocks hold.
pub struct Load {
    hit: Arc<HitBlocks>,
    flight: Arc<Flight>,
    /// How many of the hit's blocks were asked for.
    blocks: usize,
    /// How many of them could not be planned.
    missing: usize,
    tickets: LayerTickets,
    bytes: BytesByLink,
    verdict: Mutex<Verdict>,
    /// Every copy was over before any pin ran out.
    in_time: AtomicBool,
    /// Others rely on it already: see [`promise`](Self::promise).
    promised: AtomicBool,
    /// Every block is of the borrower's own leases, whose memory lasts as long as it is mapped here, behind a link that
    /// is no slower than a forward.
    lasting: bool,
    ended: bool,
}

/// What is known to have failed.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Indexes into the load's blocks, ascending.
    pub(super) failed: Vec<u32>,
    late: u64,
}

/// Blocks that could not be loaded by the time a layer was waited for. Recompute them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} blocks could not be loaded; recompute them", failed.len())]
pub struct LoadError {
    /// Indexes into the load's blocks, ascending.
    pub failed: Vec<u32>,
}

/// How a load ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Indexes into the load's blocks whose bytes must not be used, ascending. Recompute them.
    pub failed: Vec<u32>,
    /// What crossed each link.
    pub bytes: BytesByLink,
}

/// What is to be loaded, and where to.
pub(super) struct Wanted<'a> {
    pub(super) layers: Range<usize>,
    /// Blocks of the engine's pool: where the first blocks of a hit go.
    pub(super) blocks: &'a [u32],
    pub(super) kv: &'a PagedKv,
    /// No copy starts before.
    pub(super) after: Option<&'a Ticket>,
}

impl Core {
    /// Plans a load, registers it with every slab it reads, and queues its copies.
    pub(super) fn load(self: &Arc<Self>, hit: &Hit, wanted: &Wanted<'_>) -> Load {
        let hit = Arc::clone(&hit.0);
        let found = Arc::clone(&hit);
        self.begin_load(hit, wanted, |blocks, plan, verdict| {
            self.plan_load(&found, blocks, wanted.kv, plan, verdict)
        })
    }

    /// Queues the copies of a hit's first blocks that `plan` plans, each for a block of the engine's pool, and registers with every
    /// slab they read.
    pub(super) fn begin_load(
        self: &Arc<Self>,
        hit: Arc<HitBlocks>,
        wanted: &Wanted<'_>,
        plan_load: impl FnOnce(&[u32], &mut Plan, &mut Verdict) -> Arc<Flight>,
    ) -> Load {
        let Wanted { kv, after, .. } = *wanted;
        let layout = &self.config.layout;
        let blocks = &wanted.blocks[..wanted.blocks.len().min(hit.blocks.len())];
        let layers = wanted.layers.start..wanted.layers.end.min(layout.layer_bytes.len());
        let mut verdict = Verdict::default();
        let mut plan = self.plans.take();
        let own = |block: &HitBlock| matches!(block, HitBlock::Own(_));
        let mut lasting = hit.blocks[..blocks.len()].iter().all(own);
        let (flight, touching) = match self.touch(kv) {
            Ok(touching) => {
                let flight = plan_load(blocks, &mut plan, &mut verdict);
                lasting &= plan.lasts();
                (flight, touching)
            }
            Err(error) => {
                warn!(%error, "nothing is loaded into a pool that cannot be used");
                verdict.failed.extend(0..blocks.len() as u32);
                (self.leases.registering().begin(Vec::new()), None)
            }
        };
        let mut bytes = BytesByLink::default();
        let mut queueing = Queueing::new(&flight.transfer, Direction::Load);
        let issued = issue_load(
            &mut plan,
            LoadOrder { layers, after },
            &layout.layer_bytes,
            kv,
            &mut queueing,
            &mut bytes,
        );
        let tickets = issued.unwrap_or_else(|refused| {
            self.refused(&flight, &refused);
            lasting = false;
            LayerTickets::default()
        });
        lasting &= bytes[LinkKind::Pcie] + bytes[LinkKind::Host] == 0;
        // The plan keeps its slabs mapped: a revocation that finds the transfer queued must not find it holding on.
        self.plans.put_back(plan);
        drop(queueing);
        if let Some(touching) = touching {
            let flight = Arc::clone(&flight);
            touching.until(move || flight.transfer.is_over());
        }
        Load {
            hit,
            flight,
            blocks: blocks.len(),
            missing: verdict.failed.len(),
            tickets,
            bytes,
            verdict: Mutex::new(verdict),
            in_time: AtomicBool::new(false),
            promised: AtomicBool::new(false),
            lasting,
            ended: false,
        }
    }

    fn plan_load(
        &self,
        hit: &HitBlocks,
        blocks: &[u32],
        kv: &PagedKv,
        plan: &mut Plan,
        verdict: &mut Verdict,
    ) -> Arc<Flight> {
        let now = Instant::now();
        let state = self.state.lock();
        let mut registering = self.leases.registering();
        for ((block, to), number) in hit.blocks.iter().zip(blocks).zip(0..) {
            let from = match *block {
                HitBlock::Own(id) => state.place_of(id).map(|(place, shelf)| (shelf, place.slot)),
                HitBlock::Shared { slab, slot, pin } => state
                    .shelves
                    .get(slab)
                    .filter(|shelf| shelf.is_open() && now < hit.pins[pin as usize].until)
                    .map(|found| (found, slot)),
            };
            match from {
                Some((shelf, slot)) if *to < kv.blocks => {
                    plan.add(&shelf.area, slot, *to);
                }
                _ => verdict.failed.push(number),
            }
        }
        registering.begin(plan.areas().collect())
    }
}

impl Load {
    /// Layers up to the last one queued.
    pub fn layers(&self) -> usize {
        self.tickets.layers()
    }

    /// Tickets to wait for before layer `layer` may be read, one for each stream in use: for an engine whose compute
    /// stream waits on the device. Which blocks hold is known only after [`finish`](Self::finish).
    pub fn layer_tickets(&self, layer: usize) -> &[Ticket] {
        self.tickets.of(layer)
    }

    /// The blocks known to have failed by now, as indexes into the load's blocks, ascending: right after the call that made
    /// the load, those whose memory had been given up since the lookup. Waits for nothing.
    pub fn missing(&self) -> Vec<u32> {
        self.judge(false).failed.clone()
    }

    /// Whether others may rely on the load from here on, though its last `most_bytes` bytes may still be on their way: whoever
    /// reads a layer waits for it first. Then [`finish`](Self::finish) reports a failure only if the device fails, since
    /// whatever becomes of the leases, the bytes stay where they are until the copies are over: donors, operators and
    /// brokers that come back take a slab when this process says so or is gone, and a donor that frees an allocation frees
    /// no mapping of it. False where that does not hold: of others' blocks, of blocks that are missing, of memory that goes
    /// with its donor (legacy handles), over PCIe, which is slower than what waits, and while more bytes are on their way.
    pub fn promise(&self, most_bytes: u64) -> bool {
        if self.promised.load(Ordering::Relaxed) {
            return true;
        }
        if self.flight.transfer.is_poisoned() || !self.cannot_fail() {
            return false;
        }
        let (layers, total) = (self.tickets.layers(), self.bytes.total());
        let may_lack = (layers as u64).saturating_mul(most_bytes) / total.max(1);
        // Layers come in order.
        let promised = match layers.saturating_sub(may_lack.min(layers as u64) as usize) {
            0 => true,
            there => {
                let mut last = self.tickets.of(there - 1).iter();
                last.all(|ticket| ticket.outcome().is_some())
            }
        };
        if promised {
            self.promised.store(true, Ordering::Relaxed);
        }
        promised
    }

    /// Whether nothing but the device can fail it, as long as its leases are not refused.
    fn cannot_fail(&self) -> bool {
        self.lasting && self.missing == 0
    }

    /// Others relied on it before it began: see [`Claim`](super::Claim).
    pub(super) fn promised_before(self) -> Self {
        (self.promised).store(self.cannot_fail(), Ordering::Relaxed);
        self
    }

    /// Blocks until layer `layer` is in the engine's pool. When copies have failed, blocks until none of this load is in
    /// flight any more: whoever is told computes blocks anew, and nothing may land in them after that.
    ///
    /// # Errors
    /// Names the blocks to recompute; all others of this layer are there.
    pub fn wait_layer(&self, layer: usize) -> Result<(), LoadError> {
        let outcomes: Vec<_> = (self.tickets.of(layer).iter()).map(Ticket::wait).collect();
        // The clock is read after the copies are over.
        let verdict = self.judge(outcomes.iter().any(Result::is_err));
        match verdict.failed.len() {
            0 => return Ok(()),
            // Nothing was ever on its way to these.
            missing if missing == self.missing => {
                let failed = verdict.failed.clone();
                return Err(LoadError { failed });
            }
            _ => drop(verdict),
        }
        let failed = self.flight.transfer.wait().is_err();
        Err(LoadError {
            failed: self.judge(failed).failed.clone(),
        })
    }

    /// Whether it is known that every copy is over, well or not.
    pub fn is_done(&self) -> bool {
        self.flight.transfer.is_over()
    }

    /// Waits until it is known that every copy is over, also of a load that failed half-way, and says which blocks hold.
    /// From then on the engine may use its blocks for anything.
    pub fn finish(mut self) -> Loaded {
        let outcome = self.flight.transfer.wait();
        let verdict = std::mem::take(&mut *self.judge(outcome.is_err()));
        self.ended = true;
        let mut state = self.hit.core.state.lock();
        state.counts.failed_blocks += verdict.failed.len() as u64;
        state.counts.late_blocks += verdict.late;
        state.counts.loaded += self.bytes;
        drop(state);
        self.hit.core.ended(&self.flight, &outcome);
        Loaded {
            failed: verdict.failed,
            bytes: self.bytes,
        }
    }

    /// Decides what holds of what is over by now.
    fn judge(&self, copies_failed: bool) -> parking_lot::MutexGuard<'_, Verdict> {
        let mut verdict = self.verdict.lock();
        let worthless =
            self.flight.transfer.is_poisoned() && !self.promised.load(Ordering::Relaxed);
        if copies_failed || worthless {
            verdict.fail_all(self.blocks);
            return verdict;
        }
        if self.hit.pins.is_empty() || self.in_time.load(Ordering::Relaxed) {
            return verdict;
        }
        let over_well = |last: &Ticket| matches!(last.outcome(), Some(Ok(())));
        let all_over = self.tickets.last().iter().all(over_well);
        let now = Instant::now();
        let mut all_in_time = true;
        for (number, pin) in (0..).zip(&self.hit.pins) {
            if now >= pin.until {
                all_in_time = false;
                verdict.fail_pin(number, &self.hit.blocks[..self.blocks]);
            }
        }
        if all_over && all_in_time {
            self.in_time.store(true, Ordering::Relaxed);
        }
        verdict
    }
}

impl Verdict {
    fn fail_all(&mut self, blocks: usize) {
        self.failed.clear();
        self.failed.extend(0..blocks as u32);
    }

    /// Everything read under this pin came too late.
    fn fail_pin(&mut self, late: u32, blocks: &[HitBlock]) {
        let before = self.failed.len();
        let of_pin = (0..).zip(blocks).filter_map(|(number, block)| match block {
            HitBlock::Shared { pin, .. } if *pin == late => Some(number),
            _ => None,
        });
        self.failed.extend(of_pin);
        self.failed.sort_unstable();
        self.failed.dedup();
        self.late += (self.failed.len() - before) as u64;
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if !self.ended && self.hit.core.origin.is_here() {
            let core = Arc::clone(&self.hit.core);
            core.state.lock().counts.loaded += self.bytes;
            core.leave(Leftover::Load {
                flight: Arc::clone(&self.flight),
                hit: Arc::clone(&self.hit) as _,
            });
        }
    }
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Load({} blocks)", self.blocks)
    }
}
