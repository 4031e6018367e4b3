//! Host memory of donors: granted where HBM falls short, shared out apart from it, and found by those who can map it.

use swiftcache_proto::domain::{FoundRun, Hold, LinkKind, Medium, Shortfall};

use super::fixture::{Bench, SLAB, device, node_with_host_memory};
use crate::core::{
    Caller, CoreConfig, Event, Grant, Keep, LeaseDemand, Lookup, Offer, Publish, Refusal,
};

fn bench() -> Bench {
    Bench::on(node_with_host_memory(), CoreConfig::default())
}

fn demand(caller: Caller, slabs: u64, host_slabs: u64) -> LeaseDemand {
    LeaseDemand {
        host_bytes: host_slabs * SLAB,
        ..Bench::demand(caller, slabs)
    }
}

/// How many slabs of each kind of memory were granted.
fn granted(grants: &[Grant]) -> (usize, usize) {
    let hosts = grants
        .iter()
        .filter(|grant| grant.device.medium() == Medium::Host);
    let hosts = hosts
        .inspect(|grant| assert_eq!(grant.link, LinkKind::Host))
        .count();
    (grants.len() - hosts, hosts)
}

fn publish(bench: &mut Bench, caller: Caller, grant: &Grant, blocks: &[u64]) -> usize {
    let blocks = blocks.iter().map(|n| super::fixture::hash(*n)).zip(0..);
    let publish = Publish {
        caller,
        lease: grant.lease,
        generation: grant.generation,
        blocks: blocks.collect(),
    };
    match bench.apply(Event::Publish(publish)) {
        Some(crate::core::Reply::Published { duplicates }) => duplicates.len(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn host_memory_is_granted_only_where_hbm_falls_short() {
    let mut bench = bench();
    let (donor, one, two) = (
        bench.join("donor", ""),
        bench.join("one", ""),
        bench.join("two", ""),
    );
    bench.offer(donor, 1, 1, 2);
    bench.offer_host(donor, 2, 4);
    let (grants, shortfall) = bench.demanded(demand(one, 1, 3));
    assert_eq!((granted(&grants), shortfall), ((1, 0), Shortfall::None));
    let (grants, shortfall) = bench.demanded(demand(one, 2, 1));
    assert_eq!(
        (granted(&grants), shortfall),
        ((1, 1), Shortfall::NoFreeSlab)
    );
    // Only host memory.
    let (grants, shortfall) = bench.demanded(demand(one, 0, 1));
    assert_eq!((granted(&grants), shortfall), ((0, 1), Shortfall::None));
    // Who does not ask for it gets none: the twin.
    let (grants, _) = bench.demanded(demand(two, 1, 0));
    assert!(grants.is_empty(), "{grants:?}");
    bench.restart();
    let total = bench.state.total();
    // One of them is on its way to the twin.
    let leased = total.leased + total.draining;
    assert_eq!((leased, total.offered), (4 * SLAB, 6 * SLAB));
}

#[test]
fn hbm_that_is_being_zeroed_is_worth_waiting_for() {
    let mut bench = bench();
    let donor = bench.join("donor", "");
    let (first, second) = (bench.join("first", "a"), bench.join("second", "b"));
    bench.offer(donor, 1, 1, 1);
    bench.offer_host(donor, 2, 1);
    let (grants, _) = bench.ask(first, 1);
    bench.done(Event::Release {
        caller: first,
        leases: vec![grants[0].lease],
        unmappable: false,
        bequeath: false,
    });
    let (grants, shortfall) = bench.demanded(demand(second, 1, 1));
    assert_eq!(
        (granted(&grants), shortfall),
        ((0, 0), Shortfall::Scrubbing)
    );
}

#[test]
fn who_holds_host_memory_has_no_less_of_a_claim_to_hbm() {
    let mut bench = bench();
    let donor = bench.join("donor", "");
    let (rich, other) = (bench.join("rich", "a"), bench.join("other", "b"));
    bench.offer(donor, 1, 1, 2);
    bench.offer_host(donor, 2, 8);
    let (grants, _) = bench.demanded(demand(rich, 0, 8));
    assert_eq!(granted(&grants), (0, 8));
    let (grants, _) = bench.demanded(demand(rich, 1, 0));
    assert_eq!(granted(&grants), (1, 0));
    // One slab each: nobody has to give HBM, whatever it holds beside it.
    let (grants, _) = bench.demanded(demand(other, 2, 0));
    assert_eq!(granted(&grants), (1, 0));
    assert_eq!(bench.state.counters().revocations, 0);
    // Host memory is shared out by the same rules.
    let (grants, shortfall) = bench.demanded(demand(other, 0, 8));
    assert_eq!(
        (granted(&grants), shortfall),
        ((0, 0), Shortfall::NoFreeSlab)
    );
    assert_eq!(bench.state.counters().revocations, 4);
}

#[test]
fn blocks_in_host_memory_are_found_by_those_who_can_map_it() {
    let mut bench = bench();
    let donor = bench.join("donor", "");
    let (writer, reader) = (bench.join("writer", ""), bench.join("reader", ""));
    bench.offer_host(donor, 1, 1);
    let (grants, _) = bench.demanded(demand(writer, 0, 1));
    assert_eq!(publish(&mut bench, writer, &grants[0], &[1, 2, 3]), 0);
    let found = |bench: &mut Bench, host_memory| {
        let lookup = Lookup {
            device: Some(device(0)),
            host_memory,
            ..Bench::lookup_of(reader, 1..4)
        };
        let (runs, _) = bench.looked_up(lookup);
        let tier = |run| match run {
            FoundRun::Leased {
                extent,
                medium,
                hold,
            } => (medium, hold, extent.count),
            FoundRun::Kept { .. } => panic!("no borrower was named"),
        };
        runs.into_iter().map(tier).collect::<Vec<_>>()
    };
    assert_eq!(found(&mut bench, true), [(Medium::Host, Hold::Shared, 3)]);
    assert_eq!(found(&mut bench, false), []);
    // For a borrower its own word counts.
    for maps in [false, true] {
        bench.done(Event::Keep(Keep {
            host_memory: maps,
            ..Bench::keep_of(reader, 1)
        }));
        let lookup = Lookup {
            borrower: Some(swiftcache_proto::domain::BorrowerId([1; 16])),
            ..Bench::lookup_of(writer, 1..4)
        };
        let (runs, _) = bench.looked_up(lookup);
        assert_eq!(
            runs.iter().map(FoundRun::blocks).sum::<u32>(),
            3 * u32::from(maps)
        );
    }
}

#[test]
fn a_block_in_hbm_is_published_beside_a_copy_in_host_memory_and_not_the_other_way() {
    let mut bench = bench();
    let donor = bench.join("donor", "");
    let (one, two) = (bench.join("one", ""), bench.join("two", ""));
    bench.offer(donor, 1, 1, 1);
    bench.offer_host(donor, 2, 2);
    let (in_host, _) = bench.demanded(demand(one, 0, 1));
    assert_eq!(publish(&mut bench, one, &in_host[0], &[1]), 0);
    let (in_hbm, _) = bench.demanded(demand(two, 1, 0));
    assert_eq!(publish(&mut bench, two, &in_hbm[0], &[1, 2]), 0);
    let (second, _) = bench.demanded(demand(two, 0, 1));
    assert_eq!(publish(&mut bench, two, &second[0], &[1, 2, 3]), 2);
    assert_eq!(bench.state.indexed_blocks(), 4);
}

#[test]
fn host_memory_is_neither_a_working_set_nor_a_gpus() {
    let mut bench = bench();
    let donor = bench.join("donor", "");
    let refused = |bench: &mut Bench, event| match bench.refused(event) {
        Refusal::Invalid { field, .. } => field,
        other => panic!("{other:?}"),
    };
    let working_set = LeaseDemand {
        class: swiftcache_proto::domain::LeaseClass::WorkingSet,
        ..demand(donor, 1, 1)
    };
    assert_eq!(refused(&mut bench, Event::Lease(working_set)), "host_bytes");
    assert_eq!(
        refused(&mut bench, Event::Lease(demand(donor, 0, 0))),
        "bytes"
    );
    let elastic = Offer {
        elastic: true,
        ..Bench::host_offer(donor, 1, 1)
    };
    assert_eq!(refused(&mut bench, Event::Offer(elastic)), "elastic");
    let opaque = swiftcache_proto::domain::OpaqueHandle([1; 64]);
    let legacy = Offer {
        handle: swiftcache_proto::domain::Handle::CudaIpc(opaque),
        ..Bench::host_offer(donor, 1, 1)
    };
    assert_eq!(refused(&mut bench, Event::Offer(legacy)), "handle");
}

#[test]
fn host_memory_is_shown_once_some_is_on_offer() {
    let mut bench = bench();
    assert_eq!(bench.state.devices().len(), 4);
    let donor = bench.join("donor", "");
    bench.offer_host(donor, 1, 3);
    let devices = bench.state.devices();
    assert_eq!(devices.len(), 5);
    assert_eq!(devices[4].account.offered, 3 * SLAB);
    let (grants, _) = bench.demanded(demand(donor, 0, 1));
    assert!(
        grants.is_empty(),
        "a donor gains nothing by leasing its own: {grants:?}"
    );
}
