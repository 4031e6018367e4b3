//! Donors with a real broker. Lent memory comes back, and only when no process can access it any more.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use swiftcache_client::donor::{Agent, AgentConfig, Donor, DonorConfig, PolicyConfig};
use swiftcache_proto::domain::HandleKind;
use swiftcache_tests::{
    PATIENCE,
    engine::{self, Engine, SLAB_BYTES, eventually},
    node::Node,
};

const GIB: u64 = 1 << 30;

fn config(node: &Node) -> DonorConfig {
    DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    }
}

fn donor(node: &Node, slabs: u64) -> Result<Donor> {
    let donor = Donor::open(node.session("donor")?, node.layer()?, config(node))?;
    ensure!(donor.grow(slabs * SLAB_BYTES)? == slabs * SLAB_BYTES);
    Ok(donor)
}

fn engine(node: &Node, slabs: u64) -> Result<Engine> {
    let config = engine::config(node.device(0), slabs);
    Engine::new(Some(node.session("engine")?), node.layer()?, config)
}

#[test]
fn what_nobody_leased_comes_back_at_once() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = donor(&node, 4)?;
    ensure!(donor.shrink(SLAB_BYTES + 1)? == 2 * SLAB_BYTES);
    ensure!(donor.wait_returned(PATIENCE));
    eventually("both regions", || Ok(donor.status().returned == 2))?;
    let status = donor.status();
    ensure!(status.offered_bytes == 2 * SLAB_BYTES, "{status:?}");
    ensure!(status.give_back.count == 2, "{status:?}");
    Ok(())
}

#[test]
fn returned_hbm_is_free_again() -> Result<()> {
    let node = Node::start(&[])?;
    let layer = node.layer()?;
    let before = layer.hbm(&node.device(1))?.free;
    let donor = donor(&node, 4)?;
    ensure!(layer.hbm(&node.device(1))?.free == before - 4 * SLAB_BYTES);
    let borrower = engine(&node, 4)?;
    borrower.reserve(4)?;
    ensure!(donor.close(PATIENCE));
    ensure!(layer.hbm(&node.device(1))?.free == before);
    Ok(())
}

#[test]
fn a_restarted_broker_knows_the_donor_again() -> Result<()> {
    let mut node = Node::start(&[])?;
    let donor = donor(&node, 2)?;
    node.kill_broker()?;
    ensure!(donor.shrink(SLAB_BYTES).is_err(), "nobody can give it back");
    node.start_broker()?;
    let borrower = engine(&node, 2)?;
    borrower.reserve(2)?;
    borrower.store(&[1, 2, 3])?;
    ensure!(borrower.fetch(&[1, 2, 3])?.served == 3);
    ensure!(donor.close(PATIENCE));
    Ok(())
}

#[test]
fn another_tenants_slab_is_zeroed_first() -> Result<()> {
    let node = Node::start(&[])?;
    let donor = donor(&node, 1)?;
    let first = engine(&node, 1)?;
    first.reserve(1)?;
    first.store(&[1, 2, 3])?;
    drop(first);
    let session =
        swiftcache_client::session::Session::connect(swiftcache_client::session::SessionConfig {
            socket: node.socket(),
            name: "stranger".to_owned(),
            tenant: "other".to_owned(),
        })?;
    let config = engine::config(node.device(0), 1);
    let stranger = Engine::new(Some(session), node.layer()?, config)?;
    stranger.reserve(1)?;
    ensure!(donor.status().scrubbed == 1);
    // The other tenant's namespace of the same name is a different one.
    ensure!(stranger.fetch(&[1, 2, 3])?.found == 0);
    Ok(())
}

#[test]
fn the_agent_follows_its_neighbours() -> Result<()> {
    let node = Node::start(&[])?;
    let mut policy = PolicyConfig::new(GIB, GIB / 32);
    // Long enough for more than one look at the neighbour, also on a busy machine.
    policy.settle = Duration::from_secs(1);
    policy.horizon = Duration::from_secs(1);
    policy.half_life = Duration::from_millis(10);
    policy.rise_slabs = 32;
    let layer = node.layer()?;
    node.neighbour_uses(1, GIB / 2)?;
    let config = DonorConfig {
        slab_bytes: policy.slab_bytes,
        ..config(&node)
    };
    let agent = Agent::start(
        node.session("agent")?,
        layer,
        config,
        AgentConfig {
            policy,
            period: Duration::from_millis(2),
        },
    )?;
    // Half of the HBM is used. A twentieth is kept as a reserve, a twentieth for growth, and two slabs for hysteresis.
    let room = (GIB / 2 - GIB / 10) / policy.slab_bytes * policy.slab_bytes - 2 * policy.slab_bytes;
    eventually("the offer to rise", || {
        Ok(agent.status().offered_bytes >= room - policy.slab_bytes)
    })?;
    ensure!(agent.status().offered_bytes <= room);
    node.neighbour_uses(1, GIB * 3 / 4)?;
    // What is given back leaves the reserve at once. The headroom follows when the neighbour is quiet, in whole slabs: less
    // than a slab of it may be missing.
    let most = GIB / 4 - GIB / 10 + policy.slab_bytes;
    eventually("the offer to fall", || {
        let status = agent.status();
        Ok(status.offered_bytes <= most && status.withdrawing_bytes == 0)
    })?;
    ensure!(agent.status().offered_bytes + 2 * policy.slab_bytes > most);
    ensure!(agent.explain().contains("on offer"), "{}", agent.explain());
    ensure!(agent.stop(PATIENCE));
    Ok(())
}

#[test]
fn settings_that_cannot_work_are_named() -> Result<()> {
    let node = Node::start(&[])?;
    let open = |config| -> Result<String> {
        let donor = Donor::open(node.session("donor")?, node.layer()?, config);
        Ok(donor.err().context("was accepted")?.to_string())
    };
    let tiny = DonorConfig {
        slab_bytes: 1,
        ..config(&node)
    };
    let text = open(tiny)?;
    ensure!(text.contains("slab_bytes"), "{text}");
    let nowhere = DonorConfig {
        device: "SIM-9".parse().map_err(anyhow::Error::msg)?,
        ..config(&node)
    };
    let text = open(nowhere)?;
    ensure!(text.contains("SIM-9"), "{text}");
    let foreign = DonorConfig {
        handle: Some(HandleKind::CudaIpc),
        ..config(&node)
    };
    let text = open(foreign)?;
    ensure!(
        text.contains("handle") && text.contains("PosixFd"),
        "{text}"
    );
    Ok(())
}
