//! Donors take memory back and lend it again, many times, while borrowers store and fetch without a pause.

use anyhow::{Result, ensure};
use rand::Rng;
use swiftcache_tests::{
    PATIENCE,
    crew::{BorrowerProcess, Job, donor},
    engine::SLAB_BYTES,
    node::Node,
    operator::Operator,
    seed::Course,
};

/// Slabs that each donor lends at most.
const SLABS: u64 = 6;

#[test]
fn what_is_taken_back_under_full_load_comes_back_and_no_byte_is_wrong() -> Result<()> {
    let mut course = Course::new("revoked under load", 40);
    let node = Node::start(&["--pin-ms", "50"])?;
    let operator = Operator::of(&node)?;
    let donors = [1, 2].map(|device| donor(&node, device, SLABS));
    let donors = donors.into_iter().collect::<Result<Vec<_>>>()?;
    let mut borrowers = Vec::new();
    for n in 0..2 {
        let mut job = Job::new(&format!("borrower-{n}"), course.seed + n);
        job.slabs = SLABS;
        let mut borrower = BorrowerProcess::start(&node, 0, &job)?;
        borrower.run("reserve 6")?;
        borrower.tell("mix 1000000000")?;
        borrowers.push(borrower);
    }
    let mut taken = 0;
    while course.goes_on() {
        for borrower in &borrowers {
            borrower.advance(course.rng.random_range(1..20))?;
        }
        let slabs = course.rng.random_range(1..=SLABS);
        let donor = &donors[course.rng.random_range(0..2)];
        ensure!(donor.shrink(slabs * SLAB_BYTES)? == slabs * SLAB_BYTES);
        operator.account()?;
        ensure!(donor.wait_returned(PATIENCE), "not given back");
        // The borrowers acknowledged: no slab is a zombie.
        ensure!(operator.account()?.zombie_bytes == 0);
        taken += slabs;
        ensure!(donor.grow(slabs * SLAB_BYTES)? == slabs * SLAB_BYTES);
    }
    for donor in &donors {
        ensure!(donor.status().offered_bytes == SLABS * SLAB_BYTES);
    }
    let returned: u64 = donors.iter().map(|donor| donor.status().returned).sum();
    ensure!(returned == taken, "{returned} of {taken}");
    let counters = operator.node()?.counters.unwrap_or_default();
    ensure!(
        counters.revocations > 20 && counters.zombies == 0,
        "{counters:?}"
    );
    for mut borrower in borrowers {
        borrower.run("sweep-store")?;
        ensure!(borrower.run("sweep-fetch")?.served > 0);
        borrower.finish()?;
    }
    operator.eventually("every slab to be free", |account| {
        account.free_bytes == 2 * SLABS * SLAB_BYTES && account.offered_bytes == account.free_bytes
    })?;
    for donor in donors {
        ensure!(donor.close(PATIENCE));
    }
    ensure!(operator.settled()?.offered_bytes == 0);
    Ok(())
}
