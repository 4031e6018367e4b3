//! The full stack on CUDA: real processes with the stub driver, which simulates two GPUs.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use swiftcache_tests::{
    crew::{BorrowerProcess, Job},
    full_stack,
    node::{Devices, Node, Setup},
    programs::program,
    stub::{Held, Stub},
};

/// Runs the check program with a stub driver that has these faults. Returns whether it worked, and its output.
fn check(what: &str, faults: &[&str]) -> Result<(bool, String)> {
    let stub = Stub::new()?;
    for fault in faults {
        stub.inject(None, fault)?;
    }
    let output = Command::new(program("swiftcache-gpu-check")?)
        .args([what, "--topology"])
        .arg(stub.topology_file()?)
        .envs(stub.environment()?)
        .output()
        .context("swiftcache-gpu-check")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok((output.status.success(), said))
}

#[test]
fn blocks_cross_devices_through_every_process_by_each_kind_of_handle() -> Result<()> {
    let (worked, said) = check("full-stack", &[])?;
    ensure!(worked, "{said}");
    for handle in ["cuda-ipc", "posix-fd"] {
        let line = format!("ok      full stack, {handle}: 240 blocks stored");
        ensure!(said.contains(&line), "no {line:?} in {said}");
    }
    Ok(())
}

#[test]
fn a_donor_that_cannot_export_fails_and_is_named() -> Result<()> {
    let (worked, said) = check("full-stack", &["cuMemExportToShareableHandle=801"])?;
    ensure!(!worked, "{said}");
    ensure!(said.contains("ok      full stack, cuda-ipc"), "{said}");
    ensure!(
        said.contains("Error: full stack, posix-fd: swiftcache donate ended early"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_graph_is_captured_while_a_borrower_leases_stores_and_gives_back() -> Result<()> {
    let (worked, said) = check("graph-capture", &[])?;
    ensure!(worked, "{said}");
    for handle in ["cuda-ipc", "posix-fd"] {
        let line = format!("stored, loaded and given back, {handle}");
        ensure!(said.contains(&line), "no {line:?} in {said}");
    }
    // Its twin: where relaxing a thread's mode does not help, the borrower's calls spoil the capture.
    let (worked, said) = check("graph-capture", &["capture_mode=ignored"])?;
    ensure!(!worked, "{said}");
    let line = "the engine's capture was spoiled: cuStreamEndCapture: CUDA error 901";
    ensure!(said.contains(line), "{said}");
    Ok(())
}

/// Tests the tests' own tools: the copies of one process are held, other processes go on, and the held copies arrive in
/// the end.
#[test]
fn a_borrower_whose_copies_are_held_gets_on_when_they_are_let_go_of() -> Result<()> {
    let stub = Stub::new()?;
    let node = Node::start_with(Setup {
        devices: Devices::File(stub.topology_file()?),
        environment: stub.environment()?,
        ..Setup::default()
    })?;
    let mut donor = full_stack::donate(&node, 1, "cuda-ipc")?;
    full_stack::offered(&node, &mut donor)?;
    let start = |name| BorrowerProcess::start(&node, 0, &Job::new(name, 1));
    let (mut held, mut free) = (start("held")?, start("free")?);
    for borrower in [&mut held, &mut free] {
        borrower.run("reserve 4")?;
    }
    stub.trace(&["cuLaunchKernel"])?;
    let hold = stub.hold(Some(held.pid()), Held::Kernels)?;
    held.tell("sweep-store")?;
    let launched = |process| {
        stub.wait_for("a launch", |calls| {
            calls.iter().any(|call| call.is(process, "cuLaunchKernel"))
        })
    };
    launched(held.pid())?;
    let stored = free.run("sweep-store")?.stored;
    ensure!(stored > 0, "nobody else may be held");
    ensure!(held.report()?.operations == 0, "a held store ended");
    stub.lift(&hold)?;
    ensure!(held.run("sweep-fetch")?.served > 0, "what was held is lost");
    // Its twin: a fault of one process makes its own launches fail, and no launch of the other.
    let fault = stub.inject(Some(held.pid()), "cuLaunchKernel=719")?;
    ensure!(free.run("sweep-fetch")?.served > 0);
    ensure!(held.run("sweep-fetch")?.served == 0);
    stub.lift(&fault)
}
