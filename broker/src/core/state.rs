//! The whole of the broker's knowledge, and the one way to change it.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::domain::{AllocationId, LeaseId, RegionId, SessionId};

use super::{
    CoreConfig, Counters, Effect, Event, Node, Note, Now, Process, QuotaTarget, Refusal, Reply,
    arena::{Arena, Key},
    borrowers::Borrowers,
    devices::Devices,
    fairness::Wait,
    index::Index,
    leases::Lease,
    pins::Pins,
    regions::Region,
    sessions::Session,
};

/// The most things a debug build checks after every event; larger states would make every event cost as much as the
/// state is large. Tests call [`State::check`] themselves.
const CHECKED_AFTER_EVERY_EVENT: usize = 512;

/// The broker's state machine. See the [module](super) for what goes in and what comes out.
#[derive(Clone, Debug)]
pub struct State {
    pub(super) config: CoreConfig,
    pub(super) devices: Devices,
    /// Sessions, and those that are over but have regions to get back.
    pub(super) sessions: BTreeMap<SessionId, Session>,
    /// The processes with a session that is not over.
    pub(super) processes: BTreeMap<Process, BTreeSet<SessionId>>,
    pub(super) regions: Arena<Region>,
    pub(super) region_ids: BTreeMap<RegionId, Key<Region>>,
    /// The regions of each allocation, by offset.
    pub(super) allocations: BTreeMap<AllocationId, BTreeMap<u64, Key<Region>>>,
    /// Slabs of all regions.
    pub(super) slabs: usize,
    pub(super) leases: Arena<Lease>,
    pub(super) lease_ids: BTreeMap<LeaseId, Key<Lease>>,
    pub(super) next_lease: u64,
    /// Revoked leases by when their drain window closes, milliseconds.
    pub(super) draining: BTreeSet<(u64, LeaseId)>,
    pub(super) index: Index,
    pub(super) borrowers: Borrowers,
    pub(super) pins: Pins,
    pub(super) waits: BTreeMap<SessionId, Wait>,
    /// Labels of the donors an operator drains.
    pub(super) drained_donors: BTreeSet<String>,
    /// What operators set, in place of what is configured, bytes.
    pub(super) quotas: BTreeMap<QuotaTarget, u64>,
    pub(super) counters: Counters,
    /// The latest time heard of, milliseconds.
    pub(super) now: u64,
    /// Restored from a ledger, and no event has told the time since.
    pub(super) unsettled: bool,
    /// Until when pins of the broker before this one may be read under, milliseconds.
    pub(super) grace_until: u64,
    /// What the event under way has led to so far.
    pub(super) out: Vec<Effect>,
}

impl State {
    /// A node on which nothing is offered yet.
    pub fn new(config: CoreConfig, node: Node) -> Self {
        Self {
            devices: Devices::new(node),
            sessions: BTreeMap::new(),
            processes: BTreeMap::new(),
            regions: Arena::default(),
            region_ids: BTreeMap::new(),
            allocations: BTreeMap::new(),
            slabs: 0,
            leases: Arena::default(),
            lease_ids: BTreeMap::new(),
            next_lease: 1,
            draining: BTreeSet::new(),
            index: Index::default(),
            borrowers: Borrowers::default(),
            pins: Pins::new(config.pin_base),
            waits: BTreeMap::new(),
            drained_donors: BTreeSet::new(),
            quotas: BTreeMap::new(),
            counters: Counters::default(),
            now: 0,
            unsettled: false,
            grace_until: 0,
            out: Vec::new(),
            config,
        }
    }

    /// Takes one event and says what to do about it, in order: all records come before the reply.
    ///
    /// A refused event changes nothing but the time. A `now` before an earlier one counts as that one.
    pub fn apply(&mut self, event: Event, now: Now) -> Vec<Effect> {
        self.now = self.now.max(now.0);
        if std::mem::take(&mut self.unsettled) {
            self.settle();
        }
        self.expire_pins();
        match self.dispatch(event) {
            Ok(Some(reply)) => self.out.push(Effect::Reply(reply)),
            Ok(None) => {}
            Err((refusal, answered)) => {
                self.note(Note::Refused {
                    refusal: refusal.clone(),
                });
                if answered {
                    self.out.push(Effect::Reply(Reply::Refused(refusal)));
                }
            }
        }
        if cfg!(debug_assertions) && self.size() <= CHECKED_AFTER_EVERY_EVENT {
            let broken = self.check().err();
            debug_assert!(broken.is_none(), "broken invariant: {broken:?}");
        }
        std::mem::take(&mut self.out)
    }

    /// The reply, if the event is one that is answered; a refusal, and whether it is a reply.
    fn dispatch(&mut self, event: Event) -> Result<Option<Reply>, (Refusal, bool)> {
        let reply = match event {
            Event::Register(register) => self.register(register),
            Event::Attach(caller) => {
                let attached = self.attach(caller);
                return attached.map(|()| None).map_err(|refusal| (refusal, true));
            }
            Event::Detach(session) => {
                self.detach(session);
                return Ok(None);
            }
            Event::Leave(caller) => self.leave(caller),
            Event::ProcessGone(process) => {
                self.process_gone(process);
                return Ok(None);
            }
            Event::Offer(offer) => self.offer(offer),
            Event::Withdraw(withdraw) => self.withdraw(withdraw),
            Event::Lease(demand) => self.lease(demand),
            Event::Release {
                caller,
                leases,
                unmappable,
            } => self.release(caller, &leases, unmappable),
            Event::Share {
                caller,
                lease,
                device,
            } => self.share(caller, lease, &device),
            Event::Publish(publish) => self.publish(publish),
            Event::Unpublish {
                caller,
                lease,
                generation,
                slots,
            } => self.unpublish(caller, lease, generation, &slots),
            Event::Lookup(lookup) => self.lookup(lookup),
            Event::Keep(keep) => self.keep(keep),
            Event::Acknowledge {
                caller,
                lease,
                generation,
            } => return unanswered(self.acknowledge(caller, lease, generation)),
            Event::Scrubbed {
                caller,
                region,
                slab,
                generation,
            } => return unanswered(self.scrubbed(caller, region, slab, generation)),
            Event::Unpin { caller, pins } => return unanswered(self.unpin(caller, &pins)),
            Event::Drain { target, drain_ms } => self.drain(target, drain_ms),
            Event::Undrain(target) => self.undrain(&target),
            Event::Evict(target) => self.evict(&target),
            Event::SetQuota(set) => self.set_quota(set),
            Event::Hold(demand) => self.hold(demand),
            Event::Tick => {
                self.close_drain_windows();
                self.expire_waits();
                self.expire_holds();
                return Ok(None);
            }
        };
        reply.map(Some).map_err(|refusal| (refusal, true))
    }

    pub(super) fn note(&mut self, note: Note) {
        self.out.push(Effect::Note(note));
    }

    /// How much there is to check.
    fn size(&self) -> usize {
        self.sessions.len()
            + self.slabs
            + self.leases.len()
            + self.pins.live.len()
            + self.index.blocks() as usize
            + self.borrowers.kept() as usize
    }
}

fn unanswered(done: Result<(), Refusal>) -> Result<Option<Reply>, (Refusal, bool)> {
    done.map(|()| None).map_err(|refusal| (refusal, false))
}
