//! The whole of SwiftCache on CUDA: real processes over the stub driver, which plays two GPUs.

use std::{env, fs, process::Command};

use anyhow::{Context, Result, ensure};
use swiftcache_tests::programs::program;

/// The stub driver's devices, as it names them.
const TOPOLOGY: &str = r#"
name = "two stub GPUs"

[[device]]
uuid = "GPU-5a5a7374-7562-2d64-7269-7665722d3000"
name = "stub GPU"
hbm_gib = 1.0

[[device]]
uuid = "GPU-5a5a7374-7562-2d64-7269-7665722d3001"
name = "stub GPU"
hbm_gib = 1.0

[all_pairs]
kind = "nvlink"
gigabytes_per_second = 380.0
"#;

/// Runs the full stack over a stub driver with these faults; what was said, and whether it worked.
fn full_stack(faults: &str) -> Result<(bool, String)> {
    let directory = tempfile::tempdir()?;
    let topology = directory.path().join("topology.toml");
    fs::write(&topology, TOPOLOGY)?;
    fs::write(directory.path().join("faults"), faults)?;
    // Cargo builds it beside this test.
    let driver = env::current_exe()?.with_file_name("libswiftcache_stub_driver.so");
    ensure!(driver.is_file(), "{} is missing", driver.display());
    let output = Command::new(program("swiftcache-gpu-check")?)
        .args(["full-stack", "--topology"])
        .arg(&topology)
        .env("SWIFTCACHE_LIBCUDA", driver)
        .env("SWIFTCACHE_STUB_DIR", directory.path())
        .output()
        .context("swiftcache-gpu-check")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok((output.status.success(), said))
}

#[test]
fn blocks_cross_devices_through_every_process_by_each_kind_of_handle() -> Result<()> {
    let (worked, said) = full_stack("")?;
    ensure!(worked, "{said}");
    for handle in ["cuda-ipc", "posix-fd"] {
        let line = format!("ok      full stack, {handle}: 240 blocks stored");
        ensure!(said.contains(&line), "no {line:?} in {said}");
    }
    Ok(())
}

#[test]
fn a_donor_that_cannot_export_fails_and_is_named() -> Result<()> {
    let (worked, said) = full_stack("cuMemExportToShareableHandle=801")?;
    ensure!(!worked, "{said}");
    ensure!(said.contains("ok      full stack, cuda-ipc"), "{said}");
    ensure!(
        said.contains("Error: full stack, posix-fd: swiftcache donate ended early"),
        "{said}"
    );
    Ok(())
}
