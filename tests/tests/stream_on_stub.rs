//! A stitched pool on the real CUDA path over the stub driver: copies are held, calls of the driver fail, and no byte is lost. A donor
//! overwrites what it gets back.

use std::sync::Arc;

use anyhow::{Result, ensure};
use swiftcache_client::device::{DeviceLayer, cuda::CudaLayer};
use swiftcache_tests::{
    engine::eventually,
    node::{Devices, Node, Setup},
    stitched::{Poisoner, Stitched, config},
    stub::{Held, Injected, Stub, alone},
};

/// The driver maps multiples of this.
const UNIT: u64 = 2 << 20;
const UNITS: u64 = 2;
/// Every call that copies.
const COPIES: [&str; 6] = [
    "cuMemcpyAsync",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyPeerAsync",
    "cuMemcpyBatchAsync_v2",
    "cuMemcpyBatchAsync",
    "cuLaunchKernel",
];

/// An engine on the first device, whose units are in slabs of a donor of the second one. There is one slab more.
struct Bench<'a> {
    stub: &'a Stub,
    engine: Stitched,
    donor: Poisoner,
    _node: Node,
}

impl<'a> Bench<'a> {
    fn new(stub: &'a Stub) -> Result<Self> {
        let node = Node::start_with(Setup {
            devices: Devices::File(stub.topology_file()?),
            environment: stub.environment()?,
            ..Setup::default()
        })?;
        let layer: Arc<dyn DeviceLayer> = Arc::new(CudaLayer::open()?);
        let donor = Poisoner::new(
            node.session("donor")?,
            Arc::clone(&layer),
            node.device(1),
            UNIT,
        )?;
        donor.offer(UNITS + 1)?;
        let settings = config(node.device(0), UNITS, UNIT);
        let session = node.session("engine")?;
        let engine = Stitched::new(session, &layer, settings, &[1, 1])?;
        let mut bench = Self {
            stub,
            engine,
            donor,
            _node: node,
        };
        bench.engine.step()?;
        Ok(bench)
    }

    /// Injects a fault into this process only.
    fn fault(&self, line: &str) -> Result<Injected> {
        self.stub.inject(Some(std::process::id()), line)
    }
}

#[test]
fn slabs_come_back_and_bytes_stay() -> Result<()> {
    alone("slabs_come_back_and_bytes_stay", |stub| {
        let mut bench = Bench::new(stub)?;
        for _ in 0..3 {
            bench.donor.ask_back_all()?;
            let donor = &bench.donor;
            (bench.engine).step_until("slabs to come back", |_| Ok(donor.out() == 0))?;
            ensure!(bench.engine.pool.homes() == [2; UNITS as usize]);
            bench.engine.step()?;
            bench.donor.offer(UNITS)?;
            bench.engine.step_until("units to come back", |pool| {
                Ok(u64::from(pool.stats().homes.in_slabs) == UNITS)
            })?;
        }
        Ok(())
    })
}

/// A copy that does not end keeps the slab, whatever the donor's window. What arrives late harms nobody.
#[test]
fn a_slab_is_kept_as_long_as_a_units_copy_may_read_it() -> Result<()> {
    alone(
        "a_slab_is_kept_as_long_as_a_units_copy_may_read_it",
        |stub| {
            let mut bench = Bench::new(stub)?;
            let hold = stub.hold(Some(std::process::id()), Held::Copies)?;
            bench.donor.ask_back_all()?;
            // The engine is idle: the pool's own thread begins to copy, and gives up waiting.
            eventually("the mover to give up waiting", || {
                Ok(bench.engine.pool.stats().failed_moves > 0)
            })?;
            let stats = bench.engine.pool.stats();
            ensure!(stats.homes.to_vacate > 0, "{stats:?}");
            ensure!(
                bench.donor.out() as u64 >= UNITS,
                "a slab came back under a copy"
            );
            ensure!(bench.engine.pool.homes() == [0; UNITS as usize]);
            stub.lift(&hold)?;
            bench.donor.wait_out(0)?;
            bench.engine.step()?;
            bench.engine.step()?;
            Ok(())
        },
    )
}

/// Each call of a move fails in turn, once, twice in a row and for a while.
#[test]
fn a_call_that_fails_costs_no_byte() -> Result<()> {
    alone("a_call_that_fails_costs_no_byte", |stub| {
        let mut bench = Bench::new(stub)?;
        let calls = ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"];
        for symbol in calls.iter().chain(&COPIES) {
            for which in ["1", "2", "1-2", "1-3", "2-4"] {
                bench.engine.step()?;
                let fault = bench.fault(&format!("{symbol}=999@{which}"))?;
                bench.donor.ask_back_all()?;
                // Steps copy, too: they wait until it is over, so that what fails are calls of moves.
                bench.donor.wait_out(0)?;
                stub.lift(&fault)?;
                bench.engine.step()?;
                bench.donor.offer(UNITS)?;
                bench.engine.step_until("units to come back", |pool| {
                    Ok(u64::from(pool.stats().homes.in_slabs) == UNITS)
                })?;
            }
        }
        ensure!(bench.engine.pool.stats().failed_moves > 0, "nothing failed");
        Ok(())
    })
}

#[test]
fn an_engine_stops_when_a_unit_cannot_be_mapped_any_more() -> Result<()> {
    alone(
        "an_engine_stops_when_a_unit_cannot_be_mapped_any_more",
        |stub| {
            let mut bench = Bench::new(stub)?;
            let _fault = bench.fault("cuMemMap=999")?;
            bench.donor.ask_back_all()?;
            let pool = &bench.engine.pool;
            eventually("a unit to be mapped nowhere", || {
                Ok(pool.stats().homes.adrift > 0)
            })?;
            let stopped = bench.engine.step();
            let said = stopped
                .err()
                .map_or_else(String::new, |error| error.to_string());
            ensure!(said.contains("the engine must stop"), "{said}");
            Ok(())
        },
    )
}

/// The twin of the tests above: copies that say that they have worked, and have not, are noticed.
#[test]
fn moves_that_copy_nothing_are_noticed() -> Result<()> {
    alone("moves_that_copy_nothing_are_noticed", |stub| {
        let mut bench = Bench::new(stub)?;
        let faults = COPIES.map(|symbol| bench.fault(&format!("{symbol}=0")));
        bench.donor.ask_back_all()?;
        eventually("units to leave", || {
            Ok(!bench.engine.pool.homes().contains(&0))
        })?;
        for fault in faults {
            stub.lift(&fault?)?;
        }
        let noticed = bench.engine.step();
        let said = noticed
            .err()
            .map_or_else(String::new, |error| error.to_string());
        ensure!(said.contains("of tensor"), "{said}");
        Ok(())
    })
}
