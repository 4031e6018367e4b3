//! A process that becomes another program keeps nothing: no descriptor, no mapping, and no session.

use std::{
    env, fs, io,
    io::Write,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{DeviceLayer, host::HostLayer};
use swiftcache_proto::topology::Topology;
use swiftcache_tests::{
    crew::donor_process,
    engine::{self, Engine, SLAB_BYTES, eventually},
    node::{Node, connect},
    operator::Operator,
};

/// What the borrower becomes: something that waits for its input to end.
const OTHER: &str = "cat";

#[test]
#[ignore = "the borrower in the test of this file, which becomes another program"]
fn a_borrower_that_execs() -> Result<()> {
    let variable = |name| env::var_os(name).map(PathBuf::from).context("no variable");
    let topology = variable("SWIFTCACHE_TEST_TOPOLOGY")?;
    let topology = Topology::load(&topology.to_string_lossy())?;
    let device = topology.devices[0].uuid.clone();
    let layer: Arc<dyn DeviceLayer> = Arc::new(HostLayer::from_topology(&topology, false)?);
    let session = connect(variable("SWIFTCACHE_TEST_SOCKET")?, "a program")?;
    let engine = Engine::new(Some(session), layer, engine::config(device, 1))?;
    engine.reserve(1)?;
    ensure!(engine.store(&[1, 2, 3])?.stored == 3);
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    Err(Command::new(OTHER).exec().into())
}

/// The borrower, when it has leased.
fn borrower(node: &Node, operator: &Operator) -> Result<Child> {
    let child = Command::new(env::current_exe()?)
        .args([
            "--exact",
            "a_borrower_that_execs",
            "--ignored",
            "--nocapture",
        ])
        .env("SWIFTCACHE_TEST_SOCKET", node.socket())
        .env("SWIFTCACHE_TEST_TOPOLOGY", node.topology_file())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    eventually("the borrower to have stored", || {
        Ok(operator.namespaces()?.iter().any(|its| its.blocks == 3))
    })?;
    Ok(child)
}

/// What a process has open, and how often a donor's memory is in its address space.
fn reach(pid: u32) -> Result<(Vec<String>, usize)> {
    let mut open = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        if let Ok(target) = fs::read_link(entry?.path()) {
            open.push(target.to_string_lossy().into_owned());
        }
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mapped = maps.lines().filter(|it| it.contains("swiftcache-hbm"));
    Ok((open, mapped.count()))
}

fn is_ours(open: &str) -> bool {
    ["socket:", "memfd:", "pidfd", "eventpoll"]
        .iter()
        .any(|kind| open.contains(kind))
}

#[test]
fn a_process_that_becomes_another_program_keeps_nothing() -> Result<()> {
    let node = Node::start(&["--estate-ttl-ms", "0"])?;
    let operator = Operator::of(&node)?;
    let _donor = donor_process(&node, 1, 2)?;
    let mut child = borrower(&node, &operator)?;
    // The twin: as long as it is the program that it was, it has all that.
    let (open, mapped) = reach(child.id())?;
    ensure!(mapped > 0 && open.iter().any(|it| is_ours(it)), "{open:?}");
    ensure!(operator.namespaces()?[0].leased_bytes == SLAB_BYTES);
    let mut input = child.stdin.take().context("no input")?;
    input.write_all(b"go\n")?;
    eventually("its lease to be free", || {
        let held = operator.namespaces()?;
        Ok(held.iter().all(|its| its.leased_bytes == 0))
    })?;
    ensure!(child.try_wait()?.is_none(), "it has ended");
    ensure!(fs::read_to_string(format!("/proc/{}/comm", child.id()))?.trim() == OTHER);
    let (open, mapped) = reach(child.id())?;
    ensure!(
        mapped == 0 && !open.iter().any(|it| is_ours(it)),
        "{open:?}"
    );
    let sessions = operator.sessions()?;
    ensure!(sessions.iter().all(|its| its.name != "a program"));
    drop(input);
    child.wait()?;
    Ok(())
}
