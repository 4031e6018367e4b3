//! What a borrower leaves when it is gone: its heir finds it, with every byte right; nobody else does; and it is in nobody's way.

use std::{collections::BTreeSet, process::Command};

use anyhow::{Result, ensure};
use rand::Rng;
use swiftcache_client::cache::{Borrower, BorrowerConfig, Layout};
use swiftcache_tests::{
    crew::{BorrowerProcess, FOREVER, Job, donor, donor_process},
    engine::{BLOCK_BYTES, NAMESPACE, SLAB_BYTES, eventually, hash},
    node::Node,
    operator::Operator,
    programs::program,
    seed::Course,
};

/// Long enough for any test.
const KEPT: [&str; 6] = [
    "--estate-ttl-ms",
    "3600000",
    "--pin-ms",
    "100",
    "--drain-ms",
    "200",
];
const SLABS: u64 = 4;

/// A borrower without a host tier, whose sequences do not all fit.
fn job(name: &str) -> Job {
    Job {
        host_blocks: 0,
        slabs: SLABS,
        ..Job::new(name, 7)
    }
}

/// Starts a borrower, and kills it while it stores and evicts.
fn live_and_die(node: &Node, name: &str) -> Result<()> {
    let mut borrower = BorrowerProcess::start(node, 0, &job(name))?;
    borrower.run(&format!("reserve {SLABS}"))?;
    borrower.run("sweep-store")?;
    borrower.tell(FOREVER)?;
    borrower.advance(20)?;
    borrower.kill().map(drop)
}

fn left(operator: &Operator) -> Result<()> {
    operator.eventually("an estate", |account| account.estate_bytes > 0)
}

fn inherited(operator: &Operator) -> Result<u64> {
    Ok(operator
        .node()?
        .counters
        .unwrap_or_default()
        .inherited_leases)
}

/// What a new borrower with this job finds of what was there before. It checks every byte.
fn found_by(node: &Node, job: &Job) -> Result<u64> {
    let mut heir = BorrowerProcess::start(node, 0, job)?;
    // With a slab it is connected, and has asked for its inheritance.
    heir.run("reserve 1")?;
    let served = heir.run("sweep-fetch")?.served;
    heir.finish()?;
    Ok(served)
}

#[test]
fn a_borrower_killed_in_mid_store_comes_back_warm_and_every_byte_is_right() -> Result<()> {
    for kept in [true, false] {
        let ttl = if kept { KEPT[1] } else { "0" };
        let node = Node::start(&["--estate-ttl-ms", ttl, "--pin-ms", "100"])?;
        let operator = Operator::of(&node)?;
        let _donor = donor_process(&node, 1, SLABS)?;
        live_and_die(&node, "first")?;
        if kept {
            left(&operator)?;
        } else {
            // The twin: nothing is left, and nothing is found.
            operator.eventually("all to be free", |account| account.leased_bytes == 0)?;
            ensure!(found_by(&node, &job("second"))? == 0);
            continue;
        }
        let mut heir = BorrowerProcess::start(&node, 0, &job("second"))?;
        heir.run("reserve 1")?;
        ensure!(inherited(&operator)? > 0);
        ensure!(heir.run("sweep-fetch")?.served > 0);
        // It goes on as if it had never been away.
        heir.tell(FOREVER)?;
        heir.advance(60)?;
        ensure!(heir.run("sweep-fetch")?.served > 0);
        heir.finish()?;
    }
    Ok(())
}

#[test]
fn a_borrower_that_ends_in_good_order_leaves_what_it_has_published_too() -> Result<()> {
    let node = Node::start(&KEPT)?;
    let operator = Operator::of(&node)?;
    let _donor = donor_process(&node, 1, SLABS)?;
    let mut first = BorrowerProcess::start(&node, 0, &job("first"))?;
    first.run(&format!("reserve {SLABS}"))?;
    first.run("sweep-store")?;
    first.finish()?;
    left(&operator)?;
    ensure!(found_by(&node, &job("second"))? > 0);
    Ok(())
}

#[test]
fn borrowers_die_at_random_and_each_heir_finds_only_right_bytes() -> Result<()> {
    let mut course = Course::new("heirs", 12);
    let node = Node::start(&KEPT)?;
    let operator = Operator::of(&node)?;
    let _donors = [donor_process(&node, 1, 3)?, donor_process(&node, 2, 3)?];
    let mut served = 0;
    while course.goes_on() {
        // A replica besides, so that what is left has readers.
        let mut pair = Vec::new();
        for name in ["one", "other"] {
            let mut its = job(name);
            its.seed = course.rng.random();
            let mut borrower = BorrowerProcess::start(&node, 0, &its)?;
            borrower.tell(FOREVER)?;
            pair.push(borrower);
        }
        for borrower in &pair {
            borrower.advance(course.rng.random_range(1..60))?;
        }
        for borrower in pair {
            if let Some(complaint) = borrower.complaint() {
                anyhow::bail!(complaint);
            }
            served += borrower.kill()?.served;
        }
    }
    ensure!(served > 0);
    ensure!(inherited(&operator)? > 0);
    operator.settled().map(drop)
}

#[test]
fn of_two_heirs_each_lease_goes_to_one() -> Result<()> {
    let node = Node::start(&KEPT)?;
    let operator = Operator::of(&node)?;
    let _donor = donor_process(&node, 1, SLABS)?;
    live_and_die(&node, "first")?;
    left(&operator)?;
    let mut heirs = Vec::new();
    for name in ["one", "other"] {
        heirs.push(BorrowerProcess::start(&node, 0, &job(name))?);
    }
    operator.eventually("all to be inherited", |account| account.estate_bytes == 0)?;
    let counters = operator.node()?.counters.unwrap_or_default();
    ensure!(counters.inherited_leases == counters.estate_leases);
    let leases = operator.leases()?;
    let slabs: BTreeSet<_> = (leases.iter())
        .map(|lease| (lease.region_id.clone(), lease.slab))
        .collect();
    ensure!(slabs.len() == leases.len());
    // What the other one got is found by sharing.
    for heir in &mut heirs {
        heir.run("reserve 1")?;
        ensure!(heir.run("sweep-fetch")?.served > 0);
    }
    for heir in heirs {
        heir.finish()?;
    }
    Ok(())
}

#[test]
fn nobody_of_another_tenant_namespace_or_layout_gets_anything() -> Result<()> {
    let node = Node::start(&KEPT)?;
    let operator = Operator::of(&node)?;
    let _donor = donor_process(&node, 1, SLABS + 2)?;
    live_and_die(&node, "first")?;
    left(&operator)?;
    let before = operator.account()?.estate_bytes;
    let mut tenant = job("tenant");
    tenant.tenant = "other".to_owned();
    let mut namespace = job("namespace");
    namespace.namespace = "another engine".to_owned();
    for stranger in [tenant, namespace] {
        ensure!(found_by(&node, &stranger)? == 0, "{stranger:?}");
    }
    // Blocks of another size.
    let layout = Layout {
        namespace: NAMESPACE.to_owned(),
        layer_bytes: vec![BLOCK_BYTES / 2],
    };
    let config = BorrowerConfig::new(node.device(0), layout, SLAB_BYTES);
    let session = node.session("layout")?;
    let other = Borrower::open(Some(session), node.layer()?, config)?;
    // Whatever it leases, it has asked for its inheritance before.
    eventually("a slab", || Ok(other.reserve(SLAB_BYTES) == SLAB_BYTES))?;
    let hashes: Vec<_> = (0..20).map(hash).collect();
    ensure!(other.lookup(&hashes).blocks() == 0);
    ensure!(other.stats().inherited_blocks == 0);
    ensure!(operator.account()?.estate_bytes == before);
    // The twin: its heir gets it.
    ensure!(found_by(&node, &job("second"))? > 0);
    Ok(())
}

#[test]
fn an_estate_outlives_the_broker_and_not_both_at_once() -> Result<()> {
    let mut node = Node::start(&KEPT)?;
    let _donor = donor_process(&node, 1, SLABS)?;
    live_and_die(&node, "first")?;
    left(&Operator::of(&node)?)?;
    node.kill_broker()?;
    node.start_broker()?;
    let operator = Operator::of(&node)?;
    left(&operator)?;
    let mut heir = BorrowerProcess::start(&node, 0, &job("second"))?;
    eventually("the heir to inherit", || Ok(inherited(&operator)? > 0))?;
    ensure!(heir.run("sweep-fetch")?.served > 0);
    // Broker and borrower die together: what was in the slabs is nobody's to say, and they are free.
    heir.tell(FOREVER)?;
    heir.advance(10)?;
    node.kill_broker()?;
    heir.kill()?;
    node.start_broker()?;
    let operator = Operator::of(&node)?;
    operator.eventually("all to be free", |account| {
        account.free_bytes == SLABS * SLAB_BYTES
    })?;
    let mut last = BorrowerProcess::start(&node, 0, &job("third"))?;
    last.run(&format!("reserve {SLABS}"))?;
    ensure!(last.run("sweep-fetch")?.served == 0);
    last.run("sweep-store")?;
    ensure!(last.run("sweep-fetch")?.served > 0);
    last.finish().map(drop)
}

#[test]
fn a_donor_has_its_memory_back_at_once() -> Result<()> {
    let node = Node::start(&KEPT)?;
    let operator = Operator::of(&node)?;
    let donor = donor(&node, 1, SLABS)?;
    live_and_die(&node, "first")?;
    left(&operator)?;
    drop(donor);
    operator.eventually("the donor to have it all", |account| {
        account.offered_bytes == 0
    })?;
    let _donor = donor_process(&node, 1, SLABS)?;
    ensure!(found_by(&node, &job("second"))? == 0);
    Ok(())
}

#[test]
fn whoever_needs_the_memory_gets_it() -> Result<()> {
    let node = Node::start(&KEPT)?;
    let operator = Operator::of(&node)?;
    let _donor = donor_process(&node, 1, SLABS)?;
    live_and_die(&node, "first")?;
    left(&operator)?;
    // Of another tenant: every slab is zeroed before it has one.
    let mut other = job("other");
    other.tenant = "other".to_owned();
    let mut other = BorrowerProcess::start(&node, 0, &other)?;
    other.run(&format!("reserve {SLABS}"))?;
    ensure!(operator.account()?.estate_bytes == 0);
    ensure!(other.run("sweep-fetch")?.served == 0);
    other.finish().map(drop)
}

#[test]
fn an_operator_sees_it_and_drops_it() -> Result<()> {
    let node = Node::start(&KEPT)?;
    let operator = Operator::of(&node)?;
    let _donor = donor_process(&node, 1, SLABS)?;
    live_and_die(&node, "first")?;
    left(&operator)?;
    let estate = operator.account()?.estate_bytes;
    ensure!(node.status(&[])?.contains("(gone)"));
    let status: serde_json::Value = serde_json::from_str(&node.status(&["--json"])?)?;
    ensure!(status["total"]["estate"] == estate, "{status}");
    ensure!(status["namespaces"][0]["estate"] == estate, "{status}");
    let forget = |namespace: &str| -> Result<serde_json::Value> {
        let mut command = Command::new(program("swiftcache")?);
        command.args(["forget", "--yes", "--json", "--namespace", namespace]);
        let done = command.arg("--socket").arg(node.socket()).output()?;
        ensure!(done.status.success(), "{done:?}");
        Ok(serde_json::from_slice(&done.stdout)?)
    };
    ensure!(forget("another engine")?["forgotten_leases"] == 0);
    ensure!(operator.account()?.estate_bytes == estate);
    ensure!(forget(NAMESPACE)?["forgotten_bytes"] == estate);
    ensure!(operator.account()?.free_bytes == SLABS * SLAB_BYTES);
    ensure!(found_by(&node, &job("second"))? == 0);
    Ok(())
}
