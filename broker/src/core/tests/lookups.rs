//! One lookup contract: what is found is what the asker can load, own tiers first.

use swiftcache_proto::domain::{BorrowerId, FoundRun, Hold, Medium, Shortfall};

use super::fixture::*;
use crate::core::{
    Caller, CoreConfig, DrainTarget, Event, Grant, Keep, LeaseDemand, Lookup, Outgoing, Refusal,
};

/// A donor on every device, and three sessions of one tenant.
fn bench() -> (Bench, [Caller; 3]) {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    for on in 0..4 {
        bench.offer(donor, u64::from(on), on, 4);
    }
    let sessions = ["lessee", "reader", "scheduler"].map(|name| bench.join(name, "1000"));
    (bench, sessions)
}

/// A slab on device `on`, for a borrower that computes there.
fn lease_on(bench: &mut Bench, lessee: Caller, on: u32) -> Grant {
    let (mut grants, _) = bench.demanded(LeaseDemand {
        device: device(on),
        ..Bench::demand(lessee, 1)
    });
    assert_eq!(grants[0].device, device(on));
    grants.remove(0)
}

fn from(caller: Caller, on: u32, blocks: std::ops::Range<u64>) -> Lookup {
    Lookup {
        device: Some(device(on)),
        ..Bench::lookup_of(caller, blocks)
    }
}

fn of(caller: Caller, borrower: u8, blocks: std::ops::Range<u64>) -> Lookup {
    Lookup {
        borrower: Some(BorrowerId([borrower; 16])),
        ..Bench::lookup_of(caller, blocks)
    }
}

fn count(bench: &mut Bench, lookup: Lookup) -> u32 {
    let (runs, _) = bench.looked_up(lookup);
    runs.iter().map(FoundRun::blocks).sum()
}

/// The tiers of the found runs, and how many blocks each has.
fn tiers(bench: &mut Bench, lookup: Lookup) -> Vec<(Medium, Hold, u32)> {
    let (runs, _) = bench.looked_up(lookup);
    let tier = |run: FoundRun| match run {
        FoundRun::Leased {
            extent,
            medium,
            hold,
        } => (medium, hold, extent.count),
        FoundRun::Kept { count } => (Medium::Host, Hold::Own, count),
    };
    runs.into_iter().map(tier).collect()
}

#[test]
fn what_a_device_does_not_reach_is_not_found_by_it() {
    let (mut bench, [lessee, reader, _]) = bench();
    let grant = lease_on(&mut bench, lessee, 0);
    bench.publish(lessee, &grant, &[(1, 0), (2, 1)]);
    // Over a peer link, and on the same device.
    for on in 0..3 {
        assert_eq!(count(&mut bench, from(reader, on, 1..3)), 2, "{on}");
    }
    // No link to device 0; and, from the other side, one without peer access.
    assert_eq!(count(&mut bench, from(reader, 3, 1..3)), 0);
    let grant = lease_on(&mut bench, lessee, 3);
    bench.publish(lessee, &grant, &[(5, 0)]);
    assert_eq!(count(&mut bench, from(reader, 1, 5..6)), 0);
    assert_eq!(count(&mut bench, from(reader, 2, 5..6)), 1);
    // Who does not say what it computes on is told as ever.
    assert_eq!(bench.hits(reader, 1..3), 2);
    assert_eq!(bench.hits(reader, 5..6), 1);
}

#[test]
fn nothing_is_lent_or_shared_over_a_link_without_peer_access() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let lessee = bench.join("lessee", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 3, 2);
    let (grants, shortfall) = bench.demanded(LeaseDemand {
        device: device(1),
        ..Bench::demand(lessee, 1)
    });
    assert_eq!((grants.len(), shortfall), (0, Shortfall::NoFreeSlab));
    let grant = lease_on(&mut bench, lessee, 3);
    let share = |on| Event::Share {
        caller: reader,
        lease: grant.lease,
        device: device(on),
    };
    let refusal = bench.refused(share(1));
    assert!(
        matches!(&refusal, Refusal::Invalid { problem, .. } if problem.contains("no peer access")),
        "{refusal:?}"
    );
    // The twin: a link with peer access.
    assert!(bench.apply(share(2)).is_some());
    assert_eq!(bench.state.leases().next().unwrap().readers, 1);
}

#[test]
fn a_block_that_only_an_unreachable_replica_has_is_published_again() {
    let (mut bench, [lessee, other, reader]) = bench();
    let none: [u32; 0] = [];
    let first = lease_on(&mut bench, lessee, 0);
    let far = lease_on(&mut bench, other, 3);
    assert_eq!(bench.publish(lessee, &first, &[(1, 0), (2, 1)]), none);
    assert_eq!(bench.publish(other, &far, &[(1, 3), (2, 2)]), none);
    // Each is found by whom it can serve, and over the best link where both can.
    let place = |bench: &mut Bench, on| match bench.looked_up(from(reader, on, 1..2)).0[..] {
        [FoundRun::Leased { extent, .. }] => extent.lease,
        ref other => panic!("{other:?}"),
    };
    assert_eq!(place(&mut bench, 1), first.lease);
    assert_eq!(place(&mut bench, 0), first.lease);
    assert_eq!(place(&mut bench, 3), far.lease);
    assert_eq!(count(&mut bench, from(reader, 3, 1..3)), 2);
    // The twin: whoever can read it elsewhere does not publish it.
    let near = lease_on(&mut bench, other, 1);
    assert_eq!(bench.publish(other, &near, &[(1, 0), (2, 1)]), [0, 1]);
    // One copy goes, the other stays.
    bench.unpublish(lessee, &first, &[0, 1]);
    assert_eq!(count(&mut bench, from(reader, 0, 1..3)), 0);
    assert_eq!(count(&mut bench, from(reader, 3, 1..3)), 2);
}

#[test]
fn what_cannot_be_mapped_is_neither_found_nor_granted_until_it_is_offered_anew() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let lessee = bench.join("lessee", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 4);
    let grant = bench.lease(lessee, 1).remove(0);
    bench.publish(lessee, &grant, &[(1, 0)]);
    assert_eq!(count(&mut bench, from(reader, 0, 1..2)), 1);
    let shared = bench.share(reader, &grant);
    let gives_up = |unmappable| Event::Release {
        caller: reader,
        leases: vec![shared.lease],
        unmappable,
        bequeath: false,
    };
    // The twin: a share that is given back for another reason.
    bench.done(gives_up(false));
    assert_eq!(count(&mut bench, from(reader, 0, 1..2)), 1);
    bench.share(reader, &grant);
    bench.heard(donor);
    bench.done(gives_up(true));
    // Its donor's owner hears of it, once, and again after a lost stream; and operators see it.
    let heard = [Outgoing::CannotMap {
        region: region(1),
        sessions: 1,
    }];
    assert_eq!(bench.heard(donor), heard);
    bench.apply(Event::Detach(donor.session));
    bench.done(Event::Attach(donor));
    assert_eq!(bench.heard(donor), heard);
    let seen = |bench: &Bench| {
        let regions: Vec<_> = bench
            .state
            .regions()
            .map(|it| it.unmappable_sessions)
            .collect();
        (regions, bench.state.devices()[1].unmappable_regions)
    };
    assert_eq!(seen(&bench), (vec![1], 1));
    let readers = bench.state.leases().map(|lease| lease.readers);
    assert_eq!(readers.collect::<Vec<_>>(), [0], "no reader is left behind");
    assert_eq!(count(&mut bench, from(reader, 0, 1..2)), 0);
    assert_eq!(bench.hits(reader, 1..2), 0);
    assert_eq!(bench.ask(reader, 1).1, Shortfall::NoFreeSlab);
    // Nobody is made to give up a slab that would be of no use, and nobody else is concerned.
    assert_eq!(bench.heard(lessee), []);
    assert_eq!(bench.hits(lessee, 1..2), 1);
    bench.lease(lessee, 1);
    bench.done(Event::Offer(Bench::offer_event(donor, 1, 1, 4)));
    assert_eq!(seen(&bench), (vec![0], 0));
    assert_eq!(bench.heard(donor), []);
    assert_eq!(count(&mut bench, from(reader, 0, 1..2)), 1);
    bench.lease(reader, 1);
}

#[test]
fn a_borrower_is_found_what_it_keeps_itself_whoever_asks_for_it() {
    let (mut bench, [worker, other, scheduler]) = bench();
    bench.done(Event::Keep(Keep {
        kept: hashes(1..5),
        ..Bench::keep_of(worker, 7)
    }));
    let host = |count| vec![(Medium::Host, Hold::Own, count)];
    assert_eq!(tiers(&mut bench, of(scheduler, 7, 1..9)), host(4));
    assert_eq!(tiers(&mut bench, of(worker, 7, 2..4)), host(2));
    // For others these blocks do not exist.
    assert_eq!(bench.hits(scheduler, 1..9), 0);
    assert_eq!(count(&mut bench, from(worker, 0, 1..9)), 0);
    let stranger = bench.join("stranger", "blue");
    assert_eq!(count(&mut bench, of(stranger, 7, 1..9)), 0);
    let elsewhere = Lookup {
        namespace: "other".to_owned(),
        ..of(scheduler, 7, 1..9)
    };
    assert_eq!(count(&mut bench, elsewhere), 0);
    let stolen = Event::Keep(Bench::keep_of(other, 7));
    let refusal = bench.refused(stolen);
    assert!(matches!(refusal, Refusal::NotYours { .. }), "{refusal:?}");
    // What is dropped is found no more; the rest is.
    bench.done(Event::Keep(Keep {
        dropped: hashes(3..4),
        kept: hashes(9..10),
        ..Bench::keep_of(worker, 7)
    }));
    assert_eq!(tiers(&mut bench, of(scheduler, 7, 1..5)), host(2));
    assert_eq!(tiers(&mut bench, of(scheduler, 7, 9..11)), host(1));
    for again in [
        Keep {
            anew: true,
            ..Bench::keep_of(worker, 7)
        },
        // Blocks of another size are others.
        Keep {
            block_bytes: 1,
            ..Bench::keep_of(worker, 7)
        },
        Keep {
            closed: true,
            ..Bench::keep_of(worker, 7)
        },
    ] {
        bench.done(Event::Keep(Keep {
            kept: hashes(1..5),
            ..Bench::keep_of(worker, 7)
        }));
        assert_eq!(tiers(&mut bench, of(scheduler, 7, 1..9)), host(4));
        bench.done(Event::Keep(again));
        assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 0);
    }
    bench.done(Event::Keep(Keep {
        kept: hashes(1..5),
        ..Bench::keep_of(worker, 7)
    }));
    bench.done(Event::Leave(worker));
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 0);
    bench.done(Event::Keep(Bench::keep_of(other, 7)));
}

#[test]
fn what_a_borrower_cannot_copy_from_is_not_found_for_it_as_long_as_that_lasts() {
    let (mut bench, [worker, replica, scheduler]) = bench();
    let (own, theirs) = (
        lease_on(&mut bench, worker, 0),
        lease_on(&mut bench, replica, 1),
    );
    bench.publish(worker, &own, &[(1, 0)]);
    bench.publish(replica, &theirs, &[(2, 0)]);
    let says = |bench: &mut Bench, down: &[u32], host_down| {
        bench.done(Event::Keep(Keep {
            kept: hashes([3]),
            down: down.iter().map(|number| device(*number)).collect(),
            host_down,
            ..Bench::keep_of(worker, 7)
        }));
    };
    says(&mut bench, &[], false);
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 3);
    says(&mut bench, &[1], false);
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 1);
    assert_eq!(count(&mut bench, of(scheduler, 7, 3..9)), 1);
    says(&mut bench, &[0, 1], true);
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 0);
    assert_eq!(count(&mut bench, of(scheduler, 7, 3..9)), 0);
    // Others are found it as before.
    assert_eq!(count(&mut bench, from(replica, 0, 1..9)), 2);
    says(&mut bench, &[], false);
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 3);
}

#[test]
fn own_tiers_come_first() {
    let (mut bench, [worker, replica, scheduler]) = bench();
    let own = lease_on(&mut bench, worker, 0);
    let theirs = lease_on(&mut bench, replica, 1);
    bench.publish(worker, &own, &[(1, 0)]);
    bench.publish(replica, &theirs, &[(2, 0), (3, 1), (4, 2)]);
    bench.done(Event::Keep(Keep {
        kept: hashes([1, 3]),
        ..Bench::keep_of(worker, 7)
    }));
    let expected = vec![
        (Medium::Hbm, Hold::Own, 1),
        (Medium::Hbm, Hold::Shared, 1),
        (Medium::Host, Hold::Own, 1),
        (Medium::Hbm, Hold::Shared, 1),
    ];
    assert_eq!(tiers(&mut bench, of(scheduler, 7, 1..9)), expected);
    // One that does not read others' leases is found its own only.
    bench.done(Event::Keep(Keep {
        shares: false,
        ..Bench::keep_of(worker, 7)
    }));
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 1);
    assert_eq!(count(&mut bench, of(scheduler, 7, 3..9)), 1);
    // It publishes what a replica has already: it could not read it there.
    let none: [u32; 0] = [];
    assert_eq!(bench.publish(worker, &own, &[(2, 1)]), none);
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..9)), 3);
}

#[test]
fn a_borrower_on_a_device_that_the_node_lacks_has_its_host_memory() {
    let (mut bench, [worker, replica, scheduler]) = bench();
    let theirs = lease_on(&mut bench, replica, 1);
    bench.publish(replica, &theirs, &[(1, 0)]);
    bench.done(Event::Keep(Keep {
        device: device(9),
        kept: hashes(2..4),
        ..Bench::keep_of(worker, 7)
    }));
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..4)), 0);
    assert_eq!(count(&mut bench, of(scheduler, 7, 2..4)), 2);
    let refusal = bench.refused(Event::Lookup(from(worker, 9, 1..2)));
    assert!(matches!(refusal, Refusal::Unknown { .. }), "{refusal:?}");
    // A borrower that nobody has heard of yet is as good as its device.
    assert_eq!(count(&mut bench, of(replica, 8, 1..2)), 0);
    let both = Lookup {
        device: Some(device(0)),
        ..of(scheduler, 8, 1..2)
    };
    assert_eq!(count(&mut bench, both), 1);
}

#[test]
fn blocks_of_another_size_and_memory_of_its_own_process_are_not_found() {
    let (mut bench, [lessee, worker, scheduler]) = bench();
    let grant = lease_on(&mut bench, lessee, 0);
    bench.publish(lessee, &grant, &[(1, 0)]);
    bench.done(Event::Keep(Bench::keep_of(worker, 7)));
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..2)), 1);
    bench.done(Event::Keep(Keep {
        block_bytes: BLOCK / 2,
        ..Bench::keep_of(worker, 7)
    }));
    assert_eq!(count(&mut bench, of(scheduler, 7, 1..2)), 0);
    // An engine that lends part of its pool cannot open it like a donor's.
    bench.offer(worker, 20, 1, 1);
    bench.apply(Event::Drain {
        target: DrainTarget::Region(region(1)),
        drain_ms: 1,
    });
    let lent = lease_on(&mut bench, lessee, 1);
    assert_eq!(lent.region, region(20));
    bench.publish(lessee, &lent, &[(2, 0)]);
    assert_eq!(count(&mut bench, from(worker, 1, 2..3)), 0);
    assert_eq!(count(&mut bench, from(scheduler, 1, 2..3)), 1);
}

#[test]
fn a_lookup_that_only_asks_pins_nothing() {
    let (mut bench, [lessee, reader, _]) = bench();
    let grant = lease_on(&mut bench, lessee, 0);
    bench.publish(lessee, &grant, &[(1, 0)]);
    let asks = Lookup {
        unpinned: true,
        ..from(reader, 0, 1..2)
    };
    let (runs, pin) = bench.looked_up(asks);
    assert_eq!((runs.len(), pin), (1, None));
    assert_eq!(bench.unpublish(lessee, &grant, &[0]), (vec![], 0));
    // The twin.
    bench.publish(lessee, &grant, &[(1, 0)]);
    let (_, pin) = bench.looked_up(from(reader, 0, 1..2));
    assert!(pin.is_some());
    assert_eq!(bench.unpublish(lessee, &grant, &[0]).0, [0]);
}

#[test]
fn nothing_is_promised_that_cannot_be_opened_for_reading() {
    let mut bench = Bench::with(CoreConfig {
        max_readers: 1,
        ..CoreConfig::default()
    });
    let donor = bench.join("donor", "1000");
    let lessee = bench.join("lessee", "1000");
    let (first, second) = (bench.join("first", "1000"), bench.join("second", "1000"));
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(lessee, 1).remove(0);
    bench.publish(lessee, &grant, &[(1, 0)]);
    assert_eq!(count(&mut bench, from(second, 0, 1..2)), 1);
    bench.share(first, &grant);
    assert_eq!(count(&mut bench, from(first, 0, 1..2)), 1);
    assert_eq!(count(&mut bench, from(second, 0, 1..2)), 0);
    // After a restart the donor has to offer the region again first.
    bench.restart();
    bench.publish(lessee, &grant, &[(1, 0)]);
    bench.release(first, &[&grant]);
    assert_eq!(count(&mut bench, from(second, 0, 1..2)), 0);
    bench.done(Event::Offer(Bench::offer_event(donor, 1, 1, 1)));
    assert_eq!(count(&mut bench, from(second, 0, 1..2)), 1);
}

#[test]
fn what_borrowers_keep_is_bounded() {
    let mut bench = Bench::with(CoreConfig {
        max_blocks: 4,
        max_borrowers_per_session: 2,
        ..CoreConfig::default()
    });
    let worker = bench.join("worker", "1000");
    let keep = |number, blocks| {
        Event::Keep(Keep {
            kept: hashes(blocks),
            ..Bench::keep_of(worker, number)
        })
    };
    bench.done(keep(1, 0..2));
    bench.done(keep(2, 0..2));
    let refusal = bench.refused(keep(2, 7..8));
    assert!(
        matches!(
            refusal,
            Refusal::Limit {
                what: "indexed blocks",
                ..
            }
        ),
        "{refusal:?}"
    );
    let refusal = bench.refused(keep(3, 0..0));
    assert!(
        matches!(
            refusal,
            Refusal::Limit {
                what: "borrowers of one session",
                ..
            }
        ),
        "{refusal:?}"
    );
    bench.done(Event::Keep(Keep {
        closed: true,
        ..Bench::keep_of(worker, 1)
    }));
    bench.done(keep(3, 7..9));
}
