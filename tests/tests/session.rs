//! Sessions with a real broker, or without one: every call ends, and a lost connection is restored.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::{
    Error,
    donor::{Donor, DonorConfig},
    session::{Asker, Connected, Demand, Observer, Session, SessionConfig},
};
use swiftcache_proto::domain::BlockHash;
use swiftcache_tests::{
    PATIENCE,
    engine::{self, Engine, SLAB_BYTES, eventually},
    gate::{Fault, Gate, Stage},
    node::Node,
};
use tonic::Code;

fn config(socket: std::path::PathBuf) -> SessionConfig {
    SessionConfig {
        socket,
        name: "a session under test".to_owned(),
        tenant: String::new(),
    }
}

#[test]
fn without_a_broker_every_call_fails_at_once_and_says_where_it_looked() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let session = Session::start(config(directory.path().join("nowhere.sock")))?;
    let failed = session
        .lookup(&Asker::new("model"), &[BlockHash([1; 16])], PATIENCE)
        .wait();
    let text = failed.err().context("found a broker")?.to_string();
    ensure!(text.contains("nowhere.sock"), "{text}");
    ensure!(!session.is_connected() && session.boot_id().is_none());
    Ok(())
}

#[test]
fn a_broker_that_comes_late_is_found() -> Result<()> {
    let mut node = Node::start(&[])?;
    node.kill_broker()?;
    let session = Session::start(config(node.socket()))?;
    node.start_broker()?;
    session.wait_connected(PATIENCE)?;
    let found = session
        .lookup(&Asker::new("model"), &[BlockHash([1; 16])], PATIENCE)
        .wait()?;
    ensure!(found.runs.is_empty() && found.pin.is_none());
    let (devices, links) = session.node().context("connected")?;
    ensure!(devices.len() == 3 && links.len() == 6);
    Ok(())
}

#[test]
fn names_out_of_bounds_are_refused_before_anyone_is_asked() -> Result<()> {
    let mut nameless = config("nowhere.sock".into());
    nameless.name.clear();
    let text = Session::connect(nameless)
        .err()
        .context("accepted")?
        .to_string();
    ensure!(text.starts_with("name"), "{text}");
    let mut sprawling = config("nowhere.sock".into());
    sprawling.tenant = "t".repeat(65);
    let text = Session::connect(sprawling)
        .err()
        .context("accepted")?
        .to_string();
    ensure!(text.starts_with("tenant"), "{text}");
    Ok(())
}

#[test]
fn the_brokers_refusals_are_passed_on() -> Result<()> {
    let node = Node::start(&[])?;
    let session = node.session("engine")?;
    let demand = Demand {
        namespace: "model".to_owned(),
        device: "SIM-9".parse().map_err(anyhow::Error::msg)?,
        bytes: 1,
        block_bytes: 1,
        class: Default::default(),
        host_bytes: 0,
    };
    match session.lease(demand).wait() {
        Err(Error::Refused { call, status }) => {
            ensure!(
                call == "Lease" && status.message().contains("SIM-9"),
                "{status}"
            );
        }
        other => anyhow::bail!("{other:?}"),
    }
    ensure!(session.is_connected(), "a refusal costs no connection");
    Ok(())
}

#[test]
fn calls_can_be_awaited_on_any_runtime() -> Result<()> {
    let node = Node::start(&[])?;
    let session = node.session("engine")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().build()?;
    runtime.block_on(async {
        session
            .lookup(&Asker::new("model"), &[BlockHash([1; 16])], PATIENCE)
            .await?;
        // A wait inside a runtime blocks its thread, but neither panics nor hangs.
        session
            .lookup(&Asker::new("model"), &[BlockHash([1; 16])], PATIENCE)
            .wait()?;
        anyhow::Ok(())
    })
}

fn any_demand(node: &Node) -> Demand {
    Demand {
        namespace: "model".to_owned(),
        device: node.device(0),
        bytes: 1,
        block_bytes: 1,
        class: Default::default(),
        host_bytes: 0,
    }
}

/// A call that is made without a connection does not count as an unanswered call of the next connection.
#[test]
fn a_call_made_while_disconnected_costs_no_connection() -> Result<()> {
    let mut node = Node::start(&[])?;
    node.kill_broker()?;
    let session = Session::start(config(node.socket()))?;
    for _ in 0..3 {
        let failed = session.lease(any_demand(&node)).wait();
        ensure!(
            matches!(failed, Err(Error::Disconnected { .. })),
            "{failed:?}"
        );
    }
    let first = session.epoch();
    node.start_broker()?;
    session.wait_connected(PATIENCE)?;
    // When this call returns, the session has checked the connection for unanswered calls at least once.
    let called = session.release(Vec::new()).wait();
    ensure!(called.is_ok(), "{called:?}");
    ensure!(
        session.epoch() == first,
        "the first connection was given up"
    );
    Ok(())
}

/// When the broker may have granted a lease and the answer is missing, the session gives up the connection that the
/// call was made on, and no other connection.
#[test]
fn a_lease_that_may_have_been_granted_costs_its_own_connection_only() -> Result<()> {
    let node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let session = gate.session("engine")?;
    let first = session.epoch();
    gate.fail("Lease", Fault::Deny(Code::Internal), 1);
    let failed = session.lease(any_demand(&node)).wait();
    ensure!(matches!(failed, Err(Error::Answer { .. })), "{failed:?}");
    eventually("the next connection", || {
        Ok(session.epoch() == first + 1 && session.is_connected())
    })?;
    // A lease that is lost with its connection does not cost the next connection.
    gate.hold("Lease");
    let lost = session.lease(any_demand(&node));
    eventually("the call to be under way", || {
        Ok(gate.count("Lease", Stage::Arrived) == 2)
    })?;
    gate.cut();
    let lost = lost.wait();
    ensure!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
    gate.open();
    eventually("the connection after that", || {
        Ok(session.epoch() == first + 2 && session.is_connected())
    })?;
    session.wait_connected(PATIENCE)?;
    session.release(Vec::new()).wait()?;
    ensure!(session.epoch() == first + 2);
    // A lease that is refused does not cost a connection either.
    gate.fail("Lease", Fault::Refuse(Code::ResourceExhausted), 1);
    let refused = session.lease(any_demand(&node)).wait();
    ensure!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    session.release(Vec::new()).wait()?;
    ensure!(session.epoch() == first + 2);
    Ok(())
}

/// A drain window of zero stands for the broker's default.
#[test]
fn no_drain_window_means_the_brokers() -> Result<()> {
    let mut node = Node::start(&["--drain-ms", "7654"])?;
    let session = node.session("donor")?;
    let ms = Duration::from_millis;
    ensure!(session.drain_window(Duration::ZERO) == ms(7654));
    // Any other window stays as it is, rounded up to whole milliseconds and limited to the protocol's bound.
    ensure!(session.drain_window(ms(20)) == ms(20));
    ensure!(session.drain_window(Duration::from_nanos(1)) == ms(1));
    ensure!(session.drain_window(Duration::MAX) == ms(600_000));
    node.kill_broker()?;
    eventually("the connection to be lost", || Ok(!session.is_connected()))?;
    ensure!(session.drain_window(Duration::ZERO) == ms(7654));
    Ok(())
}

/// An observer that tries to block the session's own thread.
struct Blocking {
    session: Session,
    outcome: Mutex<Option<Result<(), Error>>>,
    connections: Mutex<Vec<Connected>>,
}

impl Observer for Blocking {
    fn connected(&self, connected: &Connected) {
        let outcome = self.session.release(Vec::new()).wait();
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        let mut connections = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        connections.push(connected.clone());
    }
}

#[test]
fn a_restart_is_told_and_an_observer_that_would_block_is_refused() -> Result<()> {
    let mut node = Node::start(&[])?;
    let session = node.session("engine")?;
    let before = session.boot_id();
    let blocking = Arc::new(Blocking {
        session: session.clone(),
        outcome: Mutex::new(None),
        connections: Mutex::new(Vec::new()),
    });
    let observer: Arc<dyn Observer> = Arc::clone(&blocking) as _;
    session.observe(&observer);
    node.kill_broker()?;
    node.start_broker()?;
    let connections = || {
        blocking
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    };
    eventually("the next connection", || Ok(!connections().is_empty()))?;
    let told = connections()[0].clone();
    ensure!(told.restarted && !told.replaced, "{told:?}");
    ensure!(session.boot_id().is_some() && session.boot_id() != before);
    let outcome = blocking
        .outcome
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    ensure!(
        matches!(outcome, Some(Err(Error::OnSessionThread { .. }))),
        "{outcome:?}"
    );
    Ok(())
}

#[test]
fn a_broker_without_its_ledger_replaces_the_session() -> Result<()> {
    let mut node = Node::start(&[])?;
    let session = node.session("engine")?;
    let label = session.label();
    let watching = Arc::new(Blocking {
        session: session.clone(),
        outcome: Mutex::new(None),
        connections: Mutex::new(Vec::new()),
    });
    let observer: Arc<dyn Observer> = Arc::clone(&watching) as _;
    session.observe(&observer);
    node.kill_broker()?;
    node.lose_ledger()?;
    node.start_broker()?;
    let connections = || {
        watching
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    };
    eventually("the next connection", || Ok(!connections().is_empty()))?;
    ensure!(connections()[0].replaced);
    ensure!(session.label() != label);
    Ok(())
}

#[test]
fn hits_are_counted_over_every_rank() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = Donor::open(
        node.session("donor")?,
        node.layer()?,
        DonorConfig {
            device: node.device(1),
            slab_bytes: SLAB_BYTES,
            drain: Duration::ZERO,
            handle: None,
        },
    )?;
    donor.grow(4 * SLAB_BYTES)?;
    let ranks = ["rank 0", "rank 1"].map(Asker::new);
    let engines: Vec<Engine> = (ranks.iter())
        .map(|rank| {
            let mut config = engine::config(node.device(0), 2);
            config.layout.namespace = rank.namespace.clone();
            let session = node.session(&rank.namespace)?;
            let engine = Engine::new(Some(session), node.layer()?, config)?;
            engine.reserve(1)?;
            Ok(engine)
        })
        .collect::<Result<_>>()?;
    let session = node.session("scheduler")?;
    let hashes: Vec<BlockHash> = (0..8).map(engine::hash).collect();
    ensure!(session.count_hits(&ranks, &hashes, PATIENCE) == 0);
    ensure!(engines[0].store(&[0, 1, 2, 3, 4, 5])?.stored == 6);
    ensure!(session.count_hits(&ranks, &hashes, PATIENCE) == 0);
    ensure!(engines[1].store(&[0, 1, 2, 3])?.stored == 4);
    ensure!(session.count_hits(&ranks, &hashes, PATIENCE) == 4);
    ensure!(session.count_hits(&ranks[..1], &hashes, PATIENCE) == 6);
    ensure!(session.count_hits(&[], &hashes, PATIENCE) == 0);
    let gate = Gate::before(&node)?;
    let session = gate.session("a scheduler of little patience")?;
    ensure!(session.count_hits(&ranks, &hashes, PATIENCE) == 4);
    gate.hold("Lookup");
    let limit = Duration::from_millis(1);
    ensure!(session.count_hits(&ranks, &hashes, limit) == 0);
    Ok(())
}
