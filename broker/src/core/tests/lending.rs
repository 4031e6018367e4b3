//! Which slab goes to whom: links, filling, quotas, tenants, and fair shares.

use swiftcache_proto::domain::{LinkKind, Shortfall};

use super::fixture::*;
use crate::core::{
    Caller, CoreConfig, DrainTarget, Event, EvictTarget, Grant, LeaseDemand, Node, Offer, Outgoing,
    Refusal, Reply, State, WithdrawWhat,
};

fn links(grants: &[Grant]) -> Vec<LinkKind> {
    grants.iter().map(|grant| grant.link).collect()
}

#[test]
fn the_best_link_comes_first() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    for on in [2, 1, 0] {
        bench.offer(donor, u64::from(on), on, 1);
    }
    let grants = bench.lease(borrower, 3);
    let best = [LinkKind::SameDevice, LinkKind::Nvlink, LinkKind::Pcie];
    assert_eq!(links(&grants), best);
}

/// One user's offers of a device are no more than its HBM together, and what is returned makes room. Another user is not locked
/// out. The twin: where nobody knows how much there is, nothing is refused.
#[test]
fn nobody_offers_more_than_the_device_has() {
    const GIB: u64 = 1 << 30;
    for known in [true, false] {
        let mut bench = Bench::new();
        let mut node = node();
        for device in &mut node.devices {
            device.hbm_bytes = if known { 10 * GIB } else { 0 };
        }
        bench.state = State::new(bench.config.clone(), node);
        let offer = |donor, number, gib| {
            let mut offer = Bench::offer_event(donor, number, 1, 0);
            (offer.bytes, offer.slab_bytes) = (gib * GIB, GIB);
            Event::Offer(offer)
        };
        let donors = [bench.join("one", "1000"), bench.join("two", "1000")];
        bench.done(offer(donors[0], 1, 6));
        if !known {
            bench.done(offer(donors[1], 2, 6));
            continue;
        }
        let refusal = bench.refused(offer(donors[1], 2, 6));
        assert!(refusal.to_string().starts_with("bytes"), "{refusal}");
        bench.done(offer(donors[1], 3, 4));
        // On another device nothing is offered yet.
        let mut elsewhere = Bench::offer_event(donors[0], 4, 2, 0);
        (elsewhere.bytes, elsewhere.slab_bytes) = (10 * GIB, GIB);
        bench.done(Event::Offer(elsewhere));
        let mut other = donors[0].process;
        (other.uid, other.pid) = (2_000, 4_711);
        let other = bench.join_as(other, "other", "2000");
        bench.done(offer(other, 5, 10));
        bench.withdraw(donors[0], WithdrawWhat::Regions(vec![region(1)]));
        bench.done(offer(donors[1], 6, 6));
    }
}

#[test]
fn devices_without_a_link_are_not_lent_from() {
    let mut bench = Bench::new();
    bench.state = State::new(
        bench.config.clone(),
        Node {
            links: Vec::new(),
            ..node()
        },
    );
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    assert_eq!(bench.ask(borrower, 1).1, Shortfall::NoFreeSlab);
}

#[test]
fn nobody_is_lent_what_it_offers_itself() {
    let mut bench = Bench::new();
    let lender = bench.join("lender", "1000");
    let other = bench.join("other", "1000");
    bench.offer(lender, 1, 0, 1);
    assert_eq!(bench.ask(lender, 1).1, Shortfall::NoFreeSlab);
    // Its twin: the slab is free, and anybody else's.
    bench.tick(u64::from(bench.config.wait_ms));
    let grants = bench.lease(other, 1);
    assert_eq!(grants[0].region, region(1));
    // Nor is anybody made to give one up for it.
    bench.ask(lender, 1);
    assert_eq!(bench.heard(other), []);
}

#[test]
fn regions_in_use_fill_up_before_whole_ones_are_touched() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 4);
    bench.offer(donor, 2, 1, 4);
    for _ in 0..4 {
        bench.lease(borrower, 1);
    }
    let whole = bench
        .state
        .regions()
        .filter(|region| region.account.leased == 0);
    assert_eq!(whole.count(), 1);
    let on_device = WithdrawWhat::Bytes {
        device: device(1),
        bytes: 1,
    };
    let free: Vec<_> = bench.withdraw(donor, on_device);
    assert_eq!(bench.heard(donor), [Outgoing::Returned(free[0])]);
    assert_eq!(bench.heard(borrower), []);
}

#[test]
fn equal_links_share_the_load() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 0, 2);
    bench.offer(donor, 2, 1, 2);
    let (grants, _) = bench.demanded(LeaseDemand {
        device: device(2),
        ..Bench::demand(borrower, 2)
    });
    assert_ne!(grants[0].device, grants[1].device);
}

#[test]
fn the_cheapest_lent_region_goes_first() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    for number in 1..=3 {
        bench.offer(donor, number, 1, 1);
    }
    let grants = bench.lease(borrower, 3);
    bench.publish(borrower, &grants[0], &[(1, 0), (2, 1)]);
    bench.publish(borrower, &grants[1], &[(3, 0)]);
    bench.publish(borrower, &grants[2], &[(4, 0)]);
    bench.now += 10;
    bench.hits(borrower, 3..4);
    let give_up = |bench: &mut Bench| {
        let what = WithdrawWhat::Bytes {
            device: device(1),
            bytes: SLAB,
        };
        bench.withdraw(donor, what)
    };
    // Fewest blocks, found longest ago; then fewest blocks; then the rest.
    assert_eq!(give_up(&mut bench), [grants[2].region]);
    assert_eq!(give_up(&mut bench), [grants[1].region]);
    assert_eq!(give_up(&mut bench), [grants[0].region]);
    assert_eq!(give_up(&mut bench), []);
}

#[test]
fn quotas_bound_sessions_and_namespaces() {
    let bench_with = |session, namespace| {
        let mut bench = Bench::with(CoreConfig {
            session_quota_bytes: session,
            namespace_quota_bytes: namespace,
            ..CoreConfig::default()
        });
        let donor = bench.join("donor", "1000");
        bench.offer(donor, 1, 1, 4);
        let pair = (bench.join("a", "1000"), bench.join("b", "1000"));
        (bench, pair)
    };
    let (mut bench, (a, b)) = bench_with(Some(SLAB), None);
    assert_eq!(bench.ask(a, 2).1, Shortfall::Quota);
    assert_eq!(bench.ask(b, 2).0.len(), 1);
    let (mut bench, (a, b)) = bench_with(None, Some(3 * SLAB));
    bench.lease(a, 2);
    let (grants, shortfall) = bench.ask(b, 2);
    assert_eq!((grants.len(), shortfall), (1, Shortfall::Quota));
}

#[test]
fn a_block_larger_than_every_slab_is_said_to_be() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    let demand = LeaseDemand {
        block_bytes: SLAB + 1,
        ..Bench::demand(borrower, 1)
    };
    assert_eq!(bench.demanded(demand.clone()).1, Shortfall::NoFreeSlab);
    bench.offer(donor, 1, 1, 1);
    assert_eq!(bench.demanded(demand).1, Shortfall::BlockTooLarge);
}

#[test]
fn a_slab_is_zeroed_between_tenants_and_once_per_leasing() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "blue");
    let red = bench.join("red", "red");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(blue, 1).remove(0);
    bench.release(blue, &[&grant]);
    // The same tenant may have it as it is.
    let grant = bench.lease(blue, 1).remove(0);
    bench.release(blue, &[&grant]);

    assert_eq!(bench.ask(red, 1), (vec![], Shortfall::Scrubbing));
    assert_eq!(bench.ask(red, 1), (vec![], Shortfall::Scrubbing));
    let scrub = Outgoing::Scrub {
        region: region(1),
        slab: 0,
        generation: grant.generation,
    };
    assert_eq!(bench.heard(donor), [scrub]);
    assert_eq!(bench.state.total().scrubbing, SLAB);
    let mut stale = grant.generation;
    stale.0 -= 1;
    for (generation, scrubbing) in [(stale, SLAB), (grant.generation, 0)] {
        bench.apply(Event::Scrubbed {
            caller: donor,
            region: region(1),
            slab: 0,
            generation,
        });
        assert_eq!(bench.state.total().scrubbing, scrubbing);
    }
    bench.lease(red, 1);
}

#[test]
fn a_withdrawn_region_is_not_zeroed_first() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "blue");
    let red = bench.join("red", "red");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(blue, 1).remove(0);
    bench.release(blue, &[&grant]);
    bench.ask(red, 1);
    bench.heard(donor);
    bench.withdraw_region(donor, 1);
    assert_eq!(bench.heard(donor), [Outgoing::Returned(region(1))]);
    let refusal = bench.refused(Event::Offer(Bench::offer_event(donor, 1, 1, 1)));
    assert!(matches!(refusal, Refusal::Stale(_)), "{refusal:?}");
}

#[test]
fn offers_that_overlap_or_trespass_are_refused() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let other = bench.join("other", "1000");
    bench.offer(donor, 1, 1, 2);
    let beside = |caller, number, on, offset, slabs| {
        let mut offer = Bench::offer_event(caller, number, on, slabs);
        offer.allocation = allocation(1);
        offer.offset = offset;
        Event::Offer(offer)
    };
    for (offset, slabs) in [(0, 1), (SLAB, 1), (SLAB / 2, 2), (2 * SLAB - 1, 1)] {
        let refusal = bench.refused(beside(donor, 2, 1, offset, slabs));
        assert!(matches!(refusal, Refusal::Overlap { .. }), "{refusal:?}");
    }
    let refusal = bench.refused(beside(other, 2, 1, 2 * SLAB, 1));
    assert!(matches!(refusal, Refusal::NotYours { .. }), "{refusal:?}");
    let refusal = bench.refused(beside(donor, 2, 0, 2 * SLAB, 1));
    assert!(matches!(refusal, Refusal::Invalid { .. }), "{refusal:?}");
    let refusal = bench.refused(Event::Offer(Bench::offer_event(other, 1, 1, 2)));
    assert!(matches!(refusal, Refusal::Overlap { .. }), "{refusal:?}");
    let refusal = bench.refused(beside(donor, 2, 1, u64::MAX, 1));
    assert!(
        matches!(
            refusal,
            Refusal::Invalid {
                field: "offset",
                ..
            }
        ),
        "{refusal:?}"
    );
    bench.done(beside(donor, 2, 1, 2 * SLAB, 1));
}

#[test]
fn operators_take_devices_donors_and_regions_out_of_service() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 2);
    for target in [
        DrainTarget::Device(device(1)),
        DrainTarget::Donor(donor.session.label()),
        DrainTarget::Region(region(1)),
    ] {
        let grant = bench.lease(borrower, 1).remove(0);
        let event = Event::Drain {
            target: target.clone(),
            drain_ms: 9,
        };
        let reply = bench.apply(event.clone());
        assert!(matches!(
            reply,
            Some(Reply::Drained {
                leases: 1,
                bytes: SLAB
            })
        ));
        let reply = bench.apply(event);
        assert!(matches!(
            reply,
            Some(Reply::Drained {
                leases: 0,
                bytes: 0
            })
        ));
        bench.acknowledge(borrower, &grant);
        assert_eq!(bench.ask(borrower, 1).0.len(), 0);
        bench.done(Event::Undrain(target));
    }
    let grant = bench.lease(borrower, 1).remove(0);
    let reply = bench.apply(Event::Evict(EvictTarget::Lease(grant.lease)));
    assert!(matches!(reply, Some(Reply::Evicted { leases: 1, .. })));
}

/// An allocation of `slabs` slabs, whose donor does not let tenants share it.
fn offer_alone(bench: &mut Bench, donor: Caller, number: u64, slabs: u64) {
    bench.done(Event::Offer(Offer {
        shared: false,
        ..Bench::offer_event(donor, number, 1, slabs)
    }));
}

#[test]
fn slabs_of_one_allocation_go_to_one_tenant_at_a_time() {
    for shared in [false, true] {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1000");
        let blue = bench.join("blue", "1000/blue");
        let red = bench.join("red", "1000/red");
        bench.done(Event::Offer(Offer {
            shared,
            ..Bench::offer_event(donor, 1, 1, 4)
        }));
        bench.lease(blue, 1);
        let (grants, shortfall) = bench.ask(red, 1);
        // The twin: with its donor's word, the neighbouring slab is granted.
        let expected = match shared {
            true => (1, Shortfall::None),
            false => (0, Shortfall::NoFreeSlab),
        };
        assert_eq!((grants.len(), shortfall), expected);
        // Asking again does not help, nor is anybody made to give up a slab whose neighbours stay where they are.
        bench.lease(blue, 1);
        let again = bench.ask(red, 1).0.len();
        assert_eq!(again, usize::from(shared));
        assert_eq!(bench.heard(blue), []);
    }
}

#[test]
fn other_regions_of_the_allocation_count_too() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "1000/blue");
    let red = bench.join("red", "1000/red");
    offer_alone(&mut bench, donor, 1, 1);
    bench.done(Event::Offer(Offer {
        allocation: allocation(1),
        offset: SLAB,
        shared: false,
        ..Bench::offer_event(donor, 2, 1, 1)
    }));
    bench.lease(blue, 1);
    assert_eq!(bench.ask(red, 1).1, Shortfall::NoFreeSlab);
    // The twin: an allocation of its own beside them.
    offer_alone(&mut bench, donor, 3, 1);
    assert_eq!(bench.lease(red, 1)[0].region, region(3));
}

#[test]
fn all_that_others_left_in_an_allocation_is_zeroed_first_and_at_once() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "1000/blue");
    let red = bench.join("red", "1000/red");
    offer_alone(&mut bench, donor, 1, 3);
    let grants = bench.lease(blue, 2);
    bench.release(blue, &[&grants[0]]);
    // What is zeroed now would bring red nothing while blue has a slab.
    assert_eq!(bench.ask(red, 1).1, Shortfall::NoFreeSlab);
    assert_eq!(bench.heard(donor), []);
    bench.release(blue, &[&grants[1]]);
    assert_eq!(bench.ask(red, 1).1, Shortfall::Scrubbing);
    let scrubs = bench.heard(donor);
    assert_eq!(scrubs.len(), 2, "{scrubs:?}");
    for (number, scrub) in scrubs.into_iter().enumerate() {
        let Outgoing::Scrub {
            region,
            slab,
            generation,
        } = scrub
        else {
            panic!("{scrub:?}");
        };
        // Not before the last of them is clean.
        assert_eq!(bench.ask(red, 1).0.len(), 0, "after {number}");
        bench.apply(Event::Scrubbed {
            caller: donor,
            region,
            slab,
            generation,
        });
    }
    bench.lease(red, 3);
}

#[test]
fn the_only_slab_of_an_allocation_is_taken_as_ever() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "1000/blue");
    let red = bench.join("red", "1000/red");
    for number in 1..=4 {
        offer_alone(&mut bench, donor, number, 1);
    }
    bench.lease(blue, 4);
    assert_eq!(bench.ask(red, 2).1, Shortfall::NoFreeSlab);
    let revoked = bench.heard(blue);
    assert_eq!(revoked.len(), 2, "{revoked:?}");
}

#[test]
fn who_waits_for_slabs_that_it_cannot_have_keeps_nobody_from_them() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let blue = bench.join("blue", "1000/blue");
    let red = bench.join("red", "1000/red");
    offer_alone(&mut bench, donor, 1, 4);
    bench.lease(blue, 1);
    bench.ask(red, 4);
    bench.lease(blue, 3);
}

#[test]
fn what_a_donor_promises_survives_a_restart_and_is_taken_from_its_next_offer() {
    for shared in [false, true] {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1000");
        let blue = bench.join("blue", "1000/blue");
        let red = bench.join("red", "1000/red");
        let offer = Offer {
            shared,
            ..Bench::offer_event(donor, 1, 1, 2)
        };
        bench.done(Event::Offer(offer.clone()));
        let blues = bench.lease(blue, 1)[0].lease;
        bench.restart();
        bench.resume(donor, &[], &[]);
        bench.resume(blue, &[blues], &[]);
        bench.done(Event::Offer(offer.clone()));
        assert_eq!(bench.ask(red, 1).0.len(), usize::from(shared));
        // A ledger of an earlier version says nothing, and the donor says it again.
        bench.done(Event::Offer(Offer {
            shared: true,
            ..offer
        }));
        assert_eq!(bench.ask(red, 1).0.len(), usize::from(!shared));
    }
}

#[test]
fn one_elastic_donor_at_a_time_follows_a_device() {
    let mut bench = Bench::new();
    let first = bench.join("first", "1000");
    let second = bench.join("second", "1001");
    let elastic = |donor, number, on| {
        Event::Offer(Offer {
            elastic: true,
            ..Bench::offer_event(donor, number, on, 1)
        })
    };
    bench.done(elastic(first, 1, 1));
    bench.done(elastic(first, 2, 1));
    for again in [false, true] {
        if again {
            bench.restart();
            bench.resume(first, &[], &[]);
            bench.resume(second, &[], &[]);
        }
        let refusal = bench.refused(elastic(second, 3, 1));
        assert!(
            matches!(&refusal, Refusal::Followed { name, .. } if name == "first"),
            "{refusal:?}"
        );
        // The twins: another device, and an amount that is fixed.
        bench.done(elastic(second, 4, 2));
        bench.offer(second, 5, 1, 1);
        for number in [4, 5] {
            bench.withdraw_region(second, number);
        }
    }
    // Its place is free when nothing of it is on offer any more, although some may not be back.
    let borrower = bench.join("borrower", "1000");
    bench.done(elastic(first, 1, 1));
    bench.lease(borrower, 1);
    for number in [1, 2] {
        bench.withdraw_region(first, number);
    }
    bench.done(elastic(second, 3, 1));
    let refusal = bench.refused(elastic(first, 6, 1));
    assert!(matches!(refusal, Refusal::Followed { .. }), "{refusal:?}");
}
