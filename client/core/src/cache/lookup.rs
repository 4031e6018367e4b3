//! Lookup: this borrower's own blocks from the local mirror, replicas' blocks through the broker.

use std::{sync::Arc, time::Instant};

use swiftcache_proto::domain::{BlockHash, Extent, FoundRun, Hold, Medium};
use tracing::debug;

use super::{
    BlocksByTier, Hit,
    core::Core,
    hit::{HitBlock, HitBlocks, Pin},
};
use crate::session::{Asker, Coming, Session};

/// How often one lookup asks the broker: a prefix that alternates between own and replicas' blocks more often than
/// that is not worth the round trips.
const MAX_ROUNDS: u32 = 4;

impl Core {
    /// Waits until `deadline` at most for replicas' slabs that are not mapped yet. Without one, asks nobody. Whether the
    /// blocks were `promised` decides only how they are counted.
    pub(super) fn lookup(
        self: &Arc<Self>,
        hashes: &[BlockHash],
        deadline: Option<Instant>,
        promised: bool,
    ) -> Hit {
        let mut hit = HitBlocks::new(self, hashes.len());
        if !self.origin.is_here() {
            return Hit(Arc::new(hit));
        }
        self.add_own(hashes, &mut hit);
        if self.config.share
            && let Some(session) = &self.session
            && let Some(deadline) = deadline
        {
            for _ in 0..MAX_ROUNDS {
                let whole = hit.blocks.len() == hashes.len();
                hit.coming = Coming::default();
                if whole || !self.ask(session, hashes, deadline, &mut hit) {
                    break;
                }
                let before = hit.blocks.len();
                self.add_own(hashes, &mut hit);
                if hit.blocks.len() == before {
                    break;
                }
            }
        }
        self.count(hashes.len(), &hit, promised);
        Hit(Arc::new(hit))
    }

    /// Adds the run of own blocks that follows what is found already, and pins it.
    fn add_own(&self, hashes: &[BlockHash], hit: &mut HitBlocks) {
        let mut state = self.state.lock();
        for hash in &hashes[hit.blocks.len()..] {
            let Some((id, shelf)) = state.readable(hash) else {
                break;
            };
            hit.push(HitBlock::Own(id), shelf.medium(), shelf.area.link);
            state.blocks.pin(id);
        }
    }

    /// Asks the broker for what follows, and adds it. False when there is no point in going on.
    fn ask(
        &self,
        session: &Session,
        hashes: &[BlockHash],
        deadline: Instant,
        hit: &mut HitBlocks,
    ) -> bool {
        let rest = &hashes[hit.blocks.len()..];
        let asker = Asker {
            namespace: self.config.layout.namespace.clone(),
            device: Some(self.config.device.clone()),
            borrower: Some(self.id),
        };
        let limit = self.config.lookup_limit;
        let found = match session.lookup(&asker, rest, limit).wait() {
            Ok(found) => found,
            Err(error) => {
                debug!(%error, "lookup without the broker");
                self.state.lock().counts.broker_misses += 1;
                return false;
            }
        };
        if found.runs.is_empty() {
            hit.coming = found.coming;
            return false;
        }
        let pin = hit.pins.len() as u32;
        hit.pins.push(Pin {
            id: found.pin,
            until: found.pinned_until,
        });
        let all = found.runs.iter().all(|run| match run {
            FoundRun::Leased { extent, .. } => {
                let lease = extent.lease;
                let known = self.state.lock().shelves.of_lease(lease).is_some();
                // Until it is mapped, which takes a call and an import in the background, this is a miss.
                (known || self.leases.open_by(lease, deadline))
                    && self.add_extent(extent, pin, hashes, hit)
            }
            FoundRun::Kept { count } => self.add_known(*count, hashes, hit),
        });
        if all {
            hit.coming = found.coming;
        }
        all
    }

    /// Adds one extent, as far as it can be read.
    fn add_extent(
        &self,
        extent: &Extent,
        pin: u32,
        hashes: &[BlockHash],
        hit: &mut HitBlocks,
    ) -> bool {
        let rest = &hashes[hit.blocks.len()..];
        let state = self.state.lock();
        let Some(shelf) = state.shelves.of_lease(extent.lease) else {
            return false;
        };
        if shelf.hold == Hold::Own {
            drop(state);
            return self.add_known(extent.count, hashes, hit);
        }
        let end = extent.first_slot.checked_add(extent.count);
        let inside = end.is_some_and(|end| end <= shelf.area.slots);
        let usable = shelf.is_open() && shelf.is_behind(state.routes_up());
        let generation = shelf.key.map(|key| key.generation);
        if generation != Some(extent.generation) || !inside || !usable {
            return false;
        }
        let (slab, link, medium) = (shelf.area.id, shelf.area.link, shelf.medium());
        let slots = extent.first_slot..extent.first_slot + extent.count;
        for (slot, _) in slots.zip(rest) {
            hit.push(HitBlock::Shared { slab, slot, pin }, medium, link);
        }
        true
    }

    /// Adds blocks that the broker takes for this borrower's own: they count only as the borrower itself knows them.
    fn add_known(&self, count: u32, hashes: &[BlockHash], hit: &mut HitBlocks) -> bool {
        let end = hashes.len().min(hit.blocks.len() + count as usize);
        self.add_own(&hashes[..end], hit);
        hit.blocks.len() == end
    }

    /// Counts a lookup, and makes its blocks the most recently used, the first one last: a block goes before those
    /// it follows.
    pub(super) fn count(&self, asked: usize, hit: &HitBlocks, promised: bool) {
        let mut state = self.state.lock();
        for block in hit.blocks.iter().rev() {
            if let HitBlock::Own(id) = block {
                state.blocks.find_again(*id);
            }
        }
        let counts = &mut state.counts;
        counts.lookups += 1;
        counts.lookup_blocks += asked as u64;
        let mut found = BlocksByTier::default();
        for run in &hit.runs {
            let blocks = u64::from(run.blocks);
            match (run.hold, run.medium) {
                (Hold::Shared, _) => found.shared += blocks,
                (Hold::Own, Medium::Hbm) => found.donor += blocks,
                (Hold::Own, Medium::Host) => found.host += blocks,
            }
        }
        counts.hits += found;
        if promised {
            counts.promised_blocks += asked as u64;
            counts.promised_hits += found;
        }
    }
}
