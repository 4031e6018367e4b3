//! Fair shares, and that they come to rest.

use swiftcache_proto::domain::{LeaseClass, RevokeReason, Shortfall};

use super::fixture::*;
use crate::core::{
    Caller, Event, EvictTarget, Grant, LeaseDemand, Need, Outgoing,
    shares::{Level, max_min_level},
};

#[test]
fn max_min_levels() {
    let share = |demands: &[u64], pool| {
        let demands = demands.iter().map(|demand| (*demand, 1)).collect();
        Level::share(max_min_level(demands, pool), 1)
    };
    assert_eq!(share(&[], 10), u64::MAX);
    assert_eq!(share(&[3, 3], 10), u64::MAX);
    assert_eq!(share(&[10, 10], 10), 5);
    assert_eq!(share(&[2, 10], 10), 8);
    assert_eq!(share(&[1, 2, 10, 10], 10), 3);
}

#[test]
fn levels_follow_weights() {
    let shares = |demands: Vec<(u64, u64)>, pool| {
        let level = max_min_level(demands.clone(), pool);
        let share = |(demand, weight)| Level::share(level, weight).min(demand);
        demands.into_iter().map(share).collect::<Vec<_>>()
    };
    assert_eq!(shares(vec![(100, 1), (100, 3)], 40), [10, 30]);
    // What one does not want goes to the others by their weights.
    assert_eq!(shares(vec![(4, 1), (100, 3), (100, 1)], 40), [4, 27, 9]);
    assert_eq!(shares(vec![(5, 7), (5, 1)], 40), [5, 5]);
}

/// What sessions were asked back for the sake of fairness; they acknowledge.
fn give_back(bench: &mut Bench, caller: Caller, held: &mut Vec<Grant>) -> usize {
    let mut given = 0;
    for message in bench.heard(caller) {
        let Outgoing::Revoke { lease, reason, .. } = message else {
            continue;
        };
        assert_eq!(reason, RevokeReason::Fairness);
        let place = held.iter().position(|grant| grant.lease == lease).unwrap();
        let grant = held.remove(place);
        bench.acknowledge(caller, &grant);
        given += 1;
    }
    given
}

#[test]
fn a_latecomer_gets_its_share_and_nobody_thrashes() {
    for slabs in [4, 5] {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1000");
        let early = bench.join("early", "1000");
        let late = bench.join("late", "1000");
        bench.offer(donor, 1, 1, slabs);
        let mut held = [bench.lease(early, slabs), Vec::new()];
        // The slab with the fewest blocks goes first.
        bench.publish(early, &held[0][0].clone(), &[(1, 0)]);
        let mut moved = 0;
        for round in 0..10 {
            for (who, caller) in [early, late].into_iter().enumerate() {
                let (grants, _) = bench.ask(caller, slabs);
                held[who].extend(grants);
                moved += give_back(&mut bench, early, &mut held[0]);
                moved += give_back(&mut bench, late, &mut held[1]);
            }
            if round > 1 {
                assert_eq!(moved as u64, slabs / 2, "slabs keep moving");
            }
        }
        let sizes = (held[0].len() as u64, held[1].len() as u64);
        assert_eq!(sizes, (slabs - slabs / 2, slabs / 2));
        assert_eq!(bench.hits(early, 1..2), 1);
    }
}

/// However many want everything at once: slabs come to rest, spread as evenly as slabs can be.
#[test]
fn any_number_of_borrowers_comes_to_rest() {
    for (borrowers, slabs) in (2..6).flat_map(|n| (1..13).map(move |slabs| (n, slabs))) {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1000");
        bench.offer(donor, 1, 1, slabs);
        let callers: Vec<_> = (0..borrowers).map(|_| bench.join("b", "1000")).collect();
        let mut held = vec![bench.lease(callers[0], slabs)];
        held.resize_with(borrowers, Vec::new);
        let mut last_moved = 0;
        for round in 0..3 * borrowers + 6 {
            for who in 0..borrowers {
                held[who].extend(bench.ask(callers[who], slabs).0);
                for (caller, held) in callers.iter().zip(&mut held) {
                    if give_back(&mut bench, *caller, held) > 0 {
                        last_moved = round;
                    }
                }
            }
        }
        let sizes: Vec<_> = held.iter().map(Vec::len).collect();
        let spread = sizes.iter().max().unwrap() - sizes.iter().min().unwrap();
        assert!(
            last_moved < 3 * borrowers,
            "{slabs} slabs keep moving: {sizes:?}"
        );
        assert!(spread <= 1, "{sizes:?}");
        assert_eq!(sizes.iter().sum::<usize>() as u64, slabs);
    }
}

#[test]
fn what_was_taken_for_one_is_not_given_to_another() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let early = bench.join("early", "1000");
    let late = bench.join("late", "1000");
    bench.offer(donor, 1, 1, 4);
    let mut held = bench.lease(early, 4);
    assert_eq!(bench.ask(late, 1), (vec![], Shortfall::NoFreeSlab));
    // Asking again while it is on its way takes no more.
    assert_eq!(bench.ask(late, 1), (vec![], Shortfall::NoFreeSlab));
    assert_eq!(give_back(&mut bench, early, &mut held), 1);
    assert_eq!(bench.ask(early, 1), (vec![], Shortfall::Fairness));
    bench.lease(late, 1);
}

#[test]
fn a_demand_is_forgotten_when_its_session_stops_asking() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let early = bench.join("early", "1000");
    let late = bench.join("late", "1000");
    bench.offer(donor, 1, 1, 4);
    let mut held = bench.lease(early, 4);
    bench.ask(late, 1);
    assert_eq!(give_back(&mut bench, early, &mut held), 1);
    assert_eq!(bench.ask(early, 1).1, Shortfall::Fairness);
    bench.tick(bench.config.wait_ms.into());
    bench.lease(early, 1);
}

#[test]
fn slabs_that_the_asker_cannot_use_stay_where_they_are() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let early = bench.join("early", "1000");
    let late = bench.join("late", "1000");
    bench.offer(donor, 1, 1, 4);
    bench.lease(early, 4);
    let mut big = Bench::offer_event(donor, 2, 1, 2);
    big.slab_bytes = 2 * SLAB;
    bench.done(Event::Offer(big));
    let (grants, _) = bench.demanded(LeaseDemand {
        block_bytes: 2 * SLAB,
        ..Bench::demand(late, 4)
    });
    assert_eq!(grants.len(), 1);
    assert_eq!(bench.heard(early), []);
}

/// An engine that lends and borrows waits for slabs of others. Its own are not kept for it.
#[test]
fn nothing_is_kept_for_who_lends_it() {
    for elsewhere in [0, 4] {
        let mut bench = Bench::new();
        let lender = bench.join("lender", "1001");
        let other = bench.join("other", "1002");
        let asker = bench.join("asker", "1000");
        bench.offer(lender, 1, 1, 16);
        if elsewhere > 0 {
            bench.offer(other, 2, 1, elsewhere);
        }
        let (granted, shortfall) = bench.ask(lender, 16);
        assert_eq!(
            (granted.len() as u64, shortfall),
            (elsewhere, Shortfall::NoFreeSlab)
        );
        bench.lease(asker, 16);
        if elsewhere > 0 {
            // The twin: what it can use is kept for it.
            bench.offer(other, 3, 1, 4);
            assert_eq!(bench.ask(asker, 4), (Vec::new(), Shortfall::Fairness));
            assert_eq!(bench.ask(lender, 12).0.len(), 4);
        }
    }
}

/// A session on a GPU that it shares with the donor, say, which cannot map what is lent there.
#[test]
fn nothing_is_kept_for_who_cannot_map_it() {
    for namespace in ["model", "another"] {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1002");
        let lame = bench.join("lame", "1000");
        let asker = bench.join("asker", "1000");
        bench.offer(donor, 1, 1, 16);
        let demand = || LeaseDemand {
            namespace: namespace.to_owned(),
            ..Bench::demand(lame, 16)
        };
        let (grants, _) = bench.demanded(demand());
        assert_eq!(grants.len(), 16);
        bench.done(Event::Release {
            caller: lame,
            leases: grants.iter().map(|grant| grant.lease).collect(),
            unmappable: true,
            bequeath: false,
        });
        let (none, shortfall) = bench.demanded(demand());
        assert_eq!((none.len(), shortfall), (0, Shortfall::NoFreeSlab));
        let (granted, shortfall) = bench.ask(asker, 16);
        assert_eq!(
            (granted.len(), shortfall),
            (16, Shortfall::None),
            "{namespace}"
        );
    }
}

/// Fairness takes no working set, however little others have. The twin, a cache, gives half of what it has.
#[test]
fn a_working_set_is_taken_by_its_donor_and_by_operators_only() {
    for class in [LeaseClass::Cache, LeaseClass::WorkingSet] {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1000");
        let engine = bench.join("engine", "1000");
        let late = bench.join("late", "1001");
        bench.offer(donor, 1, 1, 4);
        let (grants, _) = bench.demanded(LeaseDemand {
            class,
            ..Bench::demand(engine, 4)
        });
        assert_eq!(grants.len(), 4);
        for _ in 0..3 {
            let (taken, shortfall) = bench.ask(late, 4);
            assert_eq!((taken.len(), shortfall), (0, Shortfall::NoFreeSlab));
        }
        let asked_back = bench.heard(engine).len();
        let most = if class.is_cache() { 2 } else { 0 };
        assert_eq!(asked_back, most, "{class:?}");
        if class.is_cache() {
            continue;
        }
        let total = bench.state.total();
        assert_eq!((total.leased, total.working_set), (0, 4 * SLAB));
        // It stays what it is across a restart, with the same rights.
        bench.restart();
        bench.resume(
            engine,
            &grants.iter().map(|grant| grant.lease).collect::<Vec<_>>(),
            &[],
        );
        bench.done(Event::Attach(engine));
        bench.resume(late, &[], &[]);
        bench.resume(donor, &[], &[]);
        bench.done(Event::Attach(donor));
        bench.offer(donor, 1, 1, 4);
        bench.ask(late, 4);
        assert_eq!(bench.heard(engine).len(), 0);
        // Nothing is published there.
        bench.refused(Bench::publish_event(engine, &grants[0], &[(1, 0)]));
        // What a withdrawal would cost can be seen; an operator takes one, and the donor the others.
        let need = Need {
            device: device(1),
            bytes: SLAB,
            donor: None,
        };
        let preview = bench.state.preview_withdraw(&need).unwrap();
        assert!(preview.leases.iter().all(|lease| lease.class == class));
        bench.apply(Event::Evict(EvictTarget::Lease(grants[0].lease)));
        assert_eq!(bench.heard(engine).len(), 1);
        bench.withdraw_region(donor, 1);
        assert_eq!(bench.heard(engine).len(), 3);
        assert_eq!(bench.state.total().working_set, 0);
    }
}

/// Of regions with leases, those without a working set go first.
#[test]
fn a_donor_that_needs_bytes_back_takes_caches_first() {
    for (first, second) in [
        (LeaseClass::WorkingSet, LeaseClass::Cache),
        (LeaseClass::Cache, LeaseClass::WorkingSet),
    ] {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1000");
        let engine = bench.join("engine", "1000");
        let mut regions = Vec::new();
        for (number, class) in [(1, first), (2, second)] {
            bench.offer(donor, number, 1, 1);
            let (grants, _) = bench.demanded(LeaseDemand {
                class,
                ..Bench::demand(engine, 1)
            });
            regions.push((class, grants[0].region));
        }
        let need = Need {
            device: device(1),
            bytes: SLAB,
            donor: None,
        };
        let preview = bench.state.preview_withdraw(&need).unwrap();
        let cache = regions.iter().find(|(class, _)| class.is_cache()).unwrap();
        assert_eq!(preview.regions.len(), 1);
        assert_eq!(preview.regions[0].id, cache.1);
    }
}
