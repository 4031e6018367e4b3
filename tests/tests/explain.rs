//! `swiftcache donate --explain` uses only what the broker knows, and takes account of memory that is already lent.

use std::{
    fs,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use swiftcache_tests::{
    crew::donor_process,
    engine::{SLAB_BYTES, eventually},
    node::{Devices, Node, Setup},
    operator::Operator,
    programs::program,
};

fn donate(node: &Node, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program("swiftcache")?);
    command.arg("donate").arg("--socket").arg(node.socket());
    Ok(command.args(arguments).output()?)
}

fn explained(node: &Node, device: &str) -> Result<String> {
    let slab = format!("--slab={SLAB_BYTES}");
    let arguments = [
        "--device",
        device,
        "--elastic",
        "--explain",
        "--settle=0s",
        &slab,
    ];
    let output = donate(node, &arguments)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn what_is_lent_already_is_not_taken_for_a_neighbours() -> Result<()> {
    let node = Node::start(&[])?;
    node.neighbour_uses(1, 512 << 20)?;
    let before = explained(&node, "SIM-1")?;
    // Half of 1 GiB is used. A twentieth is kept as a reserve, and a twentieth for growth.
    ensure!(
        before.starts_with("SIM-1: 0.50 GiB of 1.00 GiB free, 0.00 GiB on offer"),
        "{before}"
    );
    ensure!(before.contains("0.40 GiB could be on offer"), "{before}");
    // Now 64 MiB are lent.
    let donor = donor_process(&node, 1, (64 << 20) / SLAB_BYTES)?;
    let after = explained(&node, "SIM-1")?;
    ensure!(
        after.starts_with("SIM-1: 0.44 GiB of 1.00 GiB free, 0.06 GiB on offer"),
        "{after}"
    );
    ensure!(after.contains("0.40 GiB could be on offer"), "{after}");
    drop(donor);
    let operator = Operator::of(&node)?;
    let forgotten = || Ok(operator.sessions()?.is_empty());
    eventually("the donor to be forgotten", forgotten)?;
    // For programs, the same figures.
    let slab = format!("--slab={SLAB_BYTES}");
    let flags = [
        "--device=all",
        "--elastic",
        "--explain",
        "--json",
        "--settle=0s",
        &slab,
    ];
    let output = donate(&node, &flags)?;
    let document: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let devices = document.as_array().context("no list")?;
    ensure!(devices.len() == 3, "{document}");
    let one = devices.iter().find(|device| device["device"] == "SIM-1");
    let one = one.context("SIM-1 is missing")?;
    ensure!(
        one["free"] == 512 << 20 && one["lends_nothing"] == false,
        "{one}"
    );
    ensure!(one["could_offer"] == one["could_offer_settled"], "{one}");
    // Beside an engine with 97 % nothing is lent at first, and a little once it is settled; beside one with all, nothing.
    node.neighbour_uses(1, 993 << 20)?;
    let beside = explained(&node, "SIM-1")?;
    ensure!(
        beside.contains("0.00 GiB could be on offer") && beside.contains("for 5 min"),
        "{beside}"
    );
    node.neighbour_uses(1, 1024 << 20)?;
    let beside = explained(&node, "SIM-1")?;
    ensure!(
        beside.contains("it lends nothing") && beside.contains("\"lend\""),
        "{beside}"
    );
    node.neighbour_uses(1, 512 << 20)?;
    // It explains every device of the node, and makes no session or offer for that.
    let all = explained(&node, "all")?;
    ensure!(all.lines().count() == 3, "{all}");
    eventually("no session to be left", forgotten)
}

/// The devices are GPUs, which only CUDA could open, on a machine that may have none. A program that opens devices
/// cannot even start here.
#[test]
fn no_device_is_opened() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let topology = directory.path().join("topology.toml");
    let device = "[[device]]\nuuid = 'GPU-N'\nname = 'GPU'\nhbm_gib = 1\n";
    let devices = [0, 1].map(|n| device.replace('N', &n.to_string()));
    fs::write(&topology, format!("name = 'GPUs'\n{}", devices.concat()))?;
    let node = Node::start_with(Setup {
        devices: Devices::File(topology),
        ..Setup::default()
    })?;
    ensure!(explained(&node, "GPU-1")?.contains("could be on offer"));
    // The twin: a donor opens its device, and fails.
    let lends = donate(
        &node,
        &[
            "--device=GPU-1",
            "--bytes=1MiB",
            "--slab=1MiB",
            "--leave-within=0s",
        ],
    )?;
    ensure!(!lends.status.success());
    Ok(())
}
