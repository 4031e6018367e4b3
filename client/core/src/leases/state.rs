//! What is known of leases, behind one lock. The lock is never held during a copy, a call or an import.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use parking_lot::MutexGuard;
use swiftcache_proto::domain::{Hold, LeaseId, Medium, RegionId};

use super::{
    slabs::{ByMedium, Flight, Slabs},
    unreadable::Unreadable,
};
use crate::{session::Held, transfer::AreaId};

/// Longer latencies count as this, microseconds: ten minutes, the longest drain window.
const LONGEST_US: u64 = 600_000_000;

#[derive(Debug)]
pub(super) struct State {
    pub(super) slabs: Slabs,
    /// Leases granted and being mapped.
    pub(super) pending: HashMap<LeaseId, Pending>,
    /// Calls for leases whose answers have not been looked at.
    pub(super) grants_in_flight: u32,
    /// Revoked (and acknowledged) while their grants may still be on their way: never to be mapped.
    pub(super) revoked_early: HashSet<LeaseId>,
    /// Replicas' leases that cannot be read here.
    pub(super) unreadable: Unreadable,
    /// Replicas' leases that are about to be opened.
    pub(super) opening: HashSet<LeaseId>,
    /// The smallest slab seen of each kind of memory: what a further lease takes at least, bytes.
    pub(super) slab_bytes: ByMedium<Option<u64>>,
    /// So much more could be leased when a larger slab was granted for it, which had to be turned down. While no
    /// more is left, nothing is asked for by this connection: a broker without a free slab takes one from others for who asks.
    pub(super) asked_in_vain: ByMedium<u64>,
    /// The broker had nothing to lend; not to be asked before.
    pub(super) grow_after: Instant,
    /// When it was last asked for host memory, it granted none.
    pub(super) host_refused: bool,
    /// How long it was last left alone for because what it had to lend cannot be mapped here; zero when it can.
    pub(super) map_pause: Duration,
    /// Regions of which slabs were granted that cannot be mapped here.
    pub(super) unmapped: HashSet<RegionId>,
    pub(super) counts: Counts,
}

/// What has become of leases, and what is held now.
#[derive(Clone, Debug)]
pub(crate) struct Counts {
    /// Revocations received: of own leases and of those read.
    pub(crate) revocations: u64,
    /// Leases lost because the broker did not know them after a resumption.
    pub(crate) refused: u64,
    /// From a revocation's arrival to the last block moved, microseconds.
    pub(crate) drain: Histogram<u64>,
    /// From a revocation's arrival to its acknowledgement, microseconds.
    pub(crate) acknowledge: Histogram<u64>,
    /// Own leases now.
    pub(crate) own: u32,
    /// The bytes of those of HBM.
    pub(crate) own_bytes: u64,
    /// The bytes of those of host memory.
    pub(crate) own_host_bytes: u64,
    /// Replicas' leases mapped now.
    pub(crate) shared: u32,
}

/// A lease between its grant and its mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) hold: Hold,
    pub(super) medium: Medium,
    pub(super) bytes: u64,
    /// Revoked meanwhile: to be acknowledged instead of used.
    pub(super) revoked: bool,
    /// Refused meanwhile: to be dropped without a word.
    pub(super) refused: bool,
}

impl State {
    pub(super) fn new() -> Self {
        let histogram =
            || Histogram::new_with_max(LONGEST_US, 3).expect("constants that hdrhistogram accepts");
        Self {
            slabs: Slabs::default(),
            pending: HashMap::new(),
            grants_in_flight: 0,
            revoked_early: HashSet::new(),
            unreadable: Unreadable::default(),
            opening: HashSet::new(),
            slab_bytes: ByMedium::default(),
            asked_in_vain: ByMedium::default(),
            grow_after: Instant::now(),
            host_refused: false,
            map_pause: Duration::ZERO,
            unmapped: HashSet::new(),
            counts: Counts {
                revocations: 0,
                refused: 0,
                drain: histogram(),
                acknowledge: histogram(),
                own: 0,
                own_bytes: 0,
                own_host_bytes: 0,
                shared: 0,
            },
        }
    }

    /// Whether a granted slab is more than the `left` bytes that may be leased besides. Then those are not asked for again.
    pub(super) fn is_too_large(&mut self, medium: Medium, slab_bytes: u64, left: u64) -> bool {
        let too_large = slab_bytes > left;
        if too_large {
            let in_vain = self.asked_in_vain.of_mut(medium);
            *in_vain = left.max(*in_vain);
        }
        too_large
    }

    /// Own leases of a kind of memory, revoked ones that are not let go of yet and those about to be mapped included, bytes.
    pub(super) fn leased_bytes(&self, medium: Medium) -> u64 {
        let totals = self.slabs.totals();
        let pending = (self.pending.values())
            .filter(|pending| pending.hold == Hold::Own && pending.medium == medium)
            .map(|pending| pending.bytes);
        let known = totals.own_bytes.of(medium) - totals.refused_bytes.of(medium);
        known + pending.sum::<u64>()
    }

    /// What is mapped, to be claimed when the session resumes.
    pub(super) fn held(&self) -> Held {
        let slabs = self.slabs.iter();
        let mapped = slabs.filter_map(|slab| Some((slab.key?.lease, slab.hold)));
        let pending = self
            .pending
            .iter()
            .map(|(lease, pending)| (*lease, pending.hold));
        let mut held = Held::default();
        for (lease, hold) in mapped.chain(pending) {
            match hold {
                Hold::Own => held.leases.push(lease),
                Hold::Shared => held.shared.push(lease),
            }
        }
        held
    }

    pub(super) fn end_grant_call(&mut self) {
        self.grants_in_flight -= 1;
        if self.grants_in_flight == 0 {
            self.revoked_early.clear();
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let totals = self.slabs.totals();
        Counts {
            own: totals.own,
            own_bytes: totals.own_bytes.of(Medium::Hbm),
            own_host_bytes: totals.own_bytes.of(Medium::Host),
            shared: totals.shared,
            ..self.counts.clone()
        }
    }
}

/// The table of slabs, held: none closes before this goes. Whoever plans a transfer holds it from the first slab that is looked at
/// until the transfer is registered, so that a slab without a transfer has no copy in flight and gets none once it is closed.
pub(crate) struct Registering<'a>(pub(super) MutexGuard<'a, State>);

impl Registering<'_> {
    /// Registers a transfer with the slabs that it touches. None of its copies may be queued before. All slabs are open, but for
    /// one that its holder moves blocks out of.
    pub(crate) fn begin(&mut self, slabs: Vec<AreaId>) -> Arc<Flight> {
        let flight = Arc::new(Flight {
            slabs,
            ..Flight::default()
        });
        for id in &flight.slabs {
            if let Some(slab) = self.0.slabs.get_mut(*id) {
                slab.flights.push(Arc::clone(&flight));
            }
        }
        flight
    }
}

/// Microseconds since `since`, at least one.
pub(super) fn micros_since(since: Instant) -> u64 {
    let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(LONGEST_US);
    micros.clamp(1, LONGEST_US)
}
