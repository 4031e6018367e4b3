//! The full stack on CUDA: real processes with the stub driver, which simulates two GPUs.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use swiftcache_proto::v1;
use swiftcache_tests::{
    crew::{BorrowerProcess, Job},
    engine::{SLAB_BYTES, eventually},
    full_stack,
    node::{Devices, Node, Setup, Sight},
    operator::Operator,
    programs::{Program, program},
    stub::{Held, Stub},
};

/// Runs the check program with a stub driver that has these faults. Returns whether it worked, and its output.
fn check(arguments: &[&str], faults: &[&str]) -> Result<(bool, String)> {
    let stub = Stub::new()?;
    for fault in faults {
        stub.inject(None, fault)?;
    }
    let output = Command::new(program("swiftcache-gpu-check")?)
        .args(arguments)
        .arg("--topology")
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
    let (worked, said) = check(&["full-stack"], &[])?;
    ensure!(worked, "{said}");
    for handle in ["cuda-ipc", "posix-fd"] {
        let line = format!("ok      full stack, {handle}: 240 blocks stored");
        ensure!(said.contains(&line), "no {line:?} in {said}");
    }
    Ok(())
}

#[test]
fn blocks_cross_between_processes_that_enumerate_one_device_each() -> Result<()> {
    let (worked, said) = check(&["full-stack", "--apart"], &[])?;
    ensure!(worked, "{said}");
    let line =
        "ok      full stack, posix-fd, each process enumerates its own GPU only: 240 blocks stored";
    ensure!(said.contains(line), "{said}");
    Ok(())
}

/// A node of the stub's two devices, and a donor of the second one which enumerates no other.
fn lent_apart(stub: &Stub, handle: Option<&str>) -> Result<(Node, Program)> {
    let node = Node::start_with(Setup {
        devices: Devices::File(stub.topology_file()?),
        environment: stub.environment()?,
        ..Setup::default()
    })?;
    let mut donor = full_stack::donate_seeing(&node, 1, handle, &Sight::Only("1".to_owned()))?;
    full_stack::offered(&node, &mut donor)?;
    Ok((node, donor))
}

/// Starts a borrower on the first device, and gives it nothing to do yet.
fn borrower(
    node: &Node,
    name: &str,
    slabs: u64,
    sight: &str,
    log: &Path,
) -> Result<BorrowerProcess> {
    let job = Job {
        slabs,
        host_blocks: 0,
        conversations: 2,
        log: "warn".to_owned(),
        log_file: Some(log.to_owned()),
        ..Job::new(name, 1)
    };
    BorrowerProcess::start_seeing(node, 0, &job, &Sight::Only(sight.to_owned()))
}

#[test]
fn a_descriptor_is_the_default_and_needs_the_device_node_of_its_gpu() -> Result<()> {
    let stub = Stub::new()?;
    let (node, _donor) = lent_apart(&stub, None)?;
    let mut regions = Operator::of(&node)?.regions()?.into_iter();
    ensure!(regions.all(|region| region.handle_kind() == v1::HandleKind::PosixFd));
    let log = stub.directory().join("log");
    let mut writer = borrower(&node, "writer", 4, "0", &log)?;
    writer.run("reserve 4")?;
    let stored = writer.run("sweep-store")?.stored;
    ensure!(stored > 0);
    // A container with one GPU: the driver opens nothing of the other one.
    let hidden = stub.directory().join("hidden");
    let mut reader = borrower(&node, "hidden", 0, "0", &hidden)?;
    stub.inject(Some(reader.pid()), "nodes=0")?;
    ensure!(reader.run("sweep-fetch")?.found == 0);
    let told = fs::read_to_string(hidden)?;
    for part in ["/dev/nvidiaN", "NVIDIA_VISIBLE_DEVICES=all"] {
        ensure!(told.contains(part), "{told}");
    }
    // The twin has the node, and still enumerates its own device only.
    let mut twin = borrower(&node, "twin", 0, "0", &log)?;
    let fetched = twin.run("sweep-fetch")?;
    ensure!(
        fetched.found == stored && fetched.served == stored,
        "{fetched:?} of {stored}"
    );
    Ok(())
}

#[test]
fn a_legacy_handle_opens_only_where_its_gpu_is_enumerated() -> Result<()> {
    let stub = Stub::new()?;
    let (node, _donor) = lent_apart(&stub, Some("cuda-ipc"))?;
    let operator = Operator::of(&node)?;
    let log = stub.directory().join("log");
    let _blind = borrower(&node, "blind", 4, "0", &log)?;
    eventually("the reason in the log", || {
        let told = fs::read_to_string(&log)?;
        Ok(told.contains("--handle posix-fd") && told.contains("CUDA_VISIBLE_DEVICES"))
    })?;
    // The twin enumerates both, the own one first.
    let mut twin = borrower(&node, "twin", 4, "0,1", &log)?;
    twin.run("reserve 4")?;
    let stored = twin.run("sweep-store")?.stored;
    ensure!(stored > 0 && twin.run("sweep-fetch")?.served == stored);
    ensure!(operator.account()?.leased_bytes == 4 * SLAB_BYTES);
    Ok(())
}

#[test]
fn a_donor_that_cannot_export_fails_and_is_named() -> Result<()> {
    let (worked, said) = check(&["full-stack"], &["cuMemExportToShareableHandle=801"])?;
    ensure!(!worked, "{said}");
    ensure!(
        said.contains("Error: full stack, posix-fd: swiftcache donate ended early"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_graph_is_captured_while_a_borrower_leases_stores_and_gives_back() -> Result<()> {
    let (worked, said) = check(&["graph-capture"], &[])?;
    ensure!(worked, "{said}");
    for handle in ["cuda-ipc", "posix-fd"] {
        let line = format!("stored, loaded and given back, {handle}");
        ensure!(said.contains(&line), "no {line:?} in {said}");
    }
    // Its twin: where relaxing a thread's mode does not help, the borrower's calls spoil the capture.
    let (worked, said) = check(&["graph-capture"], &["capture_mode=ignored"])?;
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
