//! The broker's state machine, and the one way to change it.

use std::collections::BTreeSet;

use swiftcache_proto::domain::{LeaseId, Link, RegionId, SessionId};

use super::{
    account::Account,
    attendance::{attach, detach, leave, process_gone, register},
    books::Books,
    config::{CoreConfig, Node},
    counters::Counters,
    disking::{disk_says, disk_takes},
    effect::{Effect, Note, Refusal, Reply},
    estates::{expire_estates, forget, inherit},
    event::{Caller, Event, Now, QuotaTarget},
    holding::{expire_holds, hold},
    keeping::keep,
    lending::lease,
    lookup::lookup,
    offering::offer,
    operator::{drain, evict, set_quota, undrain},
    process::Process,
    publishing::{publish, unpublish},
    record::Record,
    records::records,
    restore::{LedgerError, replay, settle},
    revocation::{acknowledge, close_drain_windows},
    scrubs::scrubbed,
    sharing::{Giving, release, share},
    views::{
        self, BlocksGone, DeviceView, DiskView, LeaseView, NamespaceView, RegionView, SessionView,
        WithdrawPreview,
    },
    watching::{self, Watched, Watcher},
    withdrawal::{Need, blocks_gone, host_left, preview, withdraw},
};

/// The most things a debug build checks after every event; larger states would make every event cost as much as the
/// state is large. Tests call [`State::check`] themselves.
const CHECKED_AFTER_EVERY_EVENT: usize = 512;

/// The broker's state machine. See the [module](super) for what goes in and what comes out.
#[derive(Clone, Debug)]
pub struct State {
    pub(super) books: Books,
    /// Restored from a ledger, and no event has told the time since.
    pub(super) unsettled: bool,
}

impl State {
    /// A node on which nothing is offered yet.
    pub fn new(config: CoreConfig, node: Node) -> Self {
        Self {
            books: Books::new(config, node),
            unsettled: false,
        }
    }

    /// Rebuilds the state that wrote these records. Sessions come back detached and regions without their handles;
    /// the index is empty. The caller watches [`State::processes`] before it listens.
    ///
    /// Every beginning of what one state wrote is accepted, so that a ledger cut off by a crash can be used.
    ///
    /// # Errors
    /// When a record contradicts those before it or names a device that `node` lacks.
    pub fn restore(
        config: CoreConfig,
        node: Node,
        all: impl IntoIterator<Item = Record>,
    ) -> Result<Self, LedgerError> {
        let mut state = Self::new(config, node);
        for (number, record) in (1..).zip(all) {
            replay(&mut state.books, record).map_err(|problem| LedgerError { number, problem })?;
        }
        state.books.sessions.forget_returned();
        state.unsettled = true;
        Ok(state)
    }

    /// The shortest ledger that restores this state.
    pub fn records(&self) -> Vec<Record> {
        records(&self.books)
    }

    /// Takes one event and says what to do about it, in order: all records come before the reply.
    ///
    /// A refused event changes nothing but the time. A `now` before an earlier one counts as that one.
    pub fn apply(&mut self, event: Event, now: Now) -> Vec<Effect> {
        let books = &mut self.books;
        books.now = books.now.max(now.0);
        if std::mem::take(&mut self.unsettled) {
            settle(books);
        }
        books.pins.expire(books.now);
        match dispatch(books, event) {
            Ok(Some(reply)) => books.out.push(Effect::Reply(reply)),
            Ok(None) => {}
            Err((refusal, answered)) => {
                books.note(Note::Refused {
                    refusal: refusal.clone(),
                });
                if answered {
                    books.out.push(Effect::Reply(Reply::Refused(refusal)));
                }
            }
        }
        if cfg!(debug_assertions) && books.size() <= CHECKED_AFTER_EVERY_EVENT {
            let broken = books.check(false).err();
            debug_assert!(broken.is_none(), "broken invariant: {broken:?}");
        }
        std::mem::take(&mut books.out)
    }

    /// Verifies every invariant. Costs as much as the state is large.
    ///
    /// # Errors
    /// Says which invariant does not hold, and where: always a bug of the core.
    pub fn check(&self) -> Result<(), String> {
        self.books.check(self.unsettled)
    }

    /// The node's devices, in the probe's order.
    pub fn devices(&self) -> Vec<DeviceView> {
        views::devices(&self.books)
    }

    /// The links between different devices.
    pub fn links(&self) -> Vec<Link> {
        self.books.devices.links()
    }

    /// The sum over all devices.
    pub fn total(&self) -> Account {
        let mut total = Account::default();
        for shelf in self.books.regions.shelves() {
            total += shelf.account();
        }
        total
    }

    /// Of the free bytes of all devices: what drains keep from being lent.
    pub fn drained_bytes(&self) -> u64 {
        let shelves = self.books.regions.shelves().iter();
        shelves.map(|shelf| shelf.drained_bytes()).sum()
    }

    /// How many donors an operator drains.
    pub fn drained_donors(&self) -> usize {
        self.books.regions.drained_donors().len()
    }

    /// Totals since the broker started.
    pub fn counters(&self) -> Counters {
        self.books.counters
    }

    /// All disks, by tenant and name.
    pub fn disks(&self) -> Vec<DiskView> {
        let disks = self.books.disks.iter();
        let mut all: Vec<DiskView> = disks.map(|(id, disk)| views::disk(id, disk)).collect();
        all.sort_by(|a, b| (&a.tenant, &a.name).cmp(&(&b.tenant, &b.name)));
        all
    }

    /// Blocks that a lookup can find in leases.
    pub fn indexed_blocks(&self) -> u64 {
        self.books.index.blocks()
    }

    /// The number of the last change of the index, which counts from 1.
    pub fn sequence(&self) -> u64 {
        self.books.journal.sequence()
    }

    /// Reads on in the index and its changes, at most `most` entries.
    pub fn watch(&self, watcher: &mut Watcher, most: usize) -> Watched {
        watching::watch(&self.books, watcher, most)
    }

    /// The processes whose death must be watched for.
    pub fn processes(&self) -> impl Iterator<Item = Process> {
        self.books.sessions.processes()
    }

    /// Whether a process has a session that is not over.
    pub fn knows(&self, process: Process) -> bool {
        self.books.sessions.knows(process)
    }

    /// The processes of which no session has its stream up.
    pub fn detached_processes(&self) -> Vec<Process> {
        self.books.sessions.detached_processes().collect()
    }

    /// How many sessions are not over.
    pub fn session_count(&self) -> usize {
        self.books.sessions.live()
    }

    /// How many regions there are.
    pub fn region_count(&self) -> usize {
        self.books.regions.len()
    }

    /// How many leases somebody holds.
    pub fn lease_count(&self) -> usize {
        self.books.leases.len()
    }

    /// Sessions that are not over, by id, from the one after `after` on.
    pub fn sessions_after(&self, after: Option<SessionId>) -> impl Iterator<Item = SessionView> {
        let sessions = self.books.sessions.live_after(after);
        sessions.map(|(id, session)| views::session(&self.books, id, session))
    }

    /// Sessions that are not over, by id.
    pub fn sessions(&self) -> impl Iterator<Item = SessionView> {
        self.sessions_after(None)
    }

    /// One session, if it is known and not over.
    pub fn session(&self, id: SessionId) -> Option<SessionView> {
        let session = self.books.sessions.get(id);
        let session = session.filter(|session| !session.is_over())?;
        Some(views::session(&self.books, id, session))
    }

    /// Regions by id, from the one after `after` on.
    pub fn regions_after(&self, after: Option<RegionId>) -> impl Iterator<Item = RegionView> {
        let regions = self.books.regions.after(after);
        regions.map(|(key, region)| views::region(&self.books, key, region))
    }

    /// Regions by id.
    pub fn regions(&self) -> impl Iterator<Item = RegionView> {
        self.regions_after(None)
    }

    /// Leases by id, from the one after `after` on.
    pub fn leases_after(&self, after: Option<LeaseId>) -> impl Iterator<Item = LeaseView> {
        let leases = self.books.leases.after(after);
        leases.map(|(key, lease)| views::lease(&self.books, key, lease))
    }

    /// Leases by id.
    pub fn leases(&self) -> impl Iterator<Item = LeaseView> {
        self.leases_after(None)
    }

    /// Namespaces by tenant and name, from the one after `after` on.
    pub fn namespaces_after<'a>(
        &'a self,
        after: Option<(&'a str, &'a str)>,
    ) -> impl Iterator<Item = NamespaceView> {
        let namespaces = self.books.index.after(after);
        namespaces.map(|(_, namespace)| views::namespace(&self.books, namespace))
    }

    /// Namespaces by tenant and name.
    pub fn namespaces(&self) -> impl Iterator<Item = NamespaceView> {
        self.namespaces_after(None)
    }

    /// What operators set as quotas, bytes.
    pub fn quotas(&self) -> impl Iterator<Item = (&QuotaTarget, u64)> {
        self.books.quotas.iter()
    }

    /// The regions that `Withdraw` by bytes would choose now, and the leases it would revoke.
    ///
    /// # Errors
    /// When the device or the donor is unknown, or `bytes` is 0.
    pub fn preview_withdraw(&self, need: &Need) -> Result<WithdrawPreview, Refusal> {
        let books = &self.books;
        let (regions, leases) = preview(books, need)?;
        let of_disks = leases.iter().map(|key| books.leases.get(*key).terms());
        let of_disks = of_disks.filter(|terms| books.disks.get(terms.lessee).is_some());
        let disk_bytes = of_disks.map(|terms| terms.bytes).sum();
        let host_left_bytes = host_left(books, &regions);
        let leases = leases.into_iter().map(|key| (key, books.leases.get(key)));
        let regions = regions.into_iter().map(|key| (key, books.regions.get(key)));
        Ok(WithdrawPreview {
            regions: regions
                .map(|(key, region)| views::region(books, key, region))
                .collect(),
            leases: leases
                .map(|(key, lease)| views::lease(books, key, lease))
                .collect(),
            disk_bytes,
            host_left_bytes,
        })
    }

    /// What of a lease's blocks nobody would find in memory without the leases of `going`, of which it is one. A block that lies in
    /// several of them counts in the first of them.
    pub fn blocks_gone(&self, lease: LeaseId, going: &BTreeSet<LeaseId>) -> BlocksGone {
        blocks_gone(&self.books, lease, going)
    }

    /// Whether the caller speaks for its session.
    ///
    /// # Errors
    /// When there is no such session, or it is another process's.
    pub fn check_caller(&self, caller: Caller) -> Result<(), Refusal> {
        self.books.sessions.of(caller).map(drop)
    }
}

/// The reply, if the event is one that is answered; a refusal, and whether it is a reply.
fn dispatch(books: &mut Books, event: Event) -> Result<Option<Reply>, (Refusal, bool)> {
    let reply = match event {
        Event::Register(it) => register(books, it),
        Event::Attach(caller) => {
            let attached = attach(books, caller);
            return attached.map(|()| None).map_err(|refusal| (refusal, true));
        }
        Event::Detach(session) => {
            detach(books, session);
            return Ok(None);
        }
        Event::Leave(caller) => leave(books, caller),
        Event::ProcessGone(process) => {
            process_gone(books, process);
            return Ok(None);
        }
        Event::Offer(it) => offer(books, it),
        Event::Withdraw(it) => withdraw(books, it),
        Event::Lease(demand) => lease(books, demand),
        Event::Release {
            caller,
            leases,
            unmappable,
            bequeath,
        } => release(books, caller, &leases, Giving::of(unmappable, bequeath)),
        Event::Inherit(demand) => inherit(books, &demand),
        Event::Share {
            caller,
            lease,
            device,
        } => share(books, caller, lease, &device),
        Event::Publish(it) => publish(books, it),
        Event::Unpublish {
            caller,
            lease,
            generation,
            slots,
        } => unpublish(books, caller, lease, generation, &slots),
        Event::Lookup(it) => lookup(books, &it),
        Event::Keep(it) => keep(books, it),
        Event::DiskSays(it) => disk_says(books, it),
        Event::DiskTakes(it) => disk_takes(books, &it),
        Event::Acknowledge {
            caller,
            lease,
            generation,
        } => return unanswered(acknowledge(books, caller, lease, generation)),
        Event::Scrubbed {
            caller,
            region,
            slab,
            generation,
        } => return unanswered(scrubbed(books, caller, region, slab, generation)),
        Event::Unpin { caller, pins } => {
            let known = books.sessions.of(caller).map(drop);
            return unanswered(known.map(|()| books.pins.end(caller.session, &pins)));
        }
        Event::Drain { target, drain_ms } => drain(books, target, drain_ms),
        Event::Undrain(target) => undrain(books, &target),
        Event::Evict(target) => evict(books, &target),
        Event::Forget(which) => forget(books, &which),
        Event::SetQuota(set) => set_quota(books, set),
        Event::Hold(demand) => hold(books, demand),
        Event::Tick => {
            close_drain_windows(books);
            books.claims.expire_waits(books.now);
            expire_holds(books);
            expire_estates(books);
            return Ok(None);
        }
    };
    reply.map(Some).map_err(|refusal| (refusal, true))
}

fn unanswered(done: Result<(), Refusal>) -> Result<Option<Reply>, (Refusal, bool)> {
    done.map(|()| None).map_err(|refusal| (refusal, false))
}
