//! The real CUDA path with the stub driver: every promise, and every error that a driver can return.

mod peers;
mod run;
mod spaces;

use std::{path::PathBuf, process::Command};

use swiftcache_client::device::cuda::LIBRARY_VARIABLE;
use swiftcache_gpu_tests::conformance::{CHECKS, PEER_CHECKS};

use run::Run;

const PROGRAM: &str = env!("CARGO_BIN_EXE_swiftcache-gpu-check");

#[test]
fn the_cuda_backend_keeps_every_promise_on_the_stub() {
    for (name, _) in CHECKS.iter().chain(PEER_CHECKS) {
        let output = Run::new("").arguments(&["conformance", "--only", name]);
        let said = String::from_utf8_lossy(&output.stdout);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}{told}");
    }
}

#[test]
fn promises_hold_over_one_device_and_over_pcie() {
    for setting in ["devices=1", "peers=pcie"] {
        let output = Run::new(setting).arguments(&["conformance", "--only", "process"]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

#[test]
fn the_benchmarks_run_on_the_stub() {
    let run = Run::new("");
    let file = run.stub.directory().join("report.json");
    let path = file.to_str().expect("a plain path");
    let output = run.arguments(&["bench", "--small", "--json", path]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(file).expect("the report")).expect("it is JSON");
    let rows = report["rows"].as_array().expect("it has rows");
    for group in [
        "extent",
        "scattered",
        "16-token blocks",
        "latency",
        "layer pipeline",
    ] {
        let seconds =
            |row: &serde_json::Value| row["seconds"].as_f64().is_some_and(|time| time > 0.0);
        let found = rows.iter().any(|row| row["group"] == group && seconds(row));
        assert!(found, "no figure for {group}");
    }
}

/// The twin of the check above: where relaxing a thread's mode does not help, any call of ours spoils the capture.
#[test]
fn a_capture_is_spoiled_where_threads_are_not_relaxed() {
    let run = Run::new("capture_mode=ignored");
    let output = run.arguments(&["conformance", "--only", "graph capture"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{said}");
    assert!(
        said.contains("the engine's capture was spoiled: cuStreamEndCapture: CUDA error 901"),
        "{said}"
    );
}

/// The fault makes the zeroing of returned memory fail. The engine must not get the memory with a borrower's bytes in
/// it.
#[test]
fn lent_memory_comes_back_zero_though_the_driver_fails_for_a_moment() {
    const CHECK: &str = "a part of an engine's pool is lent in place, zero before and after";
    let returned = |fault| {
        let output = Run::new(fault).arguments(&["conformance", "--only", CHECK]);
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), told)
    };
    for fault in ["cuMemsetD8Async=999@2", "cuMemsetD8Async=999@2-4"] {
        let (kept, told) = returned(fault);
        assert!(kept, "{fault}: {told}");
    }
    // The twin: with a driver that never zeroes it, the check fails.
    let (kept, told) = returned("cuMemsetD8Async=999@2-");
    assert!(
        !kept && told.contains("given back with what others left"),
        "{told}"
    );
}

const OPERATIONS: [&str; 12] = [
    "allocate-plain",
    "allocate-virtual",
    "allocate-host",
    "import-host",
    "hbm",
    "stream",
    "export-plain",
    "export-virtual",
    "copy",
    "batch",
    "gather",
    "zero",
];

#[test]
fn every_operation_works_without_a_fault_and_fails_on_a_lost_device() {
    let (sound, lost) = (Run::new(""), Run::new("cuCtxPushCurrent_v2=214"));
    for operation in OPERATIONS {
        sound.success(operation);
        let told = lost.failure(operation);
        assert!(
            told.contains("uncorrectable ECC error encountered"),
            "{told}"
        );
        assert!(told.contains("GPU-5a5a7374"), "{told} names no device");
    }
}

#[test]
fn each_refusal_of_the_driver_is_explained() {
    let cases = [
        (
            "cuInit=100",
            "open",
            "the CUDA driver does not start: no CUDA-capable device",
        ),
        ("devices=0", "open", "shows no GPU to this process"),
        (
            "cuThreadExchangeStreamCaptureMode=1",
            "open",
            "the driver does not list its GPUs: invalid argument",
        ),
        (
            "cuThreadExchangeStreamCaptureMode=1@5-",
            "hbm",
            "relaxing the thread's capture mode failed on GPU-5a5a7374",
        ),
        (
            "cuDeviceGetUuid_v2=101",
            "open",
            "GPU 0: invalid device ordinal",
        ),
        (
            "cuMemAlloc_v2=2",
            "allocate-plain",
            "no room for 4194304 bytes (out of memory",
        ),
        (
            "cuMemCreate=2",
            "allocate-virtual",
            "no room for 4194304 bytes (out of memory",
        ),
        (
            "cuMemMap=1",
            "allocate-virtual",
            "cuMemMap failed on GPU-5a5a7374",
        ),
        (
            "cuMemSetAccess=1",
            "allocate-virtual",
            "cuMemSetAccess failed on",
        ),
        (
            "cuMemHostAlloc=2",
            "allocate-host",
            "no room for 4194304 bytes",
        ),
        (
            "cuMemHostRegister_v2=2",
            "import-host",
            "cuMemHostRegister of 4194304 bytes of host memory",
        ),
        (
            "cuMemHostGetDevicePointer_v2=1",
            "import-host",
            "cuMemHostRegister of 4194304 bytes of host memory",
        ),
        (
            "cuMemsetD8Async=719",
            "allocate-plain",
            "zeroing memory failed on",
        ),
        ("cuIpcGetMemHandle=801", "export-plain", "no MIG device"),
        (
            "cuMemExportToShareableHandle=801",
            "export-virtual",
            "cannot export a PosixFd",
        ),
        (
            "cuIpcOpenMemHandle_v2=400",
            "import-plain",
            "cannot import a CudaIpc handle: invalid",
        ),
        ("", "import-own", "this process exported it"),
        ("", "import-from-the-dead", "needs the donor alive"),
        (
            "peers=none",
            "import-plain",
            "has no peer access to GPU-5a5a7374",
        ),
        (
            "peers=none",
            "import-virtual",
            "has no peer access to GPU-5a5a7374",
        ),
        (
            "cuMemImportFromShareableHandle=1",
            "import-virtual",
            "the donor's CUDA export",
        ),
        (
            "cuMemcpyAsync=719",
            "copy",
            "copying failed on GPU-5a5a7374",
        ),
        (
            "cuMemcpyBatchAsync_v2=1",
            "batch",
            "copying a batch failed on",
        ),
        (
            "cuLaunchKernel=719",
            "gather",
            "launching the gather kernel failed on",
        ),
        (
            "cuEventRecord=719",
            "gather",
            "recording a ticket failed on",
        ),
        (
            "execute=719",
            "zero",
            "unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED); the process has lost its CUDA context: restart it",
        ),
        (
            "cuStreamCreateWithPriority=2",
            "stream",
            "creating a stream failed on",
        ),
    ];
    for (faults, operation, expected) in cases {
        let told = Run::new(faults).failure(operation);
        assert!(told.contains(expected), "{faults}: {told}");
    }
}

#[test]
fn a_driver_without_the_kernel_copies_piece_by_piece() {
    for faults in ["cuModuleLoadData=500", "cuModuleGetFunction=500"] {
        Run::new(faults).success("gather");
    }
}

/// A copy of the stub driver in which a symbol has another name.
fn without(symbols: &[&str], run: &Run) -> PathBuf {
    let driver = &Run::new("").driver;
    let mut library = std::fs::read(driver).expect("the stub driver");
    for symbol in symbols {
        let name = format!("\0{symbol}\0");
        let found: Vec<usize> = library
            .windows(name.len())
            .enumerate()
            .filter_map(|(at, bytes)| (bytes == name.as_bytes()).then_some(at))
            .collect();
        assert!(!found.is_empty(), "the stub driver has no {symbol}");
        for at in found {
            library[at + 1] = b'X';
        }
    }
    let path = run.stub.directory().join("libpatched.so");
    std::fs::write(&path, library).expect("a library");
    path
}

#[test]
fn a_missing_symbol_is_named_or_done_without() {
    let mut run = Run::new("");
    run.driver = without(&["cuMemcpyAsync"], &run);
    let told = run.failure("open");
    assert!(
        told.contains("has no cuMemcpyAsync: it is older than CUDA 12.0"),
        "{told}"
    );

    run.driver = without(&["cuMemCreate"], &run);
    let told = run.failure("allocate-virtual");
    assert!(
        told.contains("this driver and device offer [CudaIpc]"),
        "{told}"
    );
    run.success("allocate-plain");

    for absent in [
        &["cuMemcpyBatchAsync_v2"][..],
        &["cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"],
    ] {
        run.driver = without(absent, &run);
        run.success("batch");
    }
}

#[test]
fn no_driver_means_the_host_unless_a_gpu_is_demanded() {
    let open = |choice: &str, required: bool| {
        let mut command = Command::new(PROGRAM);
        command
            .args(["open", choice])
            .env(LIBRARY_VARIABLE, "/nowhere/libcuda.so");
        if required {
            command.env("SWIFTCACHE_REQUIRE_GPU", "1");
        }
        let output = command.output().expect("the check program runs");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            told,
        )
    };
    assert_eq!(open("auto", false).1, "host\n");
    assert_eq!(open("host", false).1, "host\n");
    for (choice, required) in [("cuda", false), ("auto", true)] {
        let (opened, _, told) = open(choice, required);
        assert!(
            !opened && told.contains("no CUDA driver: /nowhere/libcuda.so"),
            "{told}"
        );
    }
    let output = Run::new("").arguments(&["open", "auto"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "cuda\n");
}
