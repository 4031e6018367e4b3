//! What the index may cost.

use super::fixture::*;
use crate::core::{Event, LeaseDemand, Publish};

#[test]
fn an_indexed_block_costs_at_most_100_bytes() {
    // Just above a power of two, where the table has just doubled: the worst fill.
    const SLOTS: u64 = 1_000;
    for leases in [15, 29, 58, 115] {
        let mut bench = Bench::new();
        let donor = bench.join("donor", "1000");
        let borrower = bench.join("borrower", "1000");
        bench.offer(donor, 1, 1, leases);
        let (grants, _) = bench.demanded(LeaseDemand {
            block_bytes: SLAB / SLOTS,
            ..Bench::demand(borrower, leases)
        });
        for (number, grant) in (0..).zip(&grants) {
            let event = Event::Publish(Publish {
                caller: borrower,
                lease: grant.lease,
                generation: grant.generation,
                blocks: (0..SLOTS)
                    .map(|slot| (hash(number * SLOTS + slot), slot as u32))
                    .collect(),
            });
            bench.state.apply(event, crate::core::Now(bench.now));
        }
        let blocks = bench.state.indexed_blocks();
        assert_eq!(blocks, leases * SLOTS);
        let bytes = bench.state.books.index.heap_bytes() as u64;
        assert!(
            bytes > blocks * 16,
            "{bytes} bytes cannot hold {blocks} hashes"
        );
        assert!(bytes <= blocks * 100, "{} bytes a block", bytes / blocks);
    }
}
