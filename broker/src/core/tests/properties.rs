//! Random histories against the oracle and the world, and broken brokers that the world must catch.

use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};

use super::{
    faults::Fault,
    history::{History, steps},
};

proptest! {
    #![proptest_config(Config {
        cases: 5_000,
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..Config::default()
    })]

    #[test]
    fn no_history_breaks_the_contract(steps in steps()) {
        let outcome = History::new(None).run(&steps);
        prop_assert!(outcome.is_ok(), "{}", outcome.unwrap_err());
    }
}

/// Whether the world objects to any of many histories under a broker with this fault.
fn caught(fault: Fault) -> bool {
    const HISTORIES: usize = 5_000;
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
    ] {
        assert!(caught(fault), "{fault:?} goes unnoticed");
    }
}
