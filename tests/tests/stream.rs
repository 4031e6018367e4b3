//! A stitched pool with a real broker and real donors: slabs are asked back, donors and the broker die, and no byte is lost.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rustix::process::Signal;
use swiftcache_client::{
    Error,
    device::StepEnd,
    donor::{Donor, DonorConfig},
    session::{Session, SessionConfig},
    stream::StreamPool,
};
use swiftcache_proto::v1::{self, LeaseClass};
use swiftcache_tests::{
    PATIENCE,
    crew::{donor, donor_process},
    engine::{self, Engine, SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    seed::Course,
    stitched::{Poisoner, Stitched, config},
};

fn poisoner(node: &Node, slabs: u64) -> Result<Poisoner> {
    let donor = Poisoner::new(
        node.session("donor")?,
        node.layer()?,
        node.device(1),
        SLAB_BYTES,
    )?;
    donor.offer(slabs)?;
    Ok(donor)
}

/// An engine that has two tensors with `units` units in all, if they can be had.
fn engine(node: &Node, units: u32) -> Result<Stitched> {
    let config = config(node.device(0), units.into(), SLAB_BYTES);
    let halves = [units / 2, units - units / 2];
    Stitched::new(node.session("engine")?, &node.layer()?, config, &halves)
}

#[test]
fn a_pool_is_zero_keeps_what_is_written_and_gives_everything_back() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let _donor = donor(&node, 1, 6)?;
    let layer = node.layer()?;
    let hbm = layer.hbm(&node.device(0))?.free;
    // The size of a unit is learnt from what is on offer.
    let mut settings = config(node.device(0), 6, SLAB_BYTES);
    settings.unit_bytes = None;
    let pool = StreamPool::open(node.session("engine")?, node.layer()?, settings)?;
    ensure!((pool.units(), pool.unit_bytes()) == (6, SLAB_BYTES));
    let mut engine = Stitched::over(pool, &layer, &[2, 3])?;
    // The sixth slab is of no use.
    engine.step_until("the surplus to be given back", |pool| {
        Ok(pool.stats().leased_bytes == 5 * SLAB_BYTES)
    })?;
    let stats = engine.pool.stats();
    ensure!(
        stats.homes.in_slabs == 5 && stats.homes.on_floor == 0,
        "{stats:?}"
    );
    ensure!(engine.pool.homes() == [0; 5]);
    ensure!(
        layer.hbm(&node.device(0))?.free < hbm,
        "the local parts are local"
    );
    drop(engine);
    operator.eventually("every slab to be free", |account| {
        account.free_bytes == 6 * SLAB_BYTES
    })?;
    ensure!(layer.hbm(&node.device(0))?.free == hbm);
    Ok(())
}

#[test]
fn fewer_slabs_than_asked_for_are_used_and_none_are_refused() -> Result<()> {
    let node = Node::start(&[])?;
    let mut settings = config(node.device(0), 4, SLAB_BYTES);
    settings.patience = Duration::from_millis(200);
    let refused = |settings| -> Result<String> {
        let opened = StreamPool::open(node.session("engine")?, node.layer()?, settings);
        Ok(opened.err().context("it opened")?.to_string())
    };
    let said = refused(settings.clone())?;
    ensure!(
        said.contains("no slab") && said.contains("swiftcache status"),
        "{said}"
    );
    settings.unit_bytes = None;
    let said = refused(settings.clone())?;
    ensure!(said.contains("nothing is on offer"), "{said}");
    let _donor = donor(&node, 1, 3)?;
    // Slabs of another size are no units.
    settings.unit_bytes = Some(2 * SLAB_BYTES);
    settings.stream_bytes = 4 * SLAB_BYTES;
    let said = refused(settings.clone())?;
    ensure!(said.contains("--slab 524288"), "{said}");
    settings.unit_bytes = Some(SLAB_BYTES);
    settings.patience = PATIENCE;
    let pool = StreamPool::open(node.session("engine")?, node.layer()?, settings)?;
    ensure!(pool.units() == 3, "{:?}", pool.stats());
    // Settings are named.
    for (change, name) in [
        (config(node.device(0), 4, 1), "unit_bytes"),
        (config(node.device(0), 0, SLAB_BYTES), "stream_bytes"),
    ] {
        let said = refused(change)?;
        ensure!(said.starts_with(name), "{said}");
    }
    Ok(())
}

#[test]
fn without_a_broker_a_pool_does_not_open_and_says_why() -> Result<()> {
    let node = Node::start(&[])?;
    let session = Session::start(SessionConfig {
        socket: node.directory().join("nobody.sock"),
        name: "engine".to_owned(),
        tenant: String::new(),
    })?;
    let mut settings = config(node.device(0), 4, SLAB_BYTES);
    settings.patience = Duration::from_millis(50);
    let opened = StreamPool::open(session, node.layer()?, settings);
    let said = opened.err().context("it opened")?;
    ensure!(matches!(said, Error::Pool { .. }));
    ensure!(
        said.to_string().contains("is swiftcache-broker running?"),
        "{said}"
    );
    Ok(())
}

/// Every slab is asked back, one after another, while the engine runs. The donor overwrites what it gets at once.
#[test]
fn every_slab_is_asked_back_under_a_running_engine_and_no_byte_is_lost() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let donor = poisoner(&node, 6)?;
    let mut engine = engine(&node, 4)?;
    for _ in 0..8 {
        engine.step()?;
        donor.ask_back_one()?;
        donor.offer(1)?;
        engine.step_until("a slab to come back", |_| Ok(donor.out() <= 6))?;
    }
    engine.step_until("all units to be in slabs", |pool| {
        Ok(pool.stats().homes.in_slabs == 4)
    })?;
    let stats = engine.pool.stats();
    ensure!(
        stats.moved_units > 0 && stats.failed_moves == 0,
        "{stats:?}"
    );
    let counters = operator.node()?.counters.unwrap_or_default();
    ensure!(counters.zombies == 0, "{counters:?}");
    Ok(())
}

/// Two donors, of which each takes everything back in turn, and then both do. There is no room but the host floor then.
#[test]
fn units_go_to_another_donor_to_the_floor_and_back() -> Result<()> {
    let mut course = Course::new("stitched withdrawals", 12);
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let donors = [poisoner(&node, 4)?, poisoner(&node, 4)?];
    let mut engine = engine(&node, 4)?;
    while course.goes_on() {
        for donor in &donors {
            if donor.out() > 0 {
                donor.ask_back_all()?;
            }
            engine.step_until("slabs to come back", |_| Ok(donor.out() == 0))?;
            ensure!(operator.account()?.zombie_bytes == 0);
        }
        let homes = engine.pool.stats().homes;
        ensure!(homes.on_floor == 4, "{homes:?}");
        engine.step()?;
        for donor in &donors {
            donor.offer(4)?;
        }
        engine.step_until("all units to be in slabs", |pool| {
            Ok(pool.stats().homes.in_slabs == 4)
        })?;
    }
    Ok(())
}

#[test]
fn spare_units_are_used_before_the_floor() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = poisoner(&node, 4)?;
    let mut settings = config(node.device(0), 4, SLAB_BYTES);
    settings.spare_units = 1;
    let session = node.session("engine")?;
    let mut engine = Stitched::new(session, &node.layer()?, settings, &[4])?;
    donor.ask_back_all()?;
    engine.step_until("slabs to come back", |_| Ok(donor.out() == 0))?;
    let homes = engine.pool.stats().homes;
    ensure!((homes.in_spares, homes.on_floor) == (1, 3), "{homes:?}");
    let mut codes = engine.pool.homes();
    codes.sort_unstable();
    ensure!(codes == [1, 2, 2, 2]);
    engine.step()?;
    Ok(())
}

/// An engine that has nothing to do takes no step. What is asked back comes back all the same.
#[test]
fn an_idle_engine_gives_slabs_back() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = poisoner(&node, 4)?;
    let mut engine = engine(&node, 4)?;
    engine.step()?;
    let before = engine.pool.generation();
    donor.ask_back_all()?;
    donor.wait_out(0)?;
    ensure!(engine.pool.generation() > before);
    ensure!(engine.pool.homes() == [2; 4]);
    engine.step()?;
    Ok(())
}

/// A slab is nobody's but the pool's as long as a step is begun, however late that is. The donor's window is over by then.
#[test]
fn no_slab_is_given_back_within_a_step() -> Result<()> {
    let node = Node::start(&["--drain-ms", "20"])?;
    let operator = Operator::of(&node)?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: Duration::from_millis(20),
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    donor.grow(4 * SLAB_BYTES)?;
    let mut engine = engine(&node, 4)?;
    engine.step()?;
    engine.pool.begin_step()?;
    ensure!(donor.shrink(4 * SLAB_BYTES)? == 4 * SLAB_BYTES);
    operator.eventually("the windows to be over", |account| {
        account.zombie_bytes == 4 * SLAB_BYTES
    })?;
    // A step within the step moves nothing either.
    engine.step()?;
    ensure!(engine.pool.homes() == [0; 4]);
    ensure!(donor.status().returned == 0);
    engine.pool.end_step(StepEnd::Over)?;
    ensure!(donor.wait_returned(PATIENCE));
    ensure!(operator.account()?.zombie_bytes == 0);
    engine.step()?;
    ensure!(engine.pool.end_step(StepEnd::Over).is_err());
    Ok(())
}

#[test]
fn a_killed_broker_and_a_restarted_one_cost_no_byte() -> Result<()> {
    let mut node = Node::start(&[])?;
    let donor = donor(&node, 1, 5)?;
    let mut engine = engine(&node, 4)?;
    engine.step()?;
    node.kill_broker()?;
    for _ in 0..20 {
        engine.step()?;
    }
    ensure!(engine.pool.homes() == [0; 4]);
    node.start_broker()?;
    engine.step_until("the pool to be connected", |pool| {
        Ok(pool.stats().connected)
    })?;
    ensure!(engine.pool.stats().refused_leases == 0);
    eventually("the withdrawal", || {
        Ok(donor.shrink(5 * SLAB_BYTES).is_ok())
    })?;
    engine.step_until("slabs to come back", |_| {
        Ok(donor.status().offered_bytes == 0 && donor.status().returned == 5)
    })?;
    ensure!(engine.pool.homes() == [2; 4]);
    Ok(())
}

/// The broker's records are lost: it lends the slabs to others. No step begins any more.
#[test]
fn an_engine_whose_leases_nobody_knows_stops() -> Result<()> {
    let mut node = Node::start(&[])?;
    let _donor = donor(&node, 1, 4)?;
    let mut engine = engine(&node, 4)?;
    engine.step()?;
    node.kill_broker()?;
    node.lose_ledger()?;
    node.start_broker()?;
    let mut said = String::new();
    eventually("the engine to stop", || {
        match engine.pool.begin_step() {
            Ok(_) => engine.pool.end_step(StepEnd::Over)?,
            Err(error) => said = error.to_string(),
        }
        Ok(!said.is_empty())
    })?;
    ensure!(
        said.contains("the engine must stop") && said.contains("ledger"),
        "{said}"
    );
    ensure!(engine.pool.begin_step().is_err(), "it is final");
    // Nothing of the pool touches what may be another's.
    eventually("units to have left", || {
        Ok(engine.pool.stats().homes.to_vacate == 0 && !engine.pool.homes().contains(&0))
    })
}

#[test]
fn a_killed_donor_and_a_stopped_one_cost_no_byte() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let mut first = donor_process(&node, 1, 4)?;
    operator.eventually("the offer", |account| {
        account.offered_bytes == 4 * SLAB_BYTES
    })?;
    let mut engine = engine(&node, 4)?;
    engine.step()?;
    let second = donor_process(&node, 1, 2)?;
    operator.eventually("the offer", |account| {
        account.offered_bytes == 6 * SLAB_BYTES
    })?;
    first.kill()?;
    engine.step_until("units to leave", |pool| {
        let homes = pool.stats().homes;
        Ok((homes.in_slabs, homes.on_floor, homes.to_vacate) == (2, 2, 0))
    })?;
    second.signal(Signal::STOP)?;
    engine.step()?;
    second.signal(Signal::CONT)?;
    drop(second);
    engine.step_until(
        "units to leave",
        |pool| Ok(pool.stats().homes.on_floor == 4),
    )?;
    let third = donor(&node, 1, 4)?;
    engine.step_until("units to come back", |pool| {
        Ok(pool.stats().homes.in_slabs == 4)
    })?;
    ensure!(third.status().offered_bytes == 4 * SLAB_BYTES);
    Ok(())
}

/// Withdrawals at random times while two threads step in turn without a pause. Steps that always overlapped would keep every slab.
#[test]
fn slabs_come_and_go_at_any_time_under_two_threads() -> Result<()> {
    let mut course = Course::new("stitched at any time", 30);
    let node = Node::start(&[])?;
    let donor = poisoner(&node, 5)?;
    let engine = Arc::new(Mutex::new(engine(&node, 5)?));
    let stop = Arc::new(AtomicBool::new(false));
    let threads = [(); 2].map(|()| {
        let (engine, stop) = (Arc::clone(&engine), Arc::clone(&stop));
        thread::spawn(move || -> Result<()> {
            while !stop.load(Ordering::Acquire) {
                engine.lock().expect("no panic").step()?;
            }
            Ok(())
        })
    });
    while course.goes_on() && !threads.iter().any(|thread| thread.is_finished()) {
        donor.ask_back_one()?;
        donor.offer(course.rng.random_range(0..2))?;
        donor.ask_back_one()?;
        donor.wait_out(5)?;
        donor.offer(5_u64.saturating_sub(donor.out() as u64))?;
    }
    stop.store(true, Ordering::Release);
    for thread in threads {
        thread.join().expect("no panic")?;
    }
    engine.lock().expect("no panic").step()?;
    Ok(())
}

/// A neighbour that has nothing asks for slabs, and gets none of the pool's; an operator and the donor do. The twin is a cache, which
/// gives the neighbour some of what it has.
#[test]
fn neighbours_do_not_take_a_working_set() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let donor = poisoner(&node, 4)?;
    let mut stitched = engine(&node, 4)?;
    // Of the same tenant: this donor zeroes nothing for others.
    let rival = operator.wire().member("rival", "")?;
    let ask = || rival.lease("a rival's", "SIM-0", 4 * SLAB_BYTES, SLAB_BYTES);
    for _ in 0..5 {
        ensure!(ask()?.grants.is_empty());
        stitched.step()?;
    }
    ensure!(stitched.pool.stats().revocations == 0);
    // Operators see it: in the accounts, with the session, with each lease, and before they take anything.
    ensure!(operator.account()?.working_set_bytes == 4 * SLAB_BYTES);
    let sets: Vec<u64> = (operator.sessions()?.iter())
        .map(|session| session.working_set_bytes)
        .collect();
    ensure!(sets.iter().sum::<u64>() == 4 * SLAB_BYTES, "{sets:?}");
    let leases = operator.leases()?;
    let class = LeaseClass::WorkingSet;
    ensure!(leases.iter().all(|lease| lease.class() == class));
    let wire = operator.wire();
    let preview = wire.wait(wire.admin().preview_withdraw(v1::PreviewWithdrawRequest {
        device_uuid: node.device(1).to_string(),
        bytes: SLAB_BYTES,
        ..Default::default()
    }))?;
    ensure!(preview.into_inner().working_set_bytes == SLAB_BYTES);
    // And where the pool is, as its engine reports.
    let shown_in = |place: &str| -> Result<u64> {
        let shown = node.status(&["--json"])?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        let pools = shown["pools"].as_array().context("no pools")?;
        Ok(pools.iter().filter_map(|pool| pool[place].as_u64()).sum())
    };
    eventually("the pool to be shown in leased HBM", || {
        Ok(shown_in("leased")? == 4 * SLAB_BYTES && shown_in("host")? == 0)
    })?;
    let shown = node.status(&[])?;
    ensure!(shown.contains("working set"), "{shown}");
    let target = v1::evict_request::Target::LeaseId(leases[0].lease_id);
    let target = Some(target);
    wire.wait(wire.admin().evict(v1::EvictRequest { target }))?;
    stitched.step_until("the evicted slab to be let go of", |pool| {
        Ok(pool.stats().acknowledge.count == 1)
    })?;
    donor.ask_back_all()?;
    stitched.step_until("slabs to come back", |_| Ok(donor.out() == 0))?;
    eventually("the pool to be shown in host memory", || {
        Ok(shown_in("leased")? == 0 && shown_in("host")? == 4 * SLAB_BYTES)
    })?;
    drop(stitched);
    eventually("the pool to be shown no more", || {
        Ok(node.status(&["--json"])?.contains("\"pools\": []"))
    })?;
    donor.offer(4)?;
    let cache = engine::config(node.device(0), 4);
    let cache = Engine::new(Some(node.session("cache")?), node.layer()?, cache)?;
    cache.reserve(4)?;
    eventually("the neighbour to be given some", || {
        Ok(!ask()?.grants.is_empty())
    })
}

/// The twin of the tests above. Without the announcement of a step, units leave while the engine is in the middle of it: what
/// it writes while a unit is copied would be lost. In a step that is announced, they stay until its end.
#[test]
fn units_leave_in_the_middle_of_a_step_that_is_not_announced() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = poisoner(&node, 4)?;
    let mut engine = engine(&node, 4)?;
    engine.step()?;
    donor.ask_back_all()?;
    donor.wait_out(0)?;
    ensure!(!engine.pool.homes().contains(&0), "the twin shows nothing");
    donor.offer(4)?;
    engine.step_until("units to come back", |pool| {
        Ok(pool.stats().homes.in_slabs == 4)
    })?;
    engine.pool.begin_step()?;
    donor.ask_back_all()?;
    eventually("the pool to have heard of it", || {
        Ok(engine.pool.stats().homes.to_vacate == 4)
    })?;
    ensure!(engine.pool.homes() == [0; 4] && donor.out() == 4);
    engine.pool.end_step(StepEnd::Over)?;
    donor.wait_out(0)?;
    engine.step()?;
    Ok(())
}
