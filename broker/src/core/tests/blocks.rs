//! Publishing, finding, pinning and forgetting blocks.

use swiftcache_proto::domain::Extent;

use super::fixture::*;
use crate::core::{
    Caller, CoreConfig, Event, EvictTarget, Grant, LeaseDemand, Lookup, Process, Refusal, Reply,
};

/// A donor's four slabs, and two sessions of one tenant; the first holds two slabs.
fn bench() -> (Bench, Caller, Caller, Vec<Grant>) {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let lessee = bench.join("lessee", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 4);
    let grants = bench.lease(lessee, 2);
    (bench, lessee, reader, grants)
}

fn extent(grant: &Grant, first_slot: u32, count: u32) -> Extent {
    Extent {
        lease: grant.lease,
        generation: grant.generation,
        first_slot,
        count,
    }
}

#[test]
fn the_longest_prefix_is_found_in_runs_of_slots() {
    let (mut bench, lessee, reader, grants) = bench();
    bench.publish(lessee, &grants[0], &[(1, 1), (2, 2), (3, 3)]);
    bench.publish(lessee, &grants[1], &[(4, 0), (5, 2), (7, 3)]);
    let (extents, pin) = bench.lookup(reader, 1..9);
    let runs = [
        extent(&grants[0], 1, 3),
        extent(&grants[1], 0, 1),
        extent(&grants[1], 2, 1),
    ];
    assert_eq!(extents, runs);
    assert!(pin.is_some());
    assert_eq!(bench.lookup(reader, 2..4).0, [extent(&grants[0], 2, 2)]);
    assert_eq!(bench.lookup(reader, [8, 1]), (vec![], None));
    // Runs end where a slab ends, though the next block lies in the next slab's first slot.
    assert_eq!(bench.lookup(reader, [3, 4]).0.len(), 2);
    assert_eq!(
        bench.lookup(reader, [1, 1]).0,
        [extent(&grants[0], 1, 1); 2]
    );
}

#[test]
fn tenants_and_namespaces_are_apart() {
    let (mut bench, lessee, _, grants) = bench();
    bench.publish(lessee, &grants[0], &[(1, 0)]);
    let blue = bench.join("blue", "blue");
    assert_eq!(bench.hits(blue, 1..2), 0);
    let refusal = bench.refused(Bench::share_event(blue, &grants[0]));
    assert!(matches!(refusal, Refusal::NotYours { .. }), "{refusal:?}");
    let elsewhere = Lookup {
        namespace: "other".to_owned(),
        ..Bench::lookup_of(lessee, 1..2)
    };
    assert_eq!(bench.looked_up(elsewhere), (vec![], None));
}

#[test]
fn a_block_lies_in_one_place() {
    let (mut bench, lessee, reader, grants) = bench();
    let none: [u32; 0] = [];
    assert_eq!(bench.publish(lessee, &grants[0], &[(1, 0), (2, 1)]), none);
    assert_eq!(bench.publish(lessee, &grants[0], &[(1, 0), (2, 1)]), none);
    assert_eq!(bench.publish(lessee, &grants[0], &[(3, 2), (1, 3)]), [1]);
    assert_eq!(bench.publish(lessee, &grants[1], &[(9, 0), (9, 1)]), [1]);
    let other = bench.lease(reader, 1).remove(0);
    assert_eq!(bench.publish(reader, &other, &[(2, 0), (4, 1)]), [0]);
    assert_eq!(bench.state.indexed_blocks(), 5);
}

#[test]
fn publications_that_contradict_are_refused_whole() {
    let (mut bench, lessee, reader, grants) = bench();
    bench.publish(lessee, &grants[0], &[(1, 0)]);
    for blocks in [
        &[(5, 1), (2, 0)][..],
        &[(5, 1), (6, 1)],
        &[(5, 1), (5, 1)],
        &[(5, 1), (6, 4)],
    ] {
        let refusal = bench.refused(Bench::publish_event(lessee, &grants[0], blocks));
        assert!(
            matches!(refusal, Refusal::Invalid { field: "slots", .. }),
            "{refusal:?}"
        );
    }
    let mut stale = grants[0].clone();
    stale.generation.0 += 1;
    let refusal = bench.refused(Bench::publish_event(lessee, &stale, &[(5, 1)]));
    assert!(matches!(refusal, Refusal::Stale(_)), "{refusal:?}");
    let refusal = bench.refused(Bench::publish_event(reader, &grants[0], &[(5, 1)]));
    assert!(matches!(refusal, Refusal::NotYours { .. }), "{refusal:?}");
    assert_eq!(bench.state.indexed_blocks(), 1);
}

#[test]
fn pinned_slots_are_unfindable_at_once_and_unwritable_for_a_while() {
    let (mut bench, lessee, reader, grants) = bench();
    bench.publish(lessee, &grants[0], &[(1, 0), (2, 1), (3, 2)]);
    // A lessee's own lookups pin nothing.
    bench.hits(lessee, 1..4);
    assert_eq!(bench.unpublish(lessee, &grants[0], &[2, 2, 3]), (vec![], 0));
    let (_, first) = bench.lookup(reader, 1..3);
    bench.tick(4_000);
    bench.lookup(reader, 2..3);
    let slots = [0, 1, 2];
    assert_eq!(
        bench.unpublish(lessee, &grants[0], &slots),
        (vec![0, 1], 10_000)
    );
    assert_eq!(bench.hits(reader, 1..3), 0);
    bench.tick(6_000);
    assert_eq!(
        bench.unpublish(lessee, &grants[0], &slots),
        (vec![1], 4_000)
    );
    // Too late, and somebody else's: neither ends a pin.
    for caller in [reader, lessee] {
        let pins = first.into_iter().collect();
        bench.apply(Event::Unpin { caller, pins });
    }
    assert_eq!(bench.unpublish(lessee, &grants[0], &slots).0, [1]);
    bench.tick(4_000);
    assert_eq!(bench.unpublish(lessee, &grants[0], &slots), (vec![], 0));
}

#[test]
fn an_unpinned_slot_is_writable_and_an_evicted_one_stays_pinned() {
    let (mut bench, lessee, reader, grants) = bench();
    bench.publish(lessee, &grants[0], &[(1, 0), (2, 1)]);
    let (_, pin) = bench.lookup(reader, 1..3);
    let reply = bench.apply(Event::Evict(EvictTarget::Namespace("model".to_owned())));
    assert!(matches!(
        reply,
        Some(Reply::Evicted {
            blocks: 2,
            leases: 0
        })
    ));
    assert_eq!(bench.hits(reader, 1..3), 0);
    assert_eq!(bench.unpublish(lessee, &grants[0], &[0, 1]).0, [0, 1]);
    let pins = pin.into_iter().collect();
    bench.apply(Event::Unpin {
        caller: reader,
        pins,
    });
    assert_eq!(bench.unpublish(lessee, &grants[0], &[0, 1]), (vec![], 0));
}

#[test]
fn pins_are_bounded_and_never_cut_short_for_new_ones() {
    let mut bench = Bench::with(CoreConfig {
        max_pins_per_session: 2,
        ..CoreConfig::default()
    });
    let donor = bench.join("donor", "1000");
    let lessee = bench.join("lessee", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(lessee, 1).remove(0);
    bench.publish(lessee, &grant, &[(1, 0)]);
    bench.hits(reader, 1..2);
    bench.hits(reader, 1..2);
    let again = Event::Lookup(Bench::lookup_of(reader, 1..2));
    let refusal = bench.refused(again.clone());
    assert!(
        matches!(refusal, Refusal::Limit { what: "pins", .. }),
        "{refusal:?}"
    );
    assert_eq!(bench.unpublish(lessee, &grant, &[0]).0, [0]);
    // Nothing to pin, nothing to refuse.
    assert!(matches!(bench.apply(again), Some(Reply::Found { .. })));
}

#[test]
fn the_index_is_bounded() {
    let mut bench = Bench::with(CoreConfig {
        max_blocks: 2,
        max_slots: 3,
        ..CoreConfig::default()
    });
    let donor = bench.join("donor", "1000");
    let lessee = bench.join("lessee", "1000");
    bench.offer(donor, 1, 1, 1);
    let (grants, _) = bench.demanded(LeaseDemand {
        block_bytes: bench.config.min_block_bytes,
        ..Bench::demand(lessee, 1)
    });
    assert_eq!(grants[0].slots, 3);
    bench.publish(lessee, &grants[0], &[(1, 0), (2, 1)]);
    let refusal = bench.refused(Bench::publish_event(lessee, &grants[0], &[(3, 2)]));
    assert!(matches!(refusal, Refusal::Limit { .. }), "{refusal:?}");
}

/// A few slabs have no room for all blocks that the index takes, however small their blocks are said to be. The twin: without
/// the bounds, sixteen slabs of a megabyte do.
#[test]
fn sixteen_slabs_cannot_fill_the_index() {
    const SLABS: u64 = 16;
    let bounded = CoreConfig::default();
    let unbounded = CoreConfig {
        min_block_bytes: 1,
        max_slots: 1 << 20,
        ..CoreConfig::default()
    };
    for (config, fills) in [(bounded, false), (unbounded, true)] {
        let mut bench = Bench::with(config);
        let donor = bench.join("donor", "1000");
        let lessee = bench.join("lessee", "1000");
        bench.offer(donor, 1, 1, SLABS);
        let demand = |block_bytes| LeaseDemand {
            block_bytes,
            ..Bench::demand(lessee, SLABS)
        };
        let least = bench.config.min_block_bytes;
        let refusal = bench.refused(Event::Lease(demand(least - 1)));
        assert!(refusal.to_string().starts_with("block_bytes"), "{refusal}");
        let (grants, _) = bench.demanded(demand(least));
        let slots: u64 = grants.iter().map(|grant| u64::from(grant.slots)).sum();
        assert_eq!(grants.len() as u64, SLABS);
        assert_eq!(slots >= bench.config.max_blocks, fills, "{slots} slots");
    }
}

/// Of two users one publishes all it may; what is left is the other's. The twin: without a bound nothing is left.
#[test]
fn one_user_cannot_fill_the_index_alone() {
    for (max_blocks_per_user, left) in [(2, true), (3, false)] {
        index_by_two(max_blocks_per_user, left, [1_000, 2_000]);
        // Of root, each process counts by itself.
        index_by_two(max_blocks_per_user, left, [0, 0]);
    }
}

fn index_by_two(max_blocks_per_user: u64, left: bool, users: [u32; 2]) {
    let mut bench = Bench::with(CoreConfig {
        max_blocks: 3,
        max_blocks_per_user,
        ..CoreConfig::default()
    });
    let donor = bench.join("donor", "1000");
    bench.offer(donor, 1, 1, 2);
    let process = |pid, uid| Process {
        pid,
        uid,
        ..donor.process
    };
    let other = process(4_711, users[1]);
    let other = bench.join_as(other, "other", &users[1].to_string());
    // The labels of a user do not help it.
    let greedy = process(4_712, users[0]);
    let greedy = bench.join_as(greedy, "greedy", &format!("{}/a", users[0]));
    let grants = [greedy, other].map(|lessee| {
        let demand = LeaseDemand {
            block_bytes: SLAB / 4,
            ..Bench::demand(lessee, 1)
        };
        bench.demanded(demand).0.remove(0)
    });
    bench.publish(greedy, &grants[0], &[(1, 0), (2, 1)]);
    let third = Bench::publish_event(greedy, &grants[0], &[(3, 2)]);
    if left {
        let refusal = bench.refused(third);
        assert!(refusal.to_string().contains("one user"), "{refusal}");
        bench.publish(other, &grants[1], &[(4, 0)]);
    } else {
        bench.publish(greedy, &grants[0], &[(3, 2)]);
        let refusal = bench.refused(Bench::publish_event(other, &grants[1], &[(4, 0)]));
        assert!(matches!(refusal, Refusal::Limit { .. }), "{refusal:?}");
    }
}

#[test]
fn time_going_back_is_harmless_and_leaping_forward_too() {
    let (mut bench, lessee, reader, grants) = bench();
    bench.publish(lessee, &grants[0], &[(1, 0)]);
    bench.hits(reader, 1..2);
    bench.now = 0;
    assert_eq!(bench.unpublish(lessee, &grants[0], &[0]), (vec![0], 10_000));
    bench.now = u64::MAX;
    assert_eq!(bench.unpublish(lessee, &grants[0], &[0]), (vec![], 0));
    bench.publish(lessee, &grants[0], &[(1, 0)]);
    assert_eq!(bench.hits(reader, 1..2), 1);
    bench.release(lessee, &[&grants[0], &grants[1]]);
}
