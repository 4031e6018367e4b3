//! Random histories against the oracle and the world, and broken brokers that the world must catch.

use std::io::Write;

use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use super::{
    faults::Fault,
    history::{History, Step, steps, travelling_steps},
    watching::Follower,
};

/// Runs random histories to their ends. Every run draws another seed, and prints it; `SWIFTCACHE_FAULT_SEED` draws it
/// again, `PROPTEST_CASES` more.
fn run(least: u32, steps: impl Strategy<Value = Vec<Step>>, history: fn() -> History) {
    let named = std::env::var("SWIFTCACHE_FAULT_SEED").ok();
    let seed: u64 = named.map_or_else(rand::random, |seed| seed.parse().unwrap());
    writeln!(std::io::stderr(), "histories: SWIFTCACHE_FAULT_SEED={seed}").unwrap();
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config {
        cases: Config::default().cases.max(least),
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..Config::default()
    };
    let outcome = TestRunner::new_with_rng(config, rng).run(&steps, |steps| {
        let outcome = history().run(&steps);
        prop_assert!(outcome.is_ok(), "{}", outcome.unwrap_err());
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("SWIFTCACHE_FAULT_SEED={seed}: {error}");
    }
}

#[test]
fn no_history_breaks_the_contract() {
    run(5_000, steps(), || History::new(None));
}

/// Messages take their time, overtake each other between sessions, are lost with their connections and held by
/// partitions, and the clock jumps.
#[test]
fn no_travelling_history_breaks_the_contract() {
    run(2_000, travelling_steps(), || History::travelling(None));
}

/// The twin: who is not told that a block is gone is noticed.
#[test]
fn a_watcher_that_hears_of_no_removal_is_caught() {
    let mut runner = TestRunner::deterministic();
    let strategy = steps();
    let caught = (0..5_000).any(|_| {
        let steps = strategy.new_tree(&mut runner).unwrap().current();
        let mut deaf = History::new(None);
        deaf.follower = Follower::deaf();
        let outcome = deaf.run(&steps);
        outcome.is_err_and(|wrong| wrong.contains("a watcher knows"))
    });
    assert!(caught, "nobody notices what a watcher is not told");
}

/// The twin of the travelling ones: broken brokers are caught where nobody hears anything at once. What is wrong with pins
/// alone takes more coincidences than these histories have; the others above show it.
#[test]
fn the_world_catches_broken_brokers_from_afar() {
    for fault in [
        Fault::ForgetsReaders,
        Fault::TrustsTimeouts,
        Fault::TrustsClosedStreams,
        Fault::TrustsStaleAcks,
        Fault::LosesLeases,
    ] {
        let mut runner = TestRunner::deterministic();
        let strategy = travelling_steps();
        let caught = (0..5_000).any(|_| {
            let steps = strategy.new_tree(&mut runner).unwrap().current();
            History::travelling(Some(fault)).run(&steps).is_err()
        });
        assert!(caught, "{fault:?} goes unnoticed");
    }
}

/// Whether the world objects to any of many histories under a broker with this fault.
fn caught(fault: Fault) -> bool {
    // Rare coincidences are behind some of them: which history has one first changes with every rule of the core.
    const HISTORIES: usize = 50_000;
    let mut runner = TestRunner::deterministic();
    let strategy = steps();
    (0..HISTORIES).any(|_| {
        let steps = strategy.new_tree(&mut runner).unwrap().current();
        History::new(Some(fault)).run(&steps).is_err()
    })
}

/// The twin: each of these would pass unseen if the world looked away.
#[test]
fn the_world_catches_every_broken_broker() {
    for fault in [
        Fault::ForgetsReaders,
        Fault::TrustsTimeouts,
        Fault::TrustsClosedStreams,
        Fault::SkipsScrubs,
        Fault::ForgetsPins,
        Fault::ForgetsEarlierPins,
        Fault::LosesShares,
        Fault::LosesLeases,
        Fault::LosesScrubs,
        Fault::IgnoresUnpublish,
        Fault::TrustsStaleAcks,
        Fault::TrustsForeignAcks,
        Fault::TrustsClock,
        Fault::FindsUnreachable,
        Fault::ForgetsUnmappable,
        Fault::TrustsOldKeeps,
        Fault::SharesAllocations,
    ] {
        assert!(caught(fault), "{fault:?} goes unnoticed");
    }
}
