//! What a broker knows after a restart, and what it must not believe.

use swiftcache_proto::domain::{LeaseId, Shortfall};

use super::fixture::*;
use crate::core::{Event, Node, Outgoing, Process, Record, Refusal, State};

#[test]
fn a_restarted_broker_lends_nothing_that_somebody_may_hold() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 2);
    let grant = bench.lease(borrower, 1).remove(0);
    bench.publish(borrower, &grant, &[(1, 0)]);
    bench.restart();
    assert_eq!(bench.state.processes().count(), 2);
    assert_eq!(bench.state.total().leased, SLAB);
    assert_eq!(bench.hits(borrower, 1..2), 0);
    // Until its donor offers it again, nobody could map what would be lent.
    assert_eq!(bench.ask(borrower, 1), (Vec::new(), Shortfall::NoFreeSlab));
    bench.offer(donor, 1, 1, 2);
    let next = bench.lease(borrower, 1).remove(0);
    assert_ne!((next.lease, next.slab), (grant.lease, grant.slab));
    assert_eq!(bench.publish(borrower, &grant, &[(1, 0)]), [0u32; 0]);
    assert_eq!(bench.hits(borrower, 1..2), 1);
}

#[test]
fn a_revocation_outlives_the_broker() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(borrower, 1).remove(0);
    bench.withdraw_region(donor, 1);
    bench.restart();
    let refusal = bench.refused(Bench::publish_event(borrower, &grant, &[(1, 0)]));
    assert!(matches!(refusal, Refusal::Stale(_)), "{refusal:?}");
    bench.done(Event::Attach(donor));
    bench.acknowledge(borrower, &grant);
    assert_eq!(bench.heard(donor), [Outgoing::Returned(region(1))]);
}

#[test]
fn pins_of_the_broker_before_are_reckoned_with() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 2);
    let grant = bench.lease(borrower, 1).remove(0);
    bench.publish(borrower, &grant, &[(1, 0)]);
    bench.hits(reader, 1..2);
    bench.restart();
    let pin_ms = bench.config.pin_ms;
    assert_eq!(
        bench.unpublish(borrower, &grant, &[0, 1]),
        (vec![0, 1], pin_ms)
    );
    bench.tick(u64::from(pin_ms) - 1);
    assert_eq!(bench.unpublish(borrower, &grant, &[0]), (vec![0], 1));
    bench.tick(1);
    assert_eq!(bench.unpublish(borrower, &grant, &[0]), (vec![], 0));
}

#[test]
fn a_scrub_under_way_outlives_the_broker() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "blue");
    let red = bench.join("red", "red");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(blue, 1).remove(0);
    bench.release(blue, &[&grant]);
    assert_eq!(bench.ask(red, 1).1, Shortfall::Scrubbing);
    bench.restart();
    bench.offer(donor, 1, 1, 1);
    // Not even to the tenant whose bytes they are: the donor is about to zero them.
    assert_eq!(bench.ask(blue, 1).0.len(), 0);
    bench.done(Event::Attach(donor));
    assert_eq!(bench.heard(donor).len(), 1);
}

#[test]
fn a_compacted_ledger_forgets_neither_ids_nor_tenants() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "blue");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(blue, 1).remove(0);
    bench.release(blue, &[&grant]);
    bench.done(Event::Leave(blue));
    bench.ledger = bench.state.records();
    bench.restart();
    bench.offer(donor, 1, 1, 1);
    bench.done(Event::Attach(donor));
    let red = bench.join("red", "red");
    assert_eq!(bench.ask(red, 1).1, Shortfall::Scrubbing);
    let heard = bench.heard(donor);
    bench.apply(Event::Scrubbed {
        caller: donor,
        region: region(1),
        slab: 0,
        generation: grant.generation,
    });
    assert!(
        matches!(heard[..], [Outgoing::Scrub { generation, .. }] if generation == grant.generation)
    );
    let next = bench.lease(red, 1).remove(0);
    assert!(next.lease > grant.lease && next.generation > grant.generation);
}

#[test]
fn drains_outlive_the_broker() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    let target = crate::core::DrainTarget::Device(device(1));
    bench.apply(Event::Drain {
        target: target.clone(),
        drain_ms: 1,
    });
    bench.restart();
    bench.offer(donor, 1, 1, 1);
    assert_eq!(bench.ask(borrower, 1).0.len(), 0);
    bench.done(Event::Undrain(target));
    bench.lease(borrower, 1);
}

/// A ledger that contradicts itself is refused, and the refusal says where.
#[test]
fn contradictions_are_refused() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    bench.lease(borrower, 1);
    let ledger = bench.ledger.clone();
    let restore = |records: Vec<Record>, node: Node| {
        State::restore(bench.config.clone(), node, records).map_err(|error| error.to_string())
    };
    assert!(restore(ledger.clone(), node()).is_ok());
    for number in 0..ledger.len() {
        let mut twice = ledger.clone();
        twice.push(ledger[number].clone());
        let error = restore(twice, node()).unwrap_err();
        assert!(error.starts_with("ledger record 5: "), "{error}");
    }
    for missing in [0, 2] {
        let mut torn = ledger.clone();
        torn.remove(missing);
        assert!(restore(torn, node()).is_err(), "without record {missing}");
    }
    let error = restore(ledger.clone(), Node::default()).unwrap_err();
    assert!(error.contains("SIM-1"), "{error}");
    let stray = Record::LetGo {
        lease: LeaseId(77),
        session: donor.session,
    };
    assert!(restore(vec![stray], node()).is_err());
}

/// Records survive the trip through the ledger's JSON.
#[test]
fn records_are_json_lines() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000/blue");
    let process = Process {
        pid: 0,
        birth: u64::MAX,
        uid: 7,
    };
    let borrower = bench.join_as(process, "borrower \"quoted\"", "1000/blue");
    let reader = bench.join("reader", "1000/blue");
    bench.offer(donor, 1, 1, 2);
    let grants = bench.lease(borrower, 2);
    bench.share(reader, &grants[0]);
    bench.release(borrower, &[&grants[0], &grants[1]]);
    bench.apply(Event::Drain {
        target: crate::core::DrainTarget::Region(region(1)),
        drain_ms: 1,
    });
    for record in bench.ledger.iter().chain(&bench.state.records()) {
        let line = serde_json::to_string(record).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), *record);
    }
}
