use std::{
    io,
    os::unix::net::UnixStream,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use swiftcache_proto::domain::{
    AllocationId, Device, Handle, Link, LinkKind, OpaqueHandle, RegionId, Shortfall,
};

use super::*;
use crate::{
    core::{CoreConfig, LeaseDemand, Node, Offer, Withdraw, WithdrawWhat},
    ledger::Storage,
};

const SLAB: u64 = 64 << 10;
const REGION: RegionId = RegionId([1; 16]);

/// Storage of a ledger in memory, which a test can make full and read.
#[derive(Clone, Default)]
struct Paper {
    lines: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
}

impl Paper {
    fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
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
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect()
    }
}

impl Storage for Paper {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.check()?;
        self.lines.lock().extend_from_slice(bytes);
        Ok(())
    }

    fn replace(&mut self, records: &[u8]) -> io::Result<u64> {
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

    fn register(&self, tenant: &str) -> Caller {
        let register = Register {
            process: self.peer.process,
            fresh_id: SessionId(rand::random()),
            name: "member".to_owned(),
            tenant: tenant.to_owned(),
            resume: None,
            held: vec![],
            shared: vec![],
        };
        match self.owner.register(&self.peer, register) {
            Ok(Reply::Registered { session, .. }) => Caller {
                session,
                process: self.peer.process,
            },
            other => panic!("{other:?}"),
        }
    }

    fn offer(&self, caller: Caller, slabs: u64) {
        let offer = Offer {
            caller,
            region: REGION,
            device: "A".parse().unwrap(),
            allocation: AllocationId([1; 16]),
            offset: 0,
            bytes: slabs * SLAB,
            slab_bytes: SLAB,
            handle: Handle::CudaIpc(OpaqueHandle([0; 64])),
        };
        self.owner.apply(Event::Offer(offer)).unwrap();
    }

    fn lease(&self, caller: Caller, slabs: u64) -> Result<Reply, Refused> {
        self.owner.apply(Event::Lease(LeaseDemand {
            caller,
            namespace: "model".to_owned(),
            device: "B".parse().unwrap(),
            bytes: slabs * SLAB,
            block_bytes: SLAB,
        }))
    }

    fn share(
        &self,
        caller: Caller,
        lease: swiftcache_proto::domain::LeaseId,
    ) -> Result<Reply, Refused> {
        self.owner.apply(Event::Share {
            caller,
            lease,
            device: "B".parse().unwrap(),
        })
    }

    fn leased(&self) -> u64 {
        self.owner.read(|state| state.total().leased) / SLAB
    }

    /// The state that a restarted broker would start with now.
    fn restarted(&self) -> State {
        State::restore(CoreConfig::default(), node(), self.paper.records()).unwrap()
    }
}

fn grants(reply: Result<Reply, Refused>) -> Vec<crate::core::Grant> {
    match reply {
        Ok(Reply::Leased { grants, .. }) => grants,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lease_that_cannot_be_recorded_is_not_granted() {
    let world = World::new();
    let (donor, borrower) = (world.register("1"), world.register("1"));
    world.offer(donor, 4);
    world.paper.set_full(true);
    for _ in 0..2 {
        let refused = world.lease(borrower, 2).unwrap_err();
        assert!(matches!(refused, Refused::Unrecorded { .. }), "{refused}");
        assert_eq!(world.leased(), 0);
    }
    assert_eq!(world.restarted().leases().count(), 0);

    world.paper.set_full(false);
    assert_eq!(grants(world.lease(borrower, 2)).len(), 2);
    assert_eq!(world.leased(), 2);
    assert_eq!(world.restarted().leases().count(), 2);
}

#[tokio::test]
async fn a_share_that_cannot_be_recorded_is_not_granted() {
    let world = World::new();
    let (donor, writer) = (world.register("1"), world.register("1"));
    let reader = world.register("1");
    world.offer(donor, 1);
    let lease = grants(world.lease(writer, 1))[0].lease;
    let readers = || {
        world
            .owner
            .read(|state| state.leases().next().unwrap().readers)
    };
    world.paper.set_full(true);
    let refused = world.share(reader, lease).unwrap_err();
    assert!(matches!(refused, Refused::Unrecorded { .. }), "{refused}");
    assert_eq!(readers(), 0);
    world.paper.set_full(false);
    world.share(reader, lease).unwrap();
    assert_eq!(readers(), 1);
    assert_eq!(world.restarted().leases().next().unwrap().readers, 1);
}

#[tokio::test]
async fn letting_go_works_while_nothing_can_be_recorded_and_the_ledger_catches_up() {
    let world = World::new();
    let (donor, borrower) = (world.register("1"), world.register("1"));
    world.offer(donor, 2);
    let lease = grants(world.lease(borrower, 1))[0].lease;
    world.paper.set_full(true);
    let release = Event::Release {
        caller: borrower,
        leases: vec![lease],
        unmappable: false,
    };
    world.owner.apply(release).unwrap();
    assert_eq!(world.leased(), 0);
    assert_eq!(
        world.restarted().leases().count(),
        1,
        "not recorded before the tick"
    );
    world.paper.set_full(false);
    world.owner.tick();
    assert_eq!(world.restarted().leases().count(), 0);
}

#[tokio::test]
async fn a_scrub_that_is_not_recorded_waits_until_it_is() {
    let world = World::new();
    let donor = world.register("1");
    let (first, second) = (world.register("1"), world.register("2"));
    world.offer(donor, 1);
    let lease = grants(world.lease(first, 1))[0].lease;
    let release = Event::Release {
        caller: first,
        leases: vec![lease],
        unmappable: false,
    };
    world.owner.apply(release).unwrap();
    let mut stream = world.owner.attach(donor).unwrap();

    world.paper.set_full(true);
    world.lease(second, 1).unwrap_err();
    assert!(
        stream.receiver.try_recv().is_err(),
        "a scrub was sent and not recorded"
    );
    world.paper.set_full(false);
    world.owner.tick();
    assert!(
        stream.receiver.recv().await.is_none(),
        "the stream must end, so that the donor attaches again"
    );
    let stream = world.owner.attach(donor).unwrap();
    let scrub = &stream.outstanding[0].message;
    assert!(
        matches!(scrub, Some(v1::session_response::Message::Scrub(_))),
        "{scrub:?}"
    );
    let shortfall = match world.lease(second, 1) {
        Ok(Reply::Leased { shortfall, .. }) => shortfall,
        other => panic!("{other:?}"),
    };
    assert_eq!(shortfall, Shortfall::Scrubbing);
}

#[tokio::test]
async fn a_reader_too_slow_loses_its_stream_and_gets_everything_from_the_next() {
    let slabs = 16_384 + 1;
    let world = World::new();
    let (donor, borrower) = (world.register("1"), world.register("1"));
    world.offer(donor, slabs);
    let mut held = 0;
    while held < slabs {
        held += grants(world.lease(borrower, slabs - held)).len() as u64;
    }
    let slow = world.owner.attach(borrower).unwrap();
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
    world.owner.apply(Event::Withdraw(withdraw)).unwrap();
    assert!(!attached());
    let next = world.owner.attach(borrower).unwrap();
    assert_eq!(next.outstanding.len() as u64, slabs);
    drop(slow);
    assert!(
        attached(),
        "the end of the old stream must not end the new one"
    );
    drop(next);
    assert!(!attached());
}

#[tokio::test]
async fn a_broker_on_its_way_out_takes_nobody_in() {
    let world = World::new();
    let member = world.register("1");
    let mut stream = world.owner.attach(member).unwrap();
    world.owner.close();
    assert!(stream.receiver.recv().await.is_none());
    let refused = world.owner.attach(member).err();
    assert_eq!(refused, Some(Refused::ShuttingDown));
}
