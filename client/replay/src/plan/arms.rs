//! The arms of a plan: each says what it would find, and moves nothing.

use swiftcache_client::cache::{CacheModel, Retention};
use swiftcache_proto::domain::BlockHash;

use super::lenders::Supply;
use crate::{
    ReplayError,
    lent::Lent,
    prefix_cache::{Allocation, PrefixCache},
    serving::{Arm, Fetched, Tier},
};

/// SwiftCache with some donors and a host tier.
pub(super) struct Planned<'a> {
    cache: CacheModel,
    supply: Supply<'a>,
    tiers: &'a [Tier],
    slab_slots: u32,
    rescue: bool,
    pub(super) lent: Lent,
    pub(super) unplaced: u64,
}

impl<'a> Planned<'a> {
    pub(super) fn new(
        host_blocks: u32,
        retention: Retention,
        supply: Supply<'a>,
        tiers: &'a [Tier],
        slab_slots: u32,
        rescue: bool,
    ) -> Self {
        Self {
            cache: CacheModel::new(host_blocks, retention),
            supply,
            tiers,
            slab_slots,
            rescue,
            lent: Lent::default(),
            unplaced: 0,
        }
    }
}

impl Arm for Planned<'_> {
    fn advance(&mut self, now_s: f64) -> Result<(), ReplayError> {
        let Self {
            cache,
            supply,
            tiers,
            slab_slots,
            rescue,
            lent,
            ..
        } = self;
        supply.advance(now_s, |_, change| match usize::try_from(change.slabs) {
            Ok(more) => {
                let rank = tiers[change.donor] as u32;
                for _ in 0..more {
                    cache.lend(change.donor, rank, *slab_slots);
                }
            }
            Err(_) => {
                let fewer = change.slabs.unsigned_abs();
                let revoked = cache.take_back(change.donor, fewer, *rescue) as u64;
                lent.revoke(revoked);
            }
        });
        lent.note(now_s, u64::from(cache.lent_slots()));
        Ok(())
    }

    fn prefill(
        &mut self,
        blocks: &[BlockHash],
        allocation: &Allocation,
    ) -> Result<Vec<Fetched>, ReplayError> {
        let runs = self.cache.lookup(&blocks[allocation.hits..]);
        self.unplaced += u64::from(self.cache.store(blocks));
        let fetched = runs.iter().map(|run| Fetched {
            tier: run.donor.map_or(Tier::Host, |donor| self.tiers[donor]),
            blocks: run.blocks.into(),
        });
        Ok(fetched.collect())
    }
}

/// Host memory that holds what was used last, and every block that the engine computed: as vLLM's and LMCache's offloading do.
pub(crate) struct Offload {
    host: PrefixCache,
}

impl Offload {
    pub(crate) fn new(host_blocks: u32) -> Self {
        Self {
            host: PrefixCache::new(host_blocks),
        }
    }
}

impl Arm for Offload {
    fn advance(&mut self, _now_s: f64) -> Result<(), ReplayError> {
        Ok(())
    }

    fn prefill(
        &mut self,
        blocks: &[BlockHash],
        allocation: &Allocation,
    ) -> Result<Vec<Fetched>, ReplayError> {
        // Of a prompt longer than the tier, its beginning is kept.
        let kept = &blocks[..blocks.len().min(self.host.capacity())];
        let Some(held) = self.host.allocate(kept, 0) else {
            return Ok(Vec::new());
        };
        for (slot, block) in held.slots.iter().zip(kept) {
            self.host.publish(*slot, *block);
        }
        self.host.release(&held);
        let found = held.hits.saturating_sub(allocation.hits) as u64;
        let host = Fetched {
            tier: Tier::Host,
            blocks: found,
        };
        Ok(match found {
            0 => Vec::new(),
            _ => vec![host],
        })
    }
}
