use std::{
    io,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Condvar, Mutex as StdMutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use swiftcache_proto::domain::{
    AllocationId, BlockHash, Device, FoundRun, Handle, LeaseId, Link, LinkKind, OpaqueHandle,
    RegionId, Shortfall,
};

use super::*;
use crate::{
    core::{
        Connection, CoreConfig, Grant, LeaseDemand, LeaseView, Lookup, Node, Offer, Publish,
        Record, Withdraw, WithdrawWhat,
    },
    ledger::Storage,
    scrape,
};

const SLAB: u64 = 64 << 10;
const REGION: RegionId = RegionId([1; 16]);
/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Storage of a ledger in memory, which a test can make full and read.
#[derive(Clone, Default)]
struct Paper {
    lines: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
    /// Whoever writes waits while this is true.
    busy: Arc<(StdMutex<bool>, Condvar)>,
    /// How many writes have begun.
    begun: Arc<AtomicUsize>,
}

impl Paper {
    fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    fn begin(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let (busy, over) = &*self.busy;
        let _idle = over.wait_while(busy.lock().unwrap(), |busy| *busy).unwrap();
    }

    fn set_busy(&self, busy: bool) {
        *self.busy.0.lock().unwrap() = busy;
        self.busy.1.notify_all();
    }

    /// How many writes have begun.
    fn begun(&self) -> usize {
        self.begun.load(Ordering::SeqCst)
    }

    /// Waits until one more write than these has begun.
    async fn wait_for_a_write_after(&self, before: usize) {
        let since = Instant::now();
        while self.begun() == before {
            assert!(since.elapsed() < PATIENCE, "nothing is written");
            tokio::task::yield_now().await;
        }
    }

    fn check(&self) -> io::Result<()> {
        match self.full.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn records(&self) -> Vec<Record> {
        let lines = self.lines.lock();
        let lines = lines.split(|byte| *byte == b'\n');
        lines
            .filter(|line| !line.is_empty())
            .map(|line| {
                let text = line.split(|byte| *byte == b'\t').next().unwrap();
                serde_json::from_slice(text).unwrap()
            })
            .collect()
    }
}

impl Storage for Paper {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.begin();
        self.check()?;
        self.lines.lock().extend_from_slice(bytes);
        Ok(())
    }

    fn replace(&mut self, records: &[u8]) -> io::Result<u64> {
        self.begin();
        self.check()?;
        *self.lines.lock() = records.to_vec();
        Ok(records.len() as u64)
    }
}

fn node() -> Node {
    let uuid = |name: &str| name.parse().unwrap();
    let device = |name| Device {
        uuid: uuid(name),
        name: name.to_owned(),
        hbm_bytes: 64 << 30,
        ordinal: 0,
    };
    let link = |from, to| Link {
        from: uuid(from),
        to: uuid(to),
        kind: LinkKind::Nvlink,
        bytes_per_second: 1,
    };
    Node {
        devices: vec![device("A"), device("B")],
        links: vec![link("A", "B"), link("B", "A")],
    }
}

/// An owner, the storage of its ledger, and this process as a peer.
struct World {
    owner: Arc<Owner>,
    paper: Paper,
    peer: Peer,
    _deaths: mpsc::UnboundedReceiver<Process>,
    _socket: UnixStream,
}

impl World {
    fn new() -> Self {
        let paper = Paper::default();
        let (gone, deaths) = mpsc::unbounded_channel();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let owner = Owner::new(Parts {
            state: State::new(CoreConfig::default(), node()),
            ledger: Ledger::new(Path::new("paper"), Box::new(paper.clone())),
            deaths: gone,
            max_descriptors: 8,
            metrics: Arc::new(Metrics::new().unwrap()),
        });
        Self {
            owner: Arc::new(owner),
            paper,
            peer: Peer::of(&ours).unwrap(),
            _deaths: deaths,
            _socket: theirs,
        }
    }

    /// A world with slabs on offer, and who wants to lease them.
    async fn with_slabs(slabs: u64) -> (Arc<Self>, Caller) {
        let world = Self::new();
        let (donor, borrower) = (world.register("1").await, world.register("1").await);
        world.offer(donor, slabs).await;
        (Arc::new(world), borrower)
    }

    /// From now on the ledger's disk does not answer. Returns when a lease of one slab waits for it.
    async fn lease_and_wait(
        self: &Arc<Self>,
        caller: Caller,
    ) -> tokio::task::JoinHandle<Result<Reply, Refused>> {
        let before = self.paper.begun();
        self.paper.set_busy(true);
        let lease = self.spawn_lease(caller);
        self.paper.wait_for_a_write_after(before).await;
        lease
    }

    /// Leases a slab on the threads that serve.
    fn spawn_lease(&self, caller: Caller) -> tokio::task::JoinHandle<Result<Reply, Refused>> {
        let owner = Arc::clone(&self.owner);
        tokio::spawn(async move { owner.apply(demand(caller, 1)).await })
    }

    async fn register(&self, tenant: &str) -> Caller {
        let register = Register {
            process: self.peer.process,
            fresh_id: SessionId(rand::random()),
            name: "member".to_owned(),
            tenant: tenant.to_owned(),
            resume: None,
            held: vec![],
            shared: vec![],
            connection: Connection::default(),
        };
        match self.owner.register(self.peer.clone(), register).await {
            Ok(Reply::Registered { session, .. }) => Caller {
                session,
                connection: Connection::default(),
                process: self.peer.process,
            },
            other => panic!("{other:?}"),
        }
    }

    async fn offer(&self, caller: Caller, slabs: u64) {
        let offer = Offer {
            caller,
            region: REGION,
            device: "A".parse().unwrap(),
            allocation: AllocationId([1; 16]),
            offset: 0,
            bytes: slabs * SLAB,
            slab_bytes: SLAB,
            handle: Handle::CudaIpc(OpaqueHandle([0; 64])),
            shared: true,
            elastic: false,
        };
        self.owner.offer(offer, false).await.unwrap();
    }

    async fn lease(&self, caller: Caller, slabs: u64) -> Result<Reply, Refused> {
        self.owner.apply(demand(caller, slabs)).await
    }

    async fn share(
        &self,
        caller: Caller,
        lease: swiftcache_proto::domain::LeaseId,
    ) -> Result<Reply, Refused> {
        let device = "B".parse().unwrap();
        let share = Event::Share {
            caller,
            lease,
            device,
        };
        self.owner.apply(share).await
    }

    async fn publish(&self, caller: Caller, grant: &Grant) -> Result<Reply, Refused> {
        let publish = Publish {
            caller,
            lease: grant.lease,
            generation: grant.generation,
            blocks: vec![(BlockHash([1; 16]), 0)],
        };
        self.owner.apply(Event::Publish(publish)).await
    }

    /// How many blocks a lookup finds for the caller.
    async fn found(&self, caller: Caller) -> usize {
        let lookup = Lookup {
            caller,
            namespace: "model".to_owned(),
            hashes: vec![BlockHash([1; 16])],
            device: Some("B".parse().unwrap()),
            borrower: None,
            unpinned: false,
            host_memory: false,
        };
        match self.owner.apply(Event::Lookup(lookup)).await {
            Ok(Reply::Found { runs, pin, .. }) => {
                assert_eq!(pin.is_some(), !runs.is_empty());
                let blocks = runs.iter().map(|run| match run {
                    FoundRun::Leased { extent, .. } => extent.count,
                    FoundRun::Kept { count } => *count,
                });
                blocks.sum::<u32>() as usize
            }
            other => panic!("{other:?}"),
        }
    }

    /// Waits until everything that was begun at the desk is over.
    async fn settle(&self) {
        // What was spawned before this has had its turn.
        tokio::spawn(async {}).await.unwrap();
        self.owner.tick().await;
    }

    fn leased(&self) -> u64 {
        self.owner.read(|state| state.total().leased) / SLAB
    }

    /// The state that a restarted broker would start with now.
    fn restarted(&self) -> State {
        State::restore(CoreConfig::default(), node(), self.paper.records()).unwrap()
    }
}

fn demand(caller: Caller, slabs: u64) -> Event {
    Event::Lease(LeaseDemand {
        caller,
        namespace: "model".to_owned(),
        device: "B".parse().unwrap(),
        bytes: slabs * SLAB,
        block_bytes: SLAB,
        class: Default::default(),
        host_bytes: 0,
    })
}

fn grants(reply: Result<Reply, Refused>) -> Vec<Grant> {
    match reply {
        Ok(Reply::Leased { grants, .. }) => grants,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lease_that_cannot_be_recorded_is_not_granted() {
    let world = World::new();
    let (donor, borrower) = (world.register("1").await, world.register("1").await);
    world.offer(donor, 4).await;
    world.paper.set_full(true);
    for _ in 0..2 {
        let refused = world.lease(borrower, 2).await.unwrap_err();
        assert!(matches!(refused, Refused::Unrecorded { .. }), "{refused}");
        assert_eq!(world.leased(), 0);
    }
    assert_eq!(world.restarted().leases().count(), 0);

    world.paper.set_full(false);
    assert_eq!(grants(world.lease(borrower, 2).await).len(), 2);
    assert_eq!(world.leased(), 2);
    assert_eq!(world.restarted().leases().count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_share_that_cannot_be_recorded_is_not_granted() {
    let world = World::new();
    let (donor, writer) = (world.register("1").await, world.register("1").await);
    let reader = world.register("1").await;
    world.offer(donor, 1).await;
    let lease = grants(world.lease(writer, 1).await)[0].lease;
    let readers = || {
        world
            .owner
            .read(|state| state.leases().next().unwrap().readers)
    };
    world.paper.set_full(true);
    let refused = world.share(reader, lease).await.unwrap_err();
    assert!(matches!(refused, Refused::Unrecorded { .. }), "{refused}");
    assert_eq!(readers(), 0);
    world.paper.set_full(false);
    world.share(reader, lease).await.unwrap();
    assert_eq!(readers(), 1);
    assert_eq!(world.restarted().leases().next().unwrap().readers, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn letting_go_works_while_nothing_can_be_recorded_and_the_ledger_catches_up() {
    let world = World::new();
    let (donor, borrower) = (world.register("1").await, world.register("1").await);
    world.offer(donor, 2).await;
    let lease = grants(world.lease(borrower, 1).await)[0].lease;
    world.paper.set_full(true);
    let release = Event::Release {
        caller: borrower,
        leases: vec![lease],
        unmappable: false,
        bequeath: false,
    };
    world.owner.apply(release).await.unwrap();
    assert_eq!(world.leased(), 0);
    assert_eq!(
        world.restarted().leases().count(),
        1,
        "not recorded before the tick"
    );
    world.paper.set_full(false);
    world.owner.tick().await;
    assert_eq!(world.restarted().leases().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_scrub_that_is_not_recorded_waits_until_it_is() {
    let world = World::new();
    let donor = world.register("1").await;
    let (first, second) = (world.register("1").await, world.register("2").await);
    world.offer(donor, 1).await;
    let lease = grants(world.lease(first, 1).await)[0].lease;
    let release = Event::Release {
        caller: first,
        leases: vec![lease],
        unmappable: false,
        bequeath: false,
    };
    world.owner.apply(release).await.unwrap();
    let mut stream = world.owner.attach(donor).await.unwrap();

    world.paper.set_full(true);
    world.lease(second, 1).await.unwrap_err();
    assert!(
        stream.receiver.try_recv().is_err(),
        "a scrub was sent and not recorded"
    );
    world.paper.set_full(false);
    world.owner.tick().await;
    assert!(
        stream.receiver.recv().await.is_none(),
        "the stream must end, so that the donor attaches again"
    );
    let stream = world.owner.attach(donor).await.unwrap();
    let scrub = &stream.outstanding[0].message;
    assert!(
        matches!(scrub, Some(v1::session_response::Message::Scrub(_))),
        "{scrub:?}"
    );
    let shortfall = match world.lease(second, 1).await {
        Ok(Reply::Leased { shortfall, .. }) => shortfall,
        other => panic!("{other:?}"),
    };
    assert_eq!(shortfall, Shortfall::Scrubbing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reader_too_slow_loses_its_stream_and_gets_everything_from_the_next() {
    let slabs = 16_384 + 1;
    let world = World::new();
    let (donor, borrower) = (world.register("1").await, world.register("1").await);
    world.offer(donor, slabs).await;
    let mut held = 0;
    while held < slabs {
        held += grants(world.lease(borrower, slabs - held).await).len() as u64;
    }
    let slow = world.owner.attach(borrower).await.unwrap();
    let attached = || {
        let look = |state: &State| state.session(borrower.session).unwrap().attached;
        world.owner.read(look)
    };
    assert!(attached());
    let withdraw = Withdraw {
        caller: donor,
        what: WithdrawWhat::Regions(vec![REGION]),
        drain_ms: 1_000,
    };
    world.owner.apply(Event::Withdraw(withdraw)).await.unwrap();
    assert!(!attached());
    let next = world.owner.attach(borrower).await.unwrap();
    assert_eq!(next.outstanding.len() as u64, slabs);
    drop(slow);
    world.settle().await;
    assert!(
        attached(),
        "the end of the old stream must not end the new one"
    );
    drop(next);
    world.settle().await;
    assert!(!attached());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_broker_on_its_way_out_takes_nobody_in() {
    let world = World::new();
    let member = world.register("1").await;
    let mut stream = world.owner.attach(member).await.unwrap();
    world.owner.close().await;
    assert!(stream.receiver.recv().await.is_none());
    let refused = world.owner.attach(member).await.err();
    assert_eq!(refused, Some(Refused::ShuttingDown));
}

/// The thread that serves waits for the disk, so another one has taken its place. Another grant waits for the first one,
/// so the ledger's order is the order of the grants.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lookup_is_answered_while_a_grant_is_being_recorded() {
    let (world, borrower) = World::with_slabs(3).await;
    let grant = grants(world.lease(borrower, 1).await).remove(0);
    let recorded = world.lease_and_wait(borrower).await;
    let next = world.spawn_lease(borrower);
    let meanwhile = tokio::spawn({
        let world = Arc::clone(&world);
        async move {
            assert_eq!(world.found(borrower).await, 0);
            world.publish(borrower, &grant).await.unwrap();
            assert_eq!(world.found(borrower).await, 1);
            let seen = world.owner.read(|state| state.leases().count());
            assert_eq!(seen, 2, "a list shows what is being recorded");
            world.owner.connections();
            scrape::render(&world.owner);
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        }
    });
    let answered = tokio::time::timeout(PATIENCE, meanwhile).await;
    answered.expect("a lookup waits for the ledger").unwrap();
    assert!(!recorded.is_finished(), "a grant left unrecorded");
    assert!(
        !next.is_finished(),
        "a grant overtook one that is being recorded"
    );
    world.paper.set_busy(false);
    for granted in [recorded, next] {
        assert_eq!(grants(granted.await.unwrap()).len(), 1);
    }
    assert_eq!(world.restarted().leases().count(), 3);
}

/// The twin: where no other thread takes the place of the one that serves, a lookup waits for the ledger.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn at_a_desk_that_keeps_its_thread_a_lookup_waits_for_the_ledger() {
    let (world, borrower) = World::with_slabs(1).await;
    let before = world.paper.begun();
    world.paper.set_busy(true);
    let lease = tokio::spawn({
        let world = Arc::clone(&world);
        async move {
            let mut desk = world.owner.desk.lock();
            grants(desk.handle(&world.owner, demand(borrower, 1)))
        }
    });
    world.paper.wait_for_a_write_after(before).await;
    let lookup = tokio::spawn({
        let world = Arc::clone(&world);
        async move { world.found(borrower).await }
    });
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
    assert!(!lookup.is_finished(), "the twin shows nothing");
    world.paper.set_busy(false);
    assert_eq!(lookup.await.unwrap(), 0);
    assert_eq!(lease.await.unwrap().len(), 1);
}

/// What goes wrong with one event leaves the desk to the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_panic_at_the_desk_is_that_callers_alone() {
    let (world, borrower) = World::with_slabs(1).await;
    let broken = world.owner.at_desk(|_, _| panic!("a bug")).await;
    assert_eq!(broken, Err::<(), _>(Refused::Bug));
    assert_eq!(grants(world.lease(borrower, 1).await).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lookup_is_answered_while_the_ledger_is_rewritten() {
    let (world, borrower) = World::with_slabs(2).await;
    let grant = grants(world.lease(borrower, 1).await).remove(0);
    world.publish(borrower, &grant).await.unwrap();
    world.paper.set_full(true);
    world.lease(borrower, 1).await.unwrap_err();
    world.paper.set_full(false);
    let before = world.paper.begun();
    world.paper.set_busy(true);
    let owner = Arc::clone(&world.owner);
    let tick = tokio::spawn(async move { owner.tick().await });
    world.paper.wait_for_a_write_after(before).await;
    let lookup = tokio::spawn({
        let world = Arc::clone(&world);
        async move { world.found(borrower).await }
    });
    let found = tokio::time::timeout(PATIENCE, lookup).await;
    assert_eq!(found.expect("a lookup waits for the ledger").unwrap(), 1);
    assert!(!tick.is_finished());
    world.paper.set_busy(false);
    tick.await.unwrap();
    assert_eq!(world.restarted().leases().count(), 1);
}

/// A list lets a lookup through after its first page. The twin within reads it at once, and does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lookup_is_answered_between_two_pages_of_a_list() {
    let slabs = 2 * PAGE as u64 + 1;
    let world = World::new();
    let (donor, borrower) = (world.register("1").await, world.register("1").await);
    world.offer(donor, slabs).await;
    let mut held = 0;
    while held < slabs {
        held += grants(world.lease(borrower, slabs - held).await).len() as u64;
    }
    let read = AtomicUsize::new(0);
    let page = |state: &State, after: Option<&LeaseId>| {
        let page: Vec<_> = state.leases_after(after.copied()).take(PAGE).collect();
        read.fetch_add(page.len(), Ordering::Relaxed);
        page
    };
    let list = (world.owner).list(None, usize::MAX, page, |view: &LeaseView| view.id, |_| true);
    let lookup = async {
        world.found(borrower).await;
        read.load(Ordering::Relaxed)
    };
    let ((list, _), before) = tokio::join!(list, lookup);
    assert_eq!(
        before, PAGE,
        "how much of the list was read before the lookup"
    );
    let ids: Vec<_> = list.iter().map(|view| view.id).collect();
    let whole = async { (world.owner).read(|state| state.leases().map(|view| view.id).collect()) };
    let read = AtomicUsize::new(0);
    let whole = async {
        let all: Vec<_> = whole.await;
        read.store(all.len(), Ordering::Relaxed);
        all
    };
    let lookup = async {
        world.found(borrower).await;
        read.load(Ordering::Relaxed)
    };
    let (all, before) = tokio::join!(whole, lookup);
    assert_eq!(before, all.len(), "the twin shows nothing");
    assert_eq!(ids, all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_caller_stops_waiting_for_happens_all_the_same() {
    let (world, borrower) = World::with_slabs(1).await;
    let lease = world.lease_and_wait(borrower).await;
    lease.abort();
    world.paper.set_busy(false);
    drop(lease.await);
    world.settle().await;
    assert_eq!(world.restarted().leases().count(), 1);
}
