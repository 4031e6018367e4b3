//! A slab from offer to return.

use swiftcache_proto::domain::{Extent, Generation, RevokeReason};

use super::fixture::*;
use crate::core::{Event, LeasePhase, Outgoing};

#[test]
fn a_slab_goes_out_and_comes_back() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(borrower, 1).remove(0);
    assert_eq!((grant.slots, grant.generation), (4, Generation(1)));
    assert_eq!(
        bench.publish(borrower, &grant, &[(1, 0), (2, 1), (3, 3)]),
        [0u32; 0]
    );

    let (extents, pin) = bench.lookup(reader, 1..=4);
    let extent = |first_slot, count| Extent {
        lease: grant.lease,
        generation: grant.generation,
        first_slot,
        count,
    };
    assert_eq!(extents, [extent(0, 2), extent(3, 1)]);
    assert!(pin.is_some());
    assert_eq!(bench.share(reader, &grant).lease, grant.lease);

    bench.withdraw_region(donor, 1);
    let revoke = Outgoing::Revoke {
        lease: grant.lease,
        generation: grant.generation,
        reason: RevokeReason::Withdrawn,
        drain_ms: 500,
    };
    assert_eq!(bench.heard(borrower), std::slice::from_ref(&revoke));
    assert_eq!(bench.heard(reader), [revoke]);
    assert_eq!(bench.hits(reader, 1..=3), 0);

    bench.acknowledge_as(borrower, &grant, Generation(9));
    bench.acknowledge(borrower, &grant);
    assert_eq!(bench.heard(donor), []);
    bench.tick(500);
    let phases: Vec<_> = bench.state.leases().map(|lease| lease.phase).collect();
    assert_eq!(phases, [LeasePhase::Zombie]);
    assert_eq!(bench.state.total().zombie, SLAB);
    bench.acknowledge(reader, &grant);
    assert_eq!(bench.heard(donor), [Outgoing::Returned(region(1))]);
    assert_eq!(bench.state.total().offered, 0);
    bench.apply(Event::Tick);
}
