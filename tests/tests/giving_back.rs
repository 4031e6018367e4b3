//! A donor gets back what it asks for, whatever happens to its requests, and it never waits before it asks.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use swiftcache_client::donor::{Agent, AgentConfig, Donor, DonorConfig, PolicyConfig};
use swiftcache_tests::{
    PATIENCE,
    engine::{SLAB_BYTES, eventually},
    gate::{Fault, Gate, Stage},
    node::Node,
};
use tonic::Code;

const GIB: u64 = 1 << 30;

fn config(node: &Node) -> DonorConfig {
    DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    }
}

/// The first withdrawals do not reach the broker, and the connection stays.
#[test]
fn a_withdrawal_that_was_lost_is_asked_again_on_the_same_connection() -> Result<()> {
    let node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let donor = Donor::open(gate.session("donor")?, node.layer()?, config(&node))?;
    donor.grow(2 * SLAB_BYTES)?;
    gate.fail("Withdraw", Fault::Refuse(Code::Aborted), 2);
    ensure!(donor.close(PATIENCE), "stranded");
    ensure!(gate.count("Withdraw", Stage::Refused) == 2);
    ensure!(
        gate.count("Register", Stage::Arrived) == 1,
        "it reconnected"
    );
    Ok(())
}

/// It is unknown whether the offer has happened. A withdrawal that finds no region must not free the memory, because
/// the offer may still arrive later.
#[test]
fn what_may_have_been_offered_is_offered_before_it_is_withdrawn() -> Result<()> {
    let node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let donor = Donor::open(gate.session("donor")?, node.layer()?, config(&node))?;
    // The offer is held until the donor gives up. Then the donor does not know whether it has happened.
    gate.hold("Offer");
    donor.grow(SLAB_BYTES)?;
    ensure!(gate.count("Offer", Stage::Arrived) >= 1);
    ensure!(gate.count("Offer", Stage::Answered) == 0);
    gate.open();
    ensure!(donor.close(PATIENCE), "stranded");
    let log = gate.log();
    let first = |what| log.iter().position(|entry| *entry == what);
    let offered = first(("Offer", Stage::Answered)).context("withdrawn without an offer")?;
    ensure!(
        Some(offered) < first(("Withdraw", Stage::Answered)),
        "{log:?}"
    );
    Ok(())
}

/// Whoever waits for an agent to have done what a neighbour's growth asks for reads that in its status, however long the
/// broker takes to answer.
#[test]
fn what_is_asked_back_shows_until_the_broker_has_answered() -> Result<()> {
    let node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let mut policy = PolicyConfig::new(GIB, GIB / 32);
    policy.settle = Duration::ZERO;
    let donor = DonorConfig {
        slab_bytes: policy.slab_bytes,
        ..config(&node)
    };
    let agent = AgentConfig {
        policy,
        period: Duration::from_millis(5),
    };
    let agent = Agent::start(gate.session("agent")?, node.layer()?, donor, agent)?;
    eventually("most of it to be on offer", || {
        Ok(agent.status().offered_bytes > GIB / 2)
    })?;
    gate.hold("Withdraw");
    node.neighbour_uses(1, GIB / 2)?;
    eventually("some of it to be asked back", || {
        Ok(agent.status().asked_bytes > 0)
    })?;
    // The twin: on its way back is what the broker has said is.
    ensure!(agent.status().withdrawing_bytes == 0);
    gate.open();
    eventually("it to be back", || {
        let status = agent.status();
        Ok(status.asked_bytes + status.withdrawing_bytes == 0 && status.offered_bytes <= GIB / 2)
    })?;
    ensure!(agent.stop(PATIENCE));
    Ok(())
}

/// An offer that hangs must not delay a withdrawal for a neighbour that needs its HBM now.
#[test]
fn a_neighbours_demand_does_not_wait_for_an_offer() -> Result<()> {
    let node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let mut policy = PolicyConfig::new(GIB, GIB / 32);
    policy.settle = Duration::ZERO;
    policy.half_life = Duration::from_millis(10);
    policy.max_bytes = 4 * policy.slab_bytes;
    let donor = DonorConfig {
        slab_bytes: policy.slab_bytes,
        ..config(&node)
    };
    node.neighbour_uses(1, GIB - GIB / 4)?;
    let agent = Agent::start(
        gate.session("agent")?,
        node.layer()?,
        donor,
        AgentConfig {
            policy,
            period: Duration::from_millis(5),
        },
    )?;
    // Eight slabs are idle. After reserve, headroom and hysteresis, two are left.
    eventually("two on offer", || {
        Ok(gate.count("Offer", Stage::Answered) >= 2)
    })?;
    // The next offer hangs until the gate is opened.
    gate.hold("Offer");
    node.neighbour_uses(1, 0)?;
    eventually("an offer to hang", || {
        Ok(gate.count("Offer", Stage::Arrived) >= 3)
    })?;
    node.neighbour_uses(1, GIB)?;
    eventually("the demand to be passed on", || {
        Ok(gate.count("Withdraw", Stage::Arrived) > 0)
    })?;
    let log = gate.log();
    let first = |what| log.iter().position(|entry| *entry == what);
    let given_up = first(("Offer", Stage::GivenUp)).unwrap_or(log.len());
    ensure!(
        first(("Withdraw", Stage::Arrived)) < Some(given_up),
        "the withdrawal came after the offer's deadline: {log:?}"
    );
    gate.open();
    eventually("all to be back", || {
        let status = agent.status();
        Ok(status.offered_bytes + status.withdrawing_bytes == 0)
    })?;
    ensure!(agent.stop(PATIENCE));
    Ok(())
}
