//! A slab: slots for blocks in one piece of memory, leased, shared by a replica, or of the host tier.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{Generation, LeaseId, LinkKind};

use super::{
    Tier,
    blocks::{BlockId, List},
    core::Streams,
    mapping::Mapping,
    op::Op,
    slots::Slots,
};
use crate::device::{CopyStream, Memory};

/// A slab's number in the table. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SlabIndex(pub(super) u32);

/// What copies need to know of a slab. Held outside the state's lock only while copies are being queued: it keeps
/// the slab mapped.
#[derive(Debug)]
pub(super) struct SlabMemory {
    pub(super) memory: Memory,
    /// Where each layer's slot 0 starts in `memory`, bytes.
    pub(super) layer_offsets: Vec<u64>,
    pub(super) slots: u32,
    pub(super) link: LinkKind,
    /// Copies out of the slab.
    pub(super) load: Arc<dyn CopyStream>,
    /// Copies into the slab, and those that must precede them: every write of a slab is queued here, so that a slot
    /// whose old bytes are still being copied away on this stream can be taken again at once.
    pub(super) store: Arc<dyn CopyStream>,
    /// Keeps a leased slab mapped; the host tier owns its memory.
    _mapping: Option<Mapping>,
}

impl SlabMemory {
    /// `slots` slots at `base` in `memory`, layer-major.
    pub(super) fn new(
        memory: Memory,
        base: u64,
        slots: u32,
        layer_bytes: &[u64],
        link: LinkKind,
        [load, store]: Streams,
        mapping: Option<Mapping>,
    ) -> Self {
        let mut offset = base;
        let layer_offsets = layer_bytes
            .iter()
            .map(|bytes| {
                let here = offset;
                offset += bytes * u64::from(slots);
                here
            })
            .collect();
        Self {
            memory,
            layer_offsets,
            slots,
            link,
            load,
            store,
            _mapping: mapping,
        }
    }
}

/// A lease and which leasing of the slab it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeaseKey {
    pub(super) lease: LeaseId,
    pub(super) generation: Generation,
}

/// Whose slab it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Leased by this borrower.
    Own(LeaseKey),
    /// Leased by a replica, opened for reading.
    Shared(LeaseKey),
    /// Of the host tier.
    Host,
}

/// A revocation being obeyed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draining {
    pub(super) since: Instant,
    /// Left to move blocks away and acknowledge.
    pub(super) window: Duration,
    /// The broker does not know the lease as this session's: nobody waits for an acknowledgement, and the bytes may
    /// already be another's.
    pub(super) refused: bool,
}

#[derive(Debug)]
pub(super) struct Slab {
    pub(super) kind: Kind,
    pub(super) bytes: u64,
    pub(super) memory: Arc<SlabMemory>,
    /// Set: no new copy touches it.
    pub(super) draining: Option<Draining>,
    pub(super) slots: Slots,
    /// Who lies in each slot. Empty for a replica's slab.
    pub(super) occupants: Vec<Option<BlockId>>,
    pub(super) occupied: u32,
    /// Slots that readers may still be reading, and until when.
    pub(super) cooling: Vec<(Instant, u32)>,
    /// Slots whose unpublishing is not confirmed, and when to ask again.
    pub(super) unconfirmed: Vec<(Instant, u32)>,
    /// Copies that touch it.
    pub(super) ops: Vec<Arc<Op>>,
    /// When it last stopped holding any block.
    pub(super) empty_since: Instant,
}

impl Slab {
    pub(super) fn new(kind: Kind, bytes: u64, memory: SlabMemory) -> Self {
        let slots = match kind {
            Kind::Own(_) | Kind::Host => memory.slots,
            Kind::Shared(_) => 0,
        };
        Self {
            kind,
            bytes,
            memory: Arc::new(memory),
            draining: None,
            slots: Slots::new(slots),
            occupants: vec![None; slots as usize],
            occupied: 0,
            cooling: Vec::new(),
            unconfirmed: Vec::new(),
            ops: Vec::new(),
            empty_since: Instant::now(),
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.draining.is_none()
    }

    pub(super) fn tier(&self) -> Tier {
        match self.kind {
            Kind::Own(_) => Tier::Donor,
            Kind::Shared(_) => Tier::Shared,
            Kind::Host => Tier::Host,
        }
    }

    /// The list that its blocks are in.
    pub(super) fn list(&self) -> List {
        match self.kind {
            Kind::Own(_) | Kind::Shared(_) => List::Donor,
            Kind::Host => List::Host,
        }
    }

    pub(super) fn occupy(&mut self, slot: u32, block: BlockId) {
        self.occupants[slot as usize] = Some(block);
        self.occupied += 1;
    }

    /// The block in `slot` is gone from it. The slot is not free yet.
    pub(super) fn vacate(&mut self, slot: u32) {
        if self.occupants[slot as usize].take().is_some() {
            self.occupied -= 1;
            if self.occupied == 0 {
                self.empty_since = Instant::now();
            }
        }
    }

    /// Gives back the slots that readers have left by now.
    pub(super) fn cool(&mut self, now: Instant) {
        let slots = &mut self.slots;
        self.cooling.retain(|(until, slot)| {
            let hot = *until > now;
            if !hot {
                slots.give(*slot);
            }
            hot
        });
    }

    pub(super) fn end_op(&mut self, op: &Arc<Op>) {
        self.ops.retain(|other| !Arc::ptr_eq(other, op));
    }
}

/// The slabs, by number and by lease.
#[derive(Debug, Default)]
pub(super) struct Slabs {
    table: Vec<Option<Box<Slab>>>,
    by_lease: HashMap<LeaseId, SlabIndex>,
    /// Own slabs, best link first; then the host tier.
    pub(super) placement: Vec<SlabIndex>,
}

impl Slabs {
    pub(super) fn insert(&mut self, slab: Slab) -> SlabIndex {
        let index = SlabIndex(self.table.len() as u32);
        let rank = |slab: &Slab| (slab.kind == Kind::Host, slab.memory.link);
        match slab.kind {
            Kind::Own(key) | Kind::Shared(key) => {
                self.by_lease.insert(key.lease, index);
            }
            Kind::Host => {}
        }
        if !matches!(slab.kind, Kind::Shared(_)) {
            let at = (self.placement)
                .partition_point(|other| self.get(*other).is_none_or(|o| rank(o) <= rank(&slab)));
            self.placement.insert(at, index);
        }
        self.table.push(Some(Box::new(slab)));
        index
    }

    pub(super) fn remove(&mut self, index: SlabIndex) -> Option<Box<Slab>> {
        let slab = self.table.get_mut(index.0 as usize)?.take()?;
        if let Kind::Own(key) | Kind::Shared(key) = slab.kind {
            self.by_lease.remove(&key.lease);
        }
        self.placement.retain(|other| *other != index);
        Some(slab)
    }

    pub(super) fn get(&self, index: SlabIndex) -> Option<&Slab> {
        self.table.get(index.0 as usize)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, index: SlabIndex) -> Option<&mut Slab> {
        self.table.get_mut(index.0 as usize)?.as_deref_mut()
    }

    /// The slab of a lease and its number.
    pub(super) fn of_lease(&self, lease: LeaseId) -> Option<(SlabIndex, &Slab)> {
        let index = *self.by_lease.get(&lease)?;
        Some((index, self.get(index)?))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SlabIndex, &Slab)> {
        (0..)
            .zip(&self.table)
            .filter_map(|(index, slab)| Some((SlabIndex(index), slab.as_deref()?)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (SlabIndex, &mut Slab)> {
        (0..)
            .zip(&mut self.table)
            .filter_map(|(index, slab)| Some((SlabIndex(index), slab.as_deref_mut()?)))
    }
}
