//! The course of a slab that is asked back, with a holder that writes down what it is told.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use swiftcache_device::{Ticket, host::HostLayer, testing::Gate};
use swiftcache_proto::{
    domain::{Generation, Hold, LeaseClass, LeaseId, LinkKind, Medium, RevokeReason},
    topology::Topology,
};

use super::{slabs::Slab, state::State, *};
use crate::{
    device::DeviceLayer,
    session::Revocation,
    transfer::{
        AreaId, BlockArea, Direction, LoadOrder, PagedKv, PagedLayer, Plan, Queueing, Routes,
        issue_load,
    },
};

const BLOCK: u64 = 64;
const LAYERS: [u64; 1] = [BLOCK];
/// No test takes so long.
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Evacuate,
    Forget,
}

/// It moves blocks out until it is told to be done.
#[derive(Default)]
struct Notebook {
    told: Mutex<Vec<Told>>,
    moving: Mutex<Vec<AreaId>>,
}

impl Notebook {
    fn eventually(&self, told: &[Told]) {
        let deadline = Instant::now() + PATIENCE;
        while *self.told.lock() != told {
            assert!(Instant::now() < deadline, "{:?}", self.told.lock());
            std::thread::yield_now();
        }
    }
}

impl Holder for Notebook {
    fn granted(&self, _: Arrival) -> Result<()> {
        Ok(())
    }

    fn wants(&self) -> Wants {
        Wants::default()
    }

    fn give_up_unused(&self) -> Vec<AreaId> {
        Vec::new()
    }

    fn evacuate(&self, slab: AreaId, _: Duration) -> Option<Instant> {
        self.told.lock().push(Told::Evacuate);
        self.moving.lock().push(slab);
        Some(Instant::now() + PATIENCE)
    }

    fn is_moving(&self, slab: AreaId) -> bool {
        self.moving.lock().contains(&slab)
    }

    fn advance(&self) -> Progress {
        match self.moving.lock().is_empty() {
            true => Progress::Idle,
            false => Progress::Waiting,
        }
    }

    fn forget(&self, _: &[AreaId]) {
        let mut told = self.told.lock();
        if told.last() != Some(&Told::Forget) {
            told.push(Told::Forget);
        }
    }
}

/// Leases without a broker that have one slab, and an engine's pool.
struct Stand {
    leases: Arc<Leases>,
    threads: LeaseThreads,
    holder: Arc<Notebook>,
    area: Arc<BlockArea>,
    kv: PagedKv,
}

fn revocation(lease: u64) -> Revocation {
    Revocation {
        lease: LeaseId(lease),
        generation: Generation(1),
        reason: RevokeReason::Withdrawn,
        drain_ms: 600_000,
    }
}

impl Stand {
    fn new() -> Self {
        Self::that_may_lease(0)
    }

    fn that_may_lease(max_bytes: u64) -> Self {
        let topology = Topology::load("hgx-8").unwrap();
        let device = topology.devices[0].uuid.clone();
        let layer: Arc<dyn DeviceLayer> =
            Arc::new(HostLayer::from_topology(&topology, false).unwrap());
        let routes = Arc::new(Routes::new(Arc::clone(&layer), device.clone()));
        let memory = || layer.allocate_host(&device, 8 * BLOCK).unwrap();
        let route = routes.to(Medium::Hbm, &device).unwrap();
        let area = BlockArea::new(memory(), 0, 8, &LAYERS, LinkKind::Nvlink, route);
        let kv = PagedKv {
            layers: vec![PagedLayer {
                memory: memory(),
                offset: 0,
                block_stride: BLOCK,
            }],
            blocks: 8,
        };
        let settings = LeaseSettings {
            namespace: "test".to_owned(),
            device,
            layer_bytes: LAYERS.to_vec(),
            max_bytes,
            max_host_bytes: 0,
            step_bytes: 0,
            class: LeaseClass::Cache,
            inherit: true,
        };
        let (leases, inboxes) = Leases::new(None, Arc::clone(&layer), routes, settings);
        let area = Arc::new(area);
        let key = LeaseKey {
            lease: LeaseId(1),
            generation: Generation(1),
        };
        let slab = Slab::new(Some(key), Hold::Own, 8 * BLOCK, Arc::clone(&area));
        leases.state.lock().slabs.insert(slab);
        let holder = Arc::<Notebook>::default();
        let its: Arc<dyn Holder> = Arc::clone(&holder) as _;
        Self {
            threads: LeaseThreads::start(&leases, &its, inboxes).unwrap(),
            leases,
            holder,
            area,
            kv,
        }
    }

    /// Queues a load of the slab's first block behind a mark.
    fn load(&self, after: &Ticket) -> Arc<Flight> {
        let mut plan = Plan::default();
        plan.add(&self.area, 0, 0);
        let flight = (self.leases.registering()).begin(plan.areas().collect());
        let mut queueing = Queueing::new(&flight.transfer, Direction::Load);
        let order = LoadOrder {
            layers: 0..1,
            after: Some(after),
        };
        let mut bytes = Default::default();
        issue_load(
            &mut plan,
            order,
            &LAYERS,
            &self.kv,
            &mut queueing,
            &mut bytes,
        )
        .unwrap();
        drop(queueing);
        flight
    }

    fn is_mapped(&self) -> bool {
        self.leases.state.lock().slabs.get(self.area.id).is_some()
    }

    fn close(mut self) {
        self.threads.stop_growing(&self.leases);
        self.leases.close();
        assert!(self.threads.recall().join_by(Instant::now() + PATIENCE));
        assert!(!self.is_mapped());
    }
}

#[test]
fn a_slab_that_is_asked_back_is_closed_evacuated_forgotten_and_unmapped_in_this_order() {
    let stand = Stand::new();
    assert!(stand.area.is_open());
    // Nobody's lease: the session acknowledges it.
    assert!(!stand.leases.revoked(&revocation(2)));
    assert!(stand.leases.revoked(&revocation(1)));
    assert!(!stand.area.is_open(), "it is closed at once");
    stand.holder.eventually(&[Told::Evacuate]);
    assert!(stand.is_mapped(), "unmapped while blocks are moved out");
    // Sent again after a lost stream: it is asked for once.
    assert!(stand.leases.revoked(&revocation(1)));
    stand.holder.moving.lock().clear();
    stand.holder.eventually(&[Told::Evacuate, Told::Forget]);
    let deadline = Instant::now() + PATIENCE;
    while stand.is_mapped() {
        assert!(Instant::now() < deadline, "it is never let go of");
        std::thread::yield_now();
    }
    stand.close();
}

#[test]
fn a_slab_is_kept_as_long_as_a_transfer_touches_it() {
    let mut stand = Stand::new();
    let gate = Arc::<Gate>::default();
    let flight = stand.load(&gate.ticket());
    assert!(stand.leases.revoked(&revocation(1)));
    stand.holder.eventually(&[Told::Evacuate]);
    stand.holder.moving.lock().clear();
    stand.holder.eventually(&[Told::Evacuate, Told::Forget]);
    // The draining thread has nothing else to wait for, and does not end.
    stand.threads.stop_growing(&stand.leases);
    stand.leases.close();
    let soon = Instant::now();
    assert!(!stand.threads.recall().join_by(soon) && !flight.transfer.is_over());
    assert!(stand.is_mapped(), "unmapped under a transfer");
    gate.open();
    stand.close();
}

#[test]
fn what_the_broker_does_not_know_is_not_evacuated_and_what_is_read_from_it_is_worth_nothing() {
    let stand = Stand::new();
    let gate = Arc::<Gate>::default();
    let flight = stand.load(&gate.ticket());
    let connected = crate::session::Connected {
        epoch: 2,
        restarted: false,
        replaced: false,
        refused: vec![LeaseId(1)],
        regions: Vec::new(),
    };
    Observer::connected(&*stand.leases, &connected);
    assert!(flight.transfer.is_poisoned() && !stand.area.is_open());
    stand.holder.eventually(&[Told::Forget]);
    assert_eq!(stand.leases.counts().refused, 1);
    gate.open();
    stand.close();
}

#[test]
fn what_larger_slabs_were_granted_for_is_not_asked_for_again() {
    let stand = Stand::that_may_lease(12 * BLOCK);
    let room = |state: &State| stand.leases.room(state, Medium::Hbm);
    let mut state = stand.leases.state.lock();
    *state.slab_bytes.of_mut(Medium::Hbm) = Some(2 * BLOCK);
    assert_eq!(room(&state), 4 * BLOCK, "eight blocks are leased");
    // The twin: a slab that fits leaves it as it is.
    assert!(!state.is_too_large(Medium::Hbm, 4 * BLOCK, 4 * BLOCK));
    assert_eq!(room(&state), 4 * BLOCK);
    // There is more than what was asked for in vain.
    assert!(state.is_too_large(Medium::Hbm, 8 * BLOCK, 3 * BLOCK));
    assert_eq!(room(&state), 4 * BLOCK);
    assert!(state.is_too_large(Medium::Hbm, 8 * BLOCK, 4 * BLOCK));
    assert_eq!(room(&state), 0);
    drop(state);
    stand.close();
}
