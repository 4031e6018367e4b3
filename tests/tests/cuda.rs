//! The whole of SwiftCache on CUDA: real processes over the stub driver, which plays two GPUs.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use swiftcache_tests::{programs::program, stub::Stub};

/// Runs the full stack over a stub driver with these faults; what was said, and whether it worked.
fn full_stack(faults: &[&str]) -> Result<(bool, String)> {
    let stub = Stub::new()?;
    for fault in faults {
        stub.inject(None, fault)?;
    }
    let output = Command::new(program("swiftcache-gpu-check")?)
        .args(["full-stack", "--topology"])
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
    let (worked, said) = full_stack(&[])?;
    ensure!(worked, "{said}");
    for handle in ["cuda-ipc", "posix-fd"] {
        let line = format!("ok      full stack, {handle}: 240 blocks stored");
        ensure!(said.contains(&line), "no {line:?} in {said}");
    }
    Ok(())
}

#[test]
fn a_donor_that_cannot_export_fails_and_is_named() -> Result<()> {
    let (worked, said) = full_stack(&["cuMemExportToShareableHandle=801"])?;
    ensure!(!worked, "{said}");
    ensure!(said.contains("ok      full stack, cuda-ipc"), "{said}");
    ensure!(
        said.contains("Error: full stack, posix-fd: swiftcache donate ended early"),
        "{said}"
    );
    Ok(())
}
