//! Claims: blocks that a lookup found, and whose memory is not given back before they are loaded.

use std::{fmt, sync::Arc};

use swiftcache_proto::domain::{BlockHash, LinkKind, Medium};

use super::{
    PagedKv,
    core::Core,
    hit::{HitBlock, HitBlocks},
    load::{Load, Wanted},
};
use crate::{
    device::Ticket,
    leases::Flight,
    transfer::{AreaId, BlockArea, Direction, Queueing},
};

/// Blocks in leases of the borrower's own that can be loaded whatever becomes of the leases: only the device can fail such a load.
///
/// It counts as a transfer under way in every slab that it reads, so their donors wait for it. Take it for the moment between an
/// engine's scheduling and its forward.
pub struct Claim {
    hit: Arc<HitBlocks>,
    flight: Arc<Flight>,
    areas: Vec<Arc<BlockArea>>,
    /// Where each block lies: which of the areas, and the slot. A block that is moved meanwhile is read where it was.
    places: Vec<(usize, u32)>,
    /// How many hashes were asked for.
    asked: usize,
    loaded: bool,
}

impl Core {
    /// Claims the longest prefix run of the hashes that is in lasting memory behind a fast link. Nothing if that is empty, or more
    /// than `most_bytes`.
    pub(super) fn claim(self: &Arc<Self>, hashes: &[BlockHash], most_bytes: u64) -> Option<Claim> {
        if !self.origin.is_here() {
            return None;
        }
        let most = most_bytes / self.config.layout.block_bytes();
        let mut too_many = false;
        let mut hit = HitBlocks::new(self, hashes.len());
        let mut areas: Vec<Arc<BlockArea>> = Vec::new();
        let mut places = Vec::with_capacity(hashes.len());
        let mut state = self.state.lock();
        // No slab is closed before the claim is registered with it.
        let mut registering = self.leases.registering();
        for hash in hashes {
            let Some((id, shelf)) = state.readable(hash) else {
                break;
            };
            let (area, medium) = (&shelf.area, shelf.medium());
            let slow = matches!(area.link, LinkKind::Pcie | LinkKind::Host);
            let Some(place) = state.blocks.get(id).place else {
                break;
            };
            if !area.lasts || slow || medium != Medium::Hbm {
                break;
            }
            if places.len() as u64 == most {
                too_many = true;
                break;
            }
            // Consecutive blocks mostly lie in the area of the block before.
            let known = areas.iter().rposition(|other| Arc::ptr_eq(other, area));
            let at = known.unwrap_or_else(|| {
                areas.push(Arc::clone(area));
                areas.len() - 1
            });
            places.push((at, place.slot));
            hit.push(HitBlock::Own(id), medium, area.link);
            state.blocks.pin(id);
        }
        if places.is_empty() || too_many {
            // What was found lets go of its blocks under this lock.
            drop((registering, state));
            return None;
        }
        let slabs: Vec<AreaId> = areas.iter().map(|area| area.id).collect();
        let flight = registering.begin(slabs);
        Some(Claim {
            hit: Arc::new(hit),
            flight,
            areas,
            places,
            asked: hashes.len(),
            loaded: false,
        })
    }
}

impl Claim {
    /// How many blocks: the first ones of the hashes.
    pub fn blocks(&self) -> u32 {
        self.places.len() as u32
    }

    /// Queues the copies of the first `blocks.len()` blocks into the engine's `blocks`, layer by layer, and returns at once. No copy
    /// starts before `after`. The load [is promised](Load::promise), unless the device has failed already, or the pool cannot be
    /// touched.
    pub fn load(mut self, blocks: &[u32], kv: &PagedKv, after: Option<&Ticket>) -> Load {
        let hit = Arc::clone(&self.hit);
        let core = Arc::clone(&hit.core);
        core.count(self.asked, &hit, false);
        let layers = 0..core.config.layout.layer_bytes.len();
        let wanted = Wanted {
            layers,
            blocks,
            kv,
            after,
        };
        let load = core.begin_load(hit, &wanted, |blocks, plan, verdict| {
            for ((place, to), number) in self.places.iter().zip(blocks).zip(0..) {
                let (area, slot) = (&self.areas[place.0], place.1);
                match *to < kv.blocks {
                    true => plan.add(area, slot, *to),
                    false => verdict.failed.push(number),
                }
            }
            self.areas.clear();
            self.loaded = true;
            Arc::clone(&self.flight)
        });
        load.promised_before()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.loaded || !self.hit.core.origin.is_here() {
            return;
        }
        // Whoever finds the transfer over counts on the slabs not being held.
        self.areas.clear();
        drop(Queueing::new(&self.flight.transfer, Direction::Load));
        self.hit.core.leases.end(&self.flight);
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Claim({} blocks)", self.places.len())
    }
}
