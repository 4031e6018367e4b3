//! The cache as a holder of slabs: it takes in what is granted, gives up what it does not use, and moves hot blocks out of slabs that
//! are asked back.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;
use hashbrown::HashSet;
use parking_lot::Mutex;
use swiftcache_proto::domain::Medium;

use super::{core::Core, publish::Publishing, rescue::Rescue, shelf::Shelf, write::Write};
use crate::{
    Result,
    leases::{Arrival, Holder, Progress, Wants},
    transfer::{AreaId, RouteSet},
};

/// A cache, and what it moves out of slabs that are asked back.
pub(super) struct CacheHolder {
    core: Arc<Core>,
    /// The draining thread's alone. Taken before the cache's lock.
    evacuation: Mutex<Evacuation>,
}

#[derive(Default)]
struct Evacuation {
    /// Slabs to which blocks are being written, and until when that is waited for: what is being written becomes worth moving when
    /// it is there.
    writing: Vec<Writing>,
    rescue: Rescue,
    /// What was written to such slabs, and may lie in others too.
    publishing: Vec<Publishing>,
}

#[derive(Clone, Copy, Debug)]
struct Writing {
    slab: AreaId,
    until: Instant,
}

impl CacheHolder {
    pub(super) fn new(core: &Arc<Core>) -> Self {
        Self {
            core: Arc::clone(core),
            evacuation: Mutex::default(),
        }
    }
}

impl Holder for CacheHolder {
    fn granted(&self, slab: Arrival) -> Result<()> {
        let Arrival {
            area,
            key,
            hold,
            left,
            ..
        } = slab;
        let shelf = Shelf::new(area, hold, Some(key));
        self.core.state.lock().take_in(shelf, &left);
        Ok(())
    }

    /// Host memory only besides HBM, for what that has no room for.
    fn wants(&self) -> Wants {
        let state = self.core.state.lock();
        let scarce = |medium| {
            let free = state.free_slots(medium, RouteSet::ALL);
            u64::from(free) < self.core.config.step_slots()
        };
        let hbm = scarce(Medium::Hbm);
        Wants {
            hbm,
            host: hbm && scarce(Medium::Host),
        }
    }

    /// As long as a step's room is left of the kind of memory.
    fn give_up_unused(&self) -> Vec<AreaId> {
        let config = &self.core.config;
        let now = Instant::now();
        let mut unused = Vec::new();
        let mut state = self.core.state.lock();
        let free = |medium| u64::from(state.free_slots(medium, RouteSet::ALL));
        let (mut free_hbm, mut free_host) = (free(Medium::Hbm), free(Medium::Host));
        let candidates: Vec<AreaId> = state.shelves.placement.iter().rev().copied().collect();
        for slab in candidates {
            let Some(shelf) = state.shelves.get(slab) else {
                continue;
            };
            let slots = u64::from(shelf.area.slots);
            let free = match shelf.medium() {
                Medium::Hbm => &mut free_hbm,
                Medium::Host => &mut free_host,
            };
            let idle = shelf.own_lease().is_some()
                && shelf.is_open()
                && shelf.is_unused()
                && now.duration_since(shelf.empty_since) >= config.idle_release;
            if idle && *free >= slots + config.step_slots() {
                *free -= slots;
                state.shelves.remove(slab);
                unused.push(slab);
            }
        }
        unused
    }

    fn evacuate(&self, slab: AreaId, window: Duration) -> Option<Instant> {
        let drain = self.core.config.drain;
        if !drain.move_blocks {
            return None;
        }
        let until = Instant::now() + (window / 2).min(drain.move_for);
        let mut evacuation = self.evacuation.lock();
        evacuation.writing.push(Writing { slab, until });
        Some(until)
    }

    fn is_moving(&self, slab: AreaId) -> bool {
        self.evacuation.lock().is_moving(slab)
    }

    fn advance(&self) -> Progress {
        self.evacuation.lock().advance(&self.core)
    }

    fn forget(&self, slabs: &[AreaId]) {
        self.evacuation.lock().forget(slabs);
        let mut state = self.core.state.lock();
        let shelves: Vec<_> = (slabs.iter())
            .filter_map(|slab| state.shelves.remove(*slab))
            .collect();
        for id in shelves.iter().flat_map(|shelf| shelf.blocks()) {
            if state.lose(id).is_some() {
                state.counts.dropped_blocks += 1;
            }
        }
        drop(state);
        // The last to hold a mapping ends it, which takes its time.
        drop(shelves);
    }
}

impl Evacuation {
    fn is_moving(&self, slab: AreaId) -> bool {
        self.writing.iter().any(|writing| writing.slab == slab) || self.rescue.has(slab)
    }

    /// Moves no more blocks of these slabs. Those on their way arrive or not.
    fn forget(&mut self, slabs: &[AreaId]) {
        let slabs: HashSet<AreaId, RandomState> = slabs.iter().copied().collect();
        self.writing
            .retain(|writing| !slabs.contains(&writing.slab));
        self.rescue.forget(|slab| slabs.contains(&slab));
    }

    fn advance(&mut self, core: &Core) -> Progress {
        let before = self.publishing.len();
        self.publishing
            .retain_mut(|publishing| !core.is_published(publishing));
        let mut changed = self.publishing.len() < before;
        let writing = std::mem::take(&mut self.writing);
        let mut written = Vec::new();
        for (writing, writes) in core.with_writes(writing) {
            let mut all_there = true;
            for write in writes {
                match write.flight.transfer.outcome() {
                    Some(outcome) => self.publishing.push(core.begin_settling(&write, &outcome)),
                    None => all_there = false,
                }
            }
            if all_there || Instant::now() >= writing.until {
                written.push(writing.slab);
            } else {
                self.writing.push(writing);
            }
        }
        if !written.is_empty() {
            self.rescue.add(core, &written);
            changed = true;
        }
        changed |= self.rescue.advance(core);
        match changed {
            true => Progress::Changed,
            false
                if self.writing.is_empty()
                    && self.publishing.is_empty()
                    && self.rescue.is_over() =>
            {
                Progress::Idle
            }
            false => Progress::Waiting,
        }
    }
}

impl Core {
    /// What is being written to each slab.
    fn with_writes(&self, slabs: Vec<Writing>) -> Vec<(Writing, Vec<Arc<Write>>)> {
        if slabs.is_empty() {
            return Vec::new();
        }
        let state = self.state.lock();
        let writes = |slab| {
            let shelf = state.shelves.get(slab);
            shelf.map_or_else(Vec::new, |shelf| shelf.writes.clone())
        };
        (slabs.into_iter())
            .map(|writing| (writing, writes(writing.slab)))
            .collect()
    }
}
