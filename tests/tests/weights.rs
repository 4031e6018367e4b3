//! Two models, each in its own process, want all slabs. They get shares by their weights, whoever came first, and then
//! no slab moves any more.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use swiftcache_tests::{
    crew::{BorrowerProcess, FOREVER, Job, donor_process},
    engine::{SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
};

const SLABS: u64 = 8;

fn start(node: &Node, namespace: &str) -> Result<BorrowerProcess> {
    let mut job = Job::new(namespace, 1);
    job.namespace = namespace.to_owned();
    // All slabs that there are.
    job.slabs = SLABS;
    job.conversations = 40;
    let mut borrower = BorrowerProcess::start(node, 0, &job)?;
    borrower.tell(FOREVER)?;
    Ok(borrower)
}

/// How many slabs each namespace has.
fn shares(operator: &Operator) -> Result<BTreeMap<String, u64>> {
    let held = operator.namespaces()?.into_iter();
    Ok(held
        .map(|namespace| (namespace.namespace, namespace.leased_bytes / SLAB_BYTES))
        .collect())
}

/// Starts the two models, one after the other. Checks that `heavy` gets `heavy` slabs and `light` the others, and that
/// they keep them.
fn settles(options: &[&str], order: [&str; 2], heavy: u64) -> Result<()> {
    let node = Node::start(&[&["--wait-ms", "5000"], options].concat())?;
    let operator = Operator::of(&node)?;
    let _donor = donor_process(&node, 1, SLABS)?;
    let first = start(&node, order[0])?;
    eventually("the first to hold everything", || {
        Ok(shares(&operator)?.get(order[0]) == Some(&SLABS))
    })?;
    let second = start(&node, order[1])?;
    let expected = [("heavy", heavy), ("light", SLABS - heavy)];
    let expected = expected
        .map(|(name, slabs)| (name.to_owned(), slabs))
        .into();
    eventually("shares by weight", || Ok(shares(&operator)? == expected))?;
    let leases = || -> Result<BTreeSet<u64>> {
        let leases = operator.leases()?.into_iter();
        Ok(leases.map(|lease| lease.lease_id).collect())
    };
    let before = leases()?;
    first.advance(300)?;
    second.advance(300)?;
    ensure!(leases()? == before, "slabs keep moving");
    for mut borrower in [first, second] {
        borrower.run("pause")?;
        borrower.finish()?;
    }
    Ok(())
}

#[test]
fn two_namespaces_share_by_weight_whoever_came_first() -> Result<()> {
    let weights = ["--namespace-weights", "heavy=3,light=1"];
    settles(&weights, ["light", "heavy"], 6)?;
    settles(&weights, ["heavy", "light"], 6)
}

/// The twin: without weights the shares are equal.
#[test]
fn without_weights_they_share_alike() -> Result<()> {
    settles(&[], ["light", "heavy"], 4)
}
