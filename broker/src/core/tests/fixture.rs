//! A node to try things on, and short names for what sessions say.

use std::collections::BTreeMap;

use swiftcache_proto::domain::{
    AllocationId, BlockHash, BorrowerId, Device, DeviceUuid, Extent, FoundRun, Generation, Handle,
    LeaseClass, LeaseId, Link, LinkKind, PinId, RegionId, SessionId, Shortfall,
};

use crate::core::{
    Caller, Connection, CoreConfig, Effect, Event, Grant, Keep, LeaseDemand, Lookup, Node, Now,
    Offer, Outgoing, Process, Publish, Record, Refusal, Register, Reply, State, Withdraw,
    WithdrawWhat,
};

/// The slabs that tests offer, bytes.
pub(super) const SLAB: u64 = 1 << 20;
/// The blocks that tests publish, bytes: four to a slab.
pub(super) const BLOCK: u64 = SLAB / 4;

/// Four devices: 0 and 1 on NVLink, 2 reached over PCIe. Device 3 has peer access with 2 only: there is no link to 0,
/// and the one to 1 goes through host memory.
pub(super) fn node() -> Node {
    let devices: Vec<_> = (0..4)
        .map(|ordinal| Device {
            uuid: device(ordinal),
            name: "simulated".to_owned(),
            hbm_bytes: 1 << 40,
            ordinal,
        })
        .collect();
    let mut links = Vec::new();
    for from in 0..4 {
        for to in (0..4).filter(|to| *to != from) {
            let (kind, bytes_per_second) = match (from.min(to), from.max(to)) {
                (0, 1) => (LinkKind::Nvlink, 380_000_000_000),
                (0, 3) => continue,
                (1, 3) => (LinkKind::Host, 0),
                _ => (LinkKind::Pcie, 50_000_000_000),
            };
            links.push(Link {
                from: device(from),
                to: device(to),
                kind,
                bytes_per_second,
            });
        }
    }
    Node { devices, links }
}

/// The same node with its host memory, of one NUMA node.
pub(super) fn node_with_host_memory() -> Node {
    let mut node = node();
    node.devices.push(Device {
        uuid: DeviceUuid::of_host(0),
        name: "host memory".to_owned(),
        hbm_bytes: 1 << 40,
        ordinal: 0,
    });
    node
}

pub(super) fn device(ordinal: u32) -> DeviceUuid {
    format!("SIM-{ordinal}").parse().unwrap()
}

pub(super) fn region(number: u64) -> RegionId {
    RegionId(u128::from(number).to_be_bytes())
}

pub(super) fn allocation(number: u64) -> AllocationId {
    AllocationId(u128::from(number).to_be_bytes())
}

pub(super) fn hash(number: u64) -> BlockHash {
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    hash[8..].copy_from_slice(&number.to_le_bytes());
    BlockHash(hash)
}

pub(super) fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    numbers.into_iter().map(hash).collect()
}

/// A broker's core, with everything it ever wrote to its ledger and said on streams.
pub(super) struct Bench {
    pub(super) state: State,
    pub(super) config: CoreConfig,
    node: Node,
    pub(super) now: u64,
    pub(super) ledger: Vec<Record>,
    pub(super) said: BTreeMap<SessionId, Vec<Outgoing>>,
    /// The effects of the last event.
    pub(super) effects: Vec<Effect>,
    sessions: u64,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(CoreConfig::default())
    }

    pub(super) fn with(config: CoreConfig) -> Self {
        Self::on(node(), config)
    }

    pub(super) fn on(node: Node, config: CoreConfig) -> Self {
        Self {
            state: State::new(config.clone(), node.clone()),
            node,
            config,
            now: 1_000,
            ledger: Vec::new(),
            said: BTreeMap::new(),
            effects: Vec::new(),
            sessions: 0,
        }
    }

    /// Applies an event, checks every invariant, and returns the reply.
    pub(super) fn apply(&mut self, event: Event) -> Option<Reply> {
        self.effects = self.state.apply(event, Now(self.now));
        self.state.check().unwrap();
        let mut reply = None;
        for effect in &self.effects {
            match effect {
                Effect::Record(record) => {
                    assert!(reply.is_none(), "a record after the reply");
                    self.ledger.push(record.clone());
                }
                Effect::Send(to, message) => {
                    self.said.entry(*to).or_default().push(message.clone());
                }
                Effect::Reply(said) => assert!(reply.replace(said.clone()).is_none()),
                _ => {}
            }
        }
        reply
    }

    /// Applies an event that must be refused, and returns why.
    pub(super) fn refused(&mut self, event: Event) -> Refusal {
        match self.apply(event) {
            Some(Reply::Refused(refusal)) => refusal,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    pub(super) fn done(&mut self, event: Event) {
        let reply = self.apply(event);
        assert!(matches!(reply, Some(Reply::Done)), "{reply:?}");
    }

    /// Time passes.
    pub(super) fn tick(&mut self, ms: u64) {
        self.now += ms;
        self.apply(Event::Tick);
    }

    /// A new session of a process of its own, attached.
    pub(super) fn join(&mut self, name: &str, tenant: &str) -> Caller {
        self.sessions += 1;
        let process = Process {
            pid: self.sessions as u32,
            birth: 7,
            uid: 1_000,
        };
        let caller = self.join_as(process, name, tenant);
        self.done(Event::Attach(caller));
        caller
    }

    /// A new session of this process, not attached.
    pub(super) fn join_as(&mut self, process: Process, name: &str, tenant: &str) -> Caller {
        self.sessions += 1;
        let register = Register {
            process,
            fresh_id: SessionId(self.sessions << 48 | 5),
            name: name.to_owned(),
            tenant: tenant.to_owned(),
            resume: None,
            held: Vec::new(),
            shared: Vec::new(),
            connection: Connection::default(),
        };
        match self.apply(Event::Register(register)) {
            Some(Reply::Registered { session, .. }) => Caller {
                session,
                process,
                connection: Connection::default(),
            },
            other => panic!("{other:?}"),
        }
    }

    /// A session resumes, naming what it has mapped.
    pub(super) fn resume(
        &mut self,
        caller: Caller,
        held: &[LeaseId],
        shared: &[LeaseId],
    ) -> (Vec<LeaseId>, Vec<RegionId>) {
        let tenant = self
            .state
            .session(caller.session)
            .unwrap()
            .tenant
            .to_string();
        let register = Register {
            process: caller.process,
            fresh_id: SessionId(1),
            name: "again".to_owned(),
            tenant,
            resume: Some(caller.session),
            held: held.to_vec(),
            shared: shared.to_vec(),
            connection: Connection::default(),
        };
        match self.apply(Event::Register(register)) {
            Some(Reply::Registered {
                refused, regions, ..
            }) => (refused, regions),
            other => panic!("{other:?}"),
        }
    }

    /// The broker dies and starts again on its ledger.
    pub(super) fn restart(&mut self) {
        let records = self.ledger.clone();
        self.state = State::restore(self.config.clone(), self.node.clone(), records).unwrap();
        self.state.check().unwrap();
        self.said.clear();
    }

    /// An offer of a region that is an allocation of its own. Its slabs may go to several tenants.
    pub(super) fn offer_event(donor: Caller, number: u64, on: u32, slabs: u64) -> Offer {
        Offer {
            caller: donor,
            region: region(number),
            device: device(on),
            allocation: allocation(number),
            offset: 0,
            bytes: slabs * SLAB,
            slab_bytes: SLAB,
            handle: Handle::PosixFd,
            shared: true,
            elastic: false,
        }
    }

    /// Offers region `number`, an allocation of its own.
    pub(super) fn offer(&mut self, donor: Caller, number: u64, on: u32, slabs: u64) {
        self.done(Event::Offer(Self::offer_event(donor, number, on, slabs)));
    }

    /// An offer of host memory, as [`offer_event`](Self::offer_event).
    pub(super) fn host_offer(donor: Caller, number: u64, slabs: u64) -> Offer {
        Offer {
            device: DeviceUuid::of_host(0),
            ..Self::offer_event(donor, number, 0, slabs)
        }
    }

    /// Offers host memory.
    pub(super) fn offer_host(&mut self, donor: Caller, number: u64, slabs: u64) {
        self.done(Event::Offer(Self::host_offer(donor, number, slabs)));
    }

    pub(super) fn demand(caller: Caller, slabs: u64) -> LeaseDemand {
        LeaseDemand {
            caller,
            namespace: "model".to_owned(),
            device: device(0),
            bytes: slabs * SLAB,
            block_bytes: BLOCK,
            class: LeaseClass::Cache,
            host_bytes: 0,
        }
    }

    pub(super) fn demanded(&mut self, demand: LeaseDemand) -> (Vec<Grant>, Shortfall) {
        match self.apply(Event::Lease(demand)) {
            Some(Reply::Leased { grants, shortfall }) => (grants, shortfall),
            other => panic!("{other:?}"),
        }
    }

    /// Asks for slabs on behalf of device 0.
    pub(super) fn ask(&mut self, caller: Caller, slabs: u64) -> (Vec<Grant>, Shortfall) {
        self.demanded(Self::demand(caller, slabs))
    }

    /// Leases slabs, all of which must be granted.
    pub(super) fn lease(&mut self, caller: Caller, slabs: u64) -> Vec<Grant> {
        let (grants, shortfall) = self.ask(caller, slabs);
        assert_eq!((grants.len() as u64, shortfall), (slabs, Shortfall::None));
        grants
    }

    pub(super) fn share_event(caller: Caller, grant: &Grant) -> Event {
        Event::Share {
            caller,
            lease: grant.lease,
            device: device(1),
        }
    }

    pub(super) fn share(&mut self, caller: Caller, grant: &Grant) -> Grant {
        match self.apply(Self::share_event(caller, grant)) {
            Some(Reply::Shared(shared)) => shared,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn publish_event(caller: Caller, grant: &Grant, blocks: &[(u64, u32)]) -> Event {
        Event::Publish(Publish {
            caller,
            lease: grant.lease,
            generation: grant.generation,
            blocks: blocks.iter().map(|(n, slot)| (hash(*n), *slot)).collect(),
        })
    }

    pub(super) fn publish(
        &mut self,
        caller: Caller,
        grant: &Grant,
        blocks: &[(u64, u32)],
    ) -> Vec<u32> {
        match self.apply(Self::publish_event(caller, grant, blocks)) {
            Some(Reply::Published { duplicates }) => duplicates,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn unpublish(
        &mut self,
        caller: Caller,
        grant: &Grant,
        slots: &[u32],
    ) -> (Vec<u32>, u32) {
        let event = Event::Unpublish {
            caller,
            lease: grant.lease,
            generation: grant.generation,
            slots: slots.to_vec(),
        };
        match self.apply(event) {
            Some(Reply::Unpublished { pinned, retry_ms }) => (pinned, retry_ms),
            other => panic!("{other:?}"),
        }
    }

    /// A lookup that says nothing of who asks.
    pub(super) fn lookup_of(caller: Caller, numbers: impl IntoIterator<Item = u64>) -> Lookup {
        Lookup {
            caller,
            namespace: "model".to_owned(),
            hashes: hashes(numbers),
            device: None,
            borrower: None,
            unpinned: false,
            host_memory: false,
        }
    }

    pub(super) fn looked_up(&mut self, lookup: Lookup) -> (Vec<FoundRun>, Option<PinId>) {
        match self.apply(Event::Lookup(lookup)) {
            Some(Reply::Found { runs, pin, .. }) => (runs, pin),
            other => panic!("{other:?}"),
        }
    }

    /// What is found of leases, wherever they are.
    pub(super) fn lookup(
        &mut self,
        caller: Caller,
        numbers: impl IntoIterator<Item = u64>,
    ) -> (Vec<Extent>, Option<PinId>) {
        let (runs, pin) = self.looked_up(Self::lookup_of(caller, numbers));
        let extent = |run| match run {
            FoundRun::Leased { extent, .. } => extent,
            FoundRun::Kept { .. } => panic!("no borrower was named"),
        };
        (runs.into_iter().map(extent).collect(), pin)
    }

    /// Borrower `number` of this session, which computes on device 0 and reads others' leases.
    pub(super) fn keep_of(caller: Caller, number: u8) -> Keep {
        Keep {
            caller,
            borrower: BorrowerId([number; 16]),
            namespace: "model".to_owned(),
            device: device(0),
            block_bytes: BLOCK,
            shares: true,
            anew: false,
            kept: Vec::new(),
            dropped: Vec::new(),
            closed: false,
            down: Vec::new(),
            host_down: false,
            host_memory: false,
            layer_bytes: Vec::new(),
        }
    }

    pub(super) fn hits(&mut self, caller: Caller, numbers: impl IntoIterator<Item = u64>) -> u32 {
        let (extents, _) = self.lookup(caller, numbers);
        extents.iter().map(|extent| extent.count).sum()
    }

    pub(super) fn release(&mut self, caller: Caller, grants: &[&Grant]) {
        self.done(Event::Release {
            caller,
            leases: grants.iter().map(|grant| grant.lease).collect(),
            unmappable: false,
            bequeath: false,
        });
    }

    pub(super) fn acknowledge(&mut self, caller: Caller, grant: &Grant) {
        self.acknowledge_as(caller, grant, grant.generation);
    }

    pub(super) fn acknowledge_as(&mut self, caller: Caller, grant: &Grant, generation: Generation) {
        let reply = self.apply(Event::Acknowledge {
            caller,
            lease: grant.lease,
            generation,
        });
        assert!(reply.is_none(), "{reply:?}");
    }

    pub(super) fn withdraw(&mut self, caller: Caller, what: WithdrawWhat) -> Vec<RegionId> {
        let event = Event::Withdraw(Withdraw {
            caller,
            what,
            drain_ms: 500,
        });
        match self.apply(event) {
            Some(Reply::Withdrawing { regions, bytes }) => {
                assert!(bytes >= regions.len() as u64 * SLAB);
                regions
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn withdraw_region(&mut self, caller: Caller, number: u64) {
        let named = WithdrawWhat::Regions(vec![region(number)]);
        assert_eq!(self.withdraw(caller, named), [region(number)]);
    }

    /// What was said on the session's stream since last asked.
    pub(super) fn heard(&mut self, caller: Caller) -> Vec<Outgoing> {
        self.said.remove(&caller.session).unwrap_or_default()
    }
}
