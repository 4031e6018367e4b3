//! A client whose broker sends garbage: every call ends, nothing panics, and the client works with an honest broker
//! again.

use std::{
    io::{Read, Write},
    os::unix::net::UnixListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng, rngs::StdRng};
use swiftcache_client::{
    Error,
    cache::BorrowerConfig,
    session::{Asker, Demand, Session, SessionConfig},
};
use swiftcache_proto::domain::BlockHash;
use swiftcache_tests::{
    PATIENCE,
    crew::donor_process,
    engine::{self, BLOCK_BYTES, Engine, eventually},
    gate::Gate,
    node::Node,
    seed::Course,
};

/// The first frame of an HTTP/2 server: empty settings.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

#[test]
fn raw_garbage_from_a_broker_is_no_connection() -> Result<()> {
    let mut course = Course::new("garbage from a broker", 40);
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("broker.sock");
    let listener = UnixListener::bind(&socket)?;
    let said = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&said);
    let mut rng = StdRng::seed_from_u64(course.seed);
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut words = if rng.random_bool(0.5) {
                SETTINGS.to_vec()
            } else {
                Vec::new()
            };
            let length = rng.random_range(0..4_000);
            words.extend((0..length).map(|_| rng.random::<u8>()));
            // The client may hang up in the middle.
            let _ = stream.set_read_timeout(Some(Duration::from_millis(5)));
            let _ = stream.read(&mut [0; 512]);
            let _ = stream.write_all(&words);
            counts.fetch_add(1, Ordering::SeqCst);
        }
    });
    while course.goes_on() {
        let session = Session::start(SessionConfig {
            socket: socket.clone(),
            name: "credulous".to_owned(),
            tenant: String::new(),
        })?;
        let before = said.load(Ordering::SeqCst);
        eventually("garbage to be heard", || {
            Ok(said.load(Ordering::SeqCst) > before)
        })?;
        let found = session
            .lookup(&Asker::new("model"), &[BlockHash([1; 16])], PATIENCE)
            .wait();
        ensure!(
            matches!(found, Err(Error::Disconnected { .. })),
            "{found:?}"
        );
        ensure!(session.node().is_none());
    }
    Ok(())
}

/// The answers can be decoded, and their values are random.
#[test]
fn forged_answers_end_every_call_and_nothing_else() -> Result<()> {
    let mut course = Course::new("forged answers", 60);
    let node = Node::start(&["--pin-ms", "100", "--drain-ms", "200"])?;
    let _donor = donor_process(&node, 1, 4)?;
    let gate = Gate::before(&node)?;
    let session = gate.session("credulous")?;
    let mut config = engine::config(node.device(0), 4);
    config.lookup_limit = BorrowerConfig::LOOKUP_LIMIT;
    config.host_tier_bytes = 16 * BLOCK_BYTES;
    let engine = Engine::new(Some(session.clone()), node.layer()?, config)?;
    gate.garble(Some(StdRng::seed_from_u64(course.seed)));
    while course.goes_on() {
        // The forged answers decide the results. The client must only bring each call to an end.
        let n = course.rng.random_range(0..100_u32);
        engine.store(&[n, n + 1_000, n + 2_000])?;
        drop(engine.lookup(&[n, n + 1_000, n + 2_000, n + 3_000]));
        engine.borrower.reserve(BLOCK_BYTES);
        let demand = Demand {
            namespace: "other".to_owned(),
            device: node.device(0),
            bytes: 1,
            block_bytes: 1,
            class: Default::default(),
            host_bytes: 0,
        };
        drop(session.lease(demand).wait());
    }
    gate.garble(None);
    drop(engine);
    drop(session);
    // A client that was told a wrong session id cannot leave. Its leases stay with its process, which is this one and
    // lives on. So the honest client gets new slabs and other blocks.
    let _another = donor_process(&node, 2, 4)?;
    let honest = Engine::new(
        Some(node.session("honest")?),
        node.layer()?,
        engine::config(node.device(0), 4),
    )?;
    honest.reserve(1)?;
    ensure!(honest.store(&[5_001, 5_002, 5_003])?.stored == 3);
    ensure!(honest.fetch(&[5_001, 5_002, 5_003])?.served == 3);
    Ok(())
}
