//! Donors that lend a fixed amount: whatever costs them a slab, costs it for a while. And two donors that follow one device.

use std::{
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use swiftcache_client::donor::{Agent, AgentConfig, Donor, DonorConfig, PolicyConfig};
use swiftcache_tests::{
    PATIENCE,
    engine::{SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    programs::{Program, program},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// So many that a broker is killed before all of them are offered.
const MANY: u64 = 1_000;

fn open(node: &Node, slab_bytes: u64) -> Result<Donor> {
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes,
        drain: PATIENCE,
        handle: None,
    };
    Ok(Donor::open(node.session("donor")?, node.layer()?, config)?)
}

/// Kills the broker as soon as the donor has some slabs on offer, and starts it again. Says what was on offer then.
fn restart_in_the_middle(node: &mut Node, donor: &Donor, more: u64) -> Result<u64> {
    let before = donor.status().offered_bytes;
    eventually("some slabs to be on offer", || {
        Ok(donor.status().offered_bytes >= before + more * SLAB_BYTES)
    })?;
    node.kill_broker()?;
    let offered = donor.status().offered_bytes;
    node.start_broker()?;
    Ok(offered)
}

fn all_of(donor: &Donor, bytes: u64) -> Result<()> {
    eventually("all of it to be on offer", || {
        let status = donor.status();
        ensure!(status.offered_bytes <= bytes, "{status:?}");
        Ok(status.offered_bytes == bytes && status.unconfirmed_bytes == 0)
    })?;
    ensure!(donor.problem().is_none(), "{:?}", donor.problem());
    Ok(())
}

#[test]
fn broker_restarts_in_mid_offer_cost_a_fixed_donor_nothing_for_good() -> Result<()> {
    let mut node = Node::start(&[])?;
    let donor = open(&node, SLAB_BYTES)?;
    let all = MANY * SLAB_BYTES;
    donor.keep(all + SLAB_BYTES - 1);
    ensure!(donor.status().target_bytes == all, "{:?}", donor.status());
    for _ in 0..3 {
        let offered = restart_in_the_middle(&mut node, &donor, 10)?;
        ensure!(offered < all, "the broker was killed too late");
    }
    all_of(&donor, all)?;
    let operator = Operator::of(&node)?;
    ensure!(operator.settled()?.offered_bytes == all);
    ensure!(donor.close(PATIENCE));
    ensure!(operator.settled()?.offered_bytes == 0, "it was topped up");
    Ok(())
}

/// The twin: a donor that offers once, as all of them did, stays truncated by the same restart.
#[test]
fn without_a_target_a_restart_in_mid_offer_truncates_a_donor() -> Result<()> {
    let mut node = Node::start(&[])?;
    let donor = open(&node, SLAB_BYTES)?;
    let all = MANY * SLAB_BYTES;
    let added = std::thread::scope(|scope| {
        let growing = scope.spawn(|| donor.grow(all));
        restart_in_the_middle(&mut node, &donor, 10)?;
        let grown = growing.join().ok().context("it panicked")?;
        anyhow::Ok(grown?)
    })?;
    ensure!(added < all, "{added}");
    eventually("what is left to be offered again", || {
        Ok(donor.status().unconfirmed_bytes == 0)
    })?;
    ensure!(donor.status().offered_bytes < all, "{:?}", donor.status());
    Ok(())
}

#[test]
fn a_lost_ledger_costs_a_fixed_donor_nothing_for_good() -> Result<()> {
    let mut node = Node::start(&[])?;
    let donor = open(&node, SLAB_BYTES)?;
    donor.keep(8 * SLAB_BYTES);
    all_of(&donor, 8 * SLAB_BYTES)?;
    node.kill_broker()?;
    node.lose_ledger()?;
    // While its memory is not free again, there is no room for as much once more.
    node.neighbour_uses(1, GIB - 8 * SLAB_BYTES)?;
    node.start_broker()?;
    all_of(&donor, 8 * SLAB_BYTES)?;
    let operator = Operator::of(&node)?;
    eventually("the broker to have it all", || {
        Ok(operator.settled()?.offered_bytes == 8 * SLAB_BYTES)
    })
}

#[test]
fn a_full_device_is_named_and_what_is_missing_follows() -> Result<()> {
    let node = Node::start(&[])?;
    node.neighbour_uses(1, GIB / 4)?;
    let donor = open(&node, GIB / 4)?;
    donor.keep(GIB);
    eventually("the cause to be known", || Ok(donor.problem().is_some()))?;
    let problem = donor.problem().unwrap_or_default();
    ensure!(
        problem.contains("SIM-1: no room for 268435456 bytes"),
        "{problem}"
    );
    ensure!(donor.status().offered_bytes == GIB * 3 / 4);
    node.neighbour_uses(1, 0)?;
    all_of(&donor, GIB)?;
    // What its owner wants back is not offered again.
    ensure!(donor.shrink(GIB / 4)? == GIB / 4);
    ensure!(donor.wait_returned(PATIENCE));
    all_of(&donor, GIB * 3 / 4)?;
    ensure!(donor.status().target_bytes == GIB * 3 / 4);
    Ok(())
}

#[test]
fn a_refusing_broker_is_quoted_and_asked_again() -> Result<()> {
    let mut node = Node::start(&["--max-regions", "2"])?;
    let donor = open(&node, SLAB_BYTES)?;
    donor.keep(3 * SLAB_BYTES);
    eventually("the cause to be known", || Ok(donor.problem().is_some()))?;
    let problem = donor.problem().unwrap_or_default();
    ensure!(problem.contains("regions: the limit is 2"), "{problem}");
    ensure!(donor.status().offered_bytes == 2 * SLAB_BYTES);
    node.kill_broker()?;
    eventually("the broker to be missed", || {
        let problem = donor.problem().unwrap_or_default();
        Ok(problem.contains("is swiftcache-broker running?"))
    })?;
    Ok(())
}

#[test]
fn nothing_is_added_while_the_device_is_held() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = open(&node, SLAB_BYTES)?;
    let hold = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new(program("swiftcache")?);
        command.arg("hold").arg("--socket").arg(node.socket());
        let held = command.arg("--device=SIM-1").args(arguments).output()?;
        ensure!(held.status.success(), "{held:?}");
        Ok(())
    };
    hold(&["--free=1MiB", "--for=30m"])?;
    donor.keep(2 * SLAB_BYTES);
    eventually("the donor to have heard of the hold", || {
        let problem = donor.problem().unwrap_or_default();
        Ok(problem.contains("SIM-1 is held for an engine's start"))
    })?;
    for _ in 0..100 {
        ensure!(donor.status().offered_bytes == 0);
    }
    // The twin: without the hold.
    hold(&["--end"])?;
    all_of(&donor, 2 * SLAB_BYTES)
}

fn donate(node: &Node, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("swiftcache")?);
    command.arg("donate").arg("--socket").arg(node.socket());
    let usage = node.directory().join("usage");
    command.arg("--usage-dir").arg(usage).args(arguments);
    Ok(command)
}

#[test]
fn the_command_refuses_what_cannot_work_and_names_the_flag() -> Result<()> {
    let node = Node::start(&[])?;
    for (arguments, flag) in [
        (&["--bytes=0"][..], "--bytes: takes more than 0"),
        (&["--bytes=1MiB"], "--bytes: 1.0 MB is less than one slab"),
        (&["--bytes=1GiB", "--leave-within=0s"], "--leave-within: "),
        (
            &["--elastic", "--period=0s"],
            "--period: takes more than 0s",
        ),
        (&["--bytes=2GiB"], "--bytes: SIM-1 has 1.1 GB of HBM"),
    ] {
        let refused: Output = donate(&node, arguments)?.arg("--device=SIM-1").output()?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(
            refused.status.code() == Some(2),
            "{arguments:?}: {refused:?}"
        );
        ensure!(said.contains(flag), "{arguments:?}: {said}");
    }
    Ok(())
}

#[test]
fn the_command_says_the_real_cause_and_goes_on() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    node.neighbour_uses(1, GIB / 2)?;
    let log = node.directory().join("donor.log");
    let mut command = donate(&node, &["--device=SIM-1", "--bytes=768MiB"])?;
    command.stderr(std::fs::File::create(&log)?);
    let mut donor = Program::start(&mut command)?;
    eventually("the cause to be said", || {
        let said = std::fs::read_to_string(&log)?;
        Ok(said.contains("536870912 of 805306368 bytes on offer")
            && said.contains("no room for 268435456 bytes"))
    })?;
    node.neighbour_uses(1, 0)?;
    eventually("the rest to be on offer", || {
        Ok(operator.settled()?.offered_bytes == 768 * MIB)
    })?;
    donor.signal(Signal::TERM)?;
    eventually("it to leave with everything back", || donor.has_ended())?;
    ensure!(operator.settled()?.offered_bytes == 0);
    Ok(())
}

#[test]
fn one_elastic_donor_at_a_time_follows_a_device() -> Result<()> {
    let node = Node::start(&[])?;
    let agent = |name: &str| -> Result<Agent> {
        let mut policy = PolicyConfig::new(GIB, 64 * MIB);
        policy.settle = Duration::from_millis(50);
        policy.max_bytes = 128 * MIB;
        let config = DonorConfig {
            device: node.device(1),
            slab_bytes: policy.slab_bytes,
            drain: PATIENCE,
            handle: None,
        };
        let agent = AgentConfig {
            policy,
            period: Duration::from_millis(5),
        };
        let layer: Arc<_> = node.layer()?;
        Ok(Agent::start(node.session(name)?, layer, config, agent)?)
    };
    let has_all = |agent: &Agent| Ok(agent.status().offered_bytes == 128 * MIB);
    let first = agent("first")?;
    eventually("the first to offer", || has_all(&first))?;
    ensure!(first.problem().is_none());
    let second = agent("second")?;
    eventually("the second to be refused", || {
        let problem = second.problem().unwrap_or_default();
        Ok(problem.contains("(first) follows the idle HBM of SIM-1 already"))
    })?;
    ensure!(second.status().offered_bytes == 0, "{second:?}");
    // A fixed donor beside them is nobody's rival.
    let fixed = open(&node, SLAB_BYTES)?;
    fixed.keep(SLAB_BYTES);
    all_of(&fixed, SLAB_BYTES)?;
    // The twin: the second one alone.
    ensure!(first.stop(PATIENCE));
    eventually("the second to take its place", || has_all(&second))?;
    ensure!(second.stop(PATIENCE));
    Ok(())
}
