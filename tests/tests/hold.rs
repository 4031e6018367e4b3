//! An engine that starts beside elastic donors: `swiftcache hold` makes room first, and free HBM never rises meanwhile.

use std::{
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::donor::{Agent, AgentConfig, DonorConfig, PolicyConfig};
use swiftcache_proto::v1;
use swiftcache_tests::{
    PATIENCE,
    crew::donor_process,
    engine::eventually,
    node::Node,
    operator::Operator,
    programs::{Program, program},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SLAB: u64 = 16 * MIB;

fn elastic(node: &Node) -> Result<Program> {
    let mut command = Command::new(program("swiftcache")?);
    command.arg("donate").arg("--socket").arg(node.socket());
    command
        .arg("--usage-dir")
        .arg(node.directory().join("usage"));
    command.args([
        "--device=SIM-1",
        "--elastic",
        "--slab=16MiB",
        "--name=elastic",
    ]);
    command.args(["--period=5ms", "--settle=50ms", "--half-life=50ms"]);
    Program::start(&mut command)
}

fn hold(node: &Node, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program("swiftcache")?);
    command.arg("hold").arg("--socket").arg(node.socket());
    Ok(command.args(arguments).output()?)
}

/// The second device.
fn seen(operator: &Operator) -> Result<v1::DeviceStatus> {
    let devices = operator.node()?.devices;
    devices.into_iter().nth(1).context("no second device")
}

fn offered(operator: &Operator) -> Result<u64> {
    Ok(seen(operator)?.account.context("no account")?.offered_bytes)
}

#[test]
fn a_hold_makes_room_first_and_then_nothing_is_offered() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let _donor = elastic(&node)?;
    eventually("the donor to offer most of it", || {
        Ok(offered(&operator)? > GIB / 2)
    })?;
    // Half of the device is more than is free now.
    let held = hold(
        &node,
        &[
            "--device=SIM-1",
            "--free=512MiB",
            "--for=30m",
            "--within=20m",
        ],
    )?;
    let said = String::from_utf8_lossy(&held.stdout);
    ensure!(held.status.success(), "{held:?}");
    ensure!(
        said.contains("SIM-1") && said.contains("stay as they are"),
        "{said}"
    );
    let device = seen(&operator)?;
    ensure!(GIB - device.hbm_used_bytes >= GIB / 2, "{device:?}");
    ensure!(device.hold.is_some());
    let kept = offered(&operator)?;
    ensure!(kept > 0, "what the engine does not need stays on offer");
    // Another donor that comes now offers nothing, although half of the device is free; a neighbour that comes for less
    // than it asked for gets nothing more; and a second hold waits its turn, here in vain.
    let _late = elastic(&node)?;
    eventually("the second donor", || {
        let donors = operator.sessions()?.into_iter();
        Ok(donors.filter(|session| session.name == "elastic").count() == 2)
    })?;
    node.neighbour_uses(1, 400 * MIB)?;
    let second = hold(&node, &["--device=1", "--free=1MiB", "--within=0s"])?;
    let said = String::from_utf8_lossy(&second.stderr);
    ensure!(second.status.code() == Some(1), "{second:?}");
    ensure!(
        said.contains("is held for another engine's start"),
        "{said}"
    );
    for _ in 0..100 {
        ensure!(offered(&operator)? == kept);
    }
    node.neighbour_uses(1, 0)?;
    // The twin: without the hold, they do offer it.
    ensure!(hold(&node, &["--device=1", "--end"])?.status.success());
    ensure!(seen(&operator)?.hold.is_none());
    eventually("the offers to rise", || Ok(offered(&operator)? > kept))
}

#[test]
fn who_holds_the_rest_is_named() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let _fixed = donor_process(&node, 1, 1)?;
    node.neighbour_uses(1, GIB / 2)?;
    let held = hold(&node, &["--device=SIM-1", "--free=1GiB", "--within=0s"])?;
    let said = String::from_utf8_lossy(&held.stderr);
    ensure!(held.status.code() == Some(1), "{held:?}");
    let label = &operator.sessions()?[0].label;
    for part in [
        "SIM-1 has",
        label,
        "only elastic donors",
        "other processes use",
    ] {
        ensure!(said.contains(part), "{part:?} is not in {said}");
    }
    ensure!(seen(&operator)?.hold.is_none(), "no engine starts now");
    // What cannot be true is refused before anybody gives anything back.
    let more = hold(&node, &["--device=SIM-1", "--free=2GiB"])?;
    ensure!(more.status.code() == Some(2), "{more:?}");
    Ok(())
}

/// The way vLLM starts, without a hold: it remembers what is free, loads its weights, and gives up when free HBM is no
/// less afterwards. The policy's own tests show more of the pattern, and that the rule that was breaks it.
#[test]
fn free_hbm_never_rises_while_an_engine_starts() -> Result<()> {
    let node = Node::start(&[])?;
    let layer = node.layer()?;
    let device = node.device(1);
    let mut policy = PolicyConfig::new(GIB, SLAB);
    policy.settle = Duration::from_millis(100);
    policy.half_life = Duration::from_millis(100);
    let config = DonorConfig {
        device: device.clone(),
        slab_bytes: SLAB,
        drain: PATIENCE,
        handle: None,
    };
    let agent = AgentConfig {
        policy,
        period: Duration::from_millis(2),
    };
    let agent = Agent::start(node.session("agent")?, node.layer()?, config, agent)?;
    let quiet = |what: &str| {
        eventually(what, || {
            let free = layer.hbm(&device)?.free as f64 / GIB as f64;
            let seen = format!("{free:.2} GiB of 1.00 GiB free");
            let text = agent.explain();
            let done = text.ends_with("nothing to change") || text.contains("has lasted");
            let status = agent.status();
            let over = status.asked_bytes + status.withdrawing_bytes == 0;
            Ok(over && done && text.starts_with(&seen))
        })
    };
    eventually("the offer to rise", || {
        Ok(agent.status().offered_bytes >= GIB * 3 / 4)
    })?;
    quiet("the agent to have enough")?;
    let first = layer.hbm(&device)?.free;
    let offered = agent.status().offered_bytes;
    for used in [70, 140, 200, 280, 330_u64] {
        node.neighbour_uses(1, used * MIB)?;
        quiet("the agent to have seen that")?;
        let now = layer.hbm(&device)?.free;
        ensure!(now < first, "{now} after {first}: {}", agent.explain());
    }
    ensure!(agent.status().offered_bytes < offered, "it did give back");
    ensure!(agent.stop(PATIENCE));
    Ok(())
}
